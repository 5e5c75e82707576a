"""What the device `cuda` is made of: `weights` and `linears` on the device, `inputs` (a step's rows as static buffers,
filled through pinned memory), `model` (the forward pass over `kernels.gpu`, or `kernels.on_device` in its place),
`kv_store` (KV memory on the device). Of a worker of several GPUs: `part` (what ranks say to each other),
`shared_linears` (what they compute together), `rank` (another one's process).

Everything runs on CPU tensors too, in Triton's interpreter: that is how it is tested without a GPU.
"""

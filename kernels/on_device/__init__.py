"""What `kernels.gpu` computes, by torch's operations or by the plain formulas, on tensors of any device: the way of
GPUs and models that its kernels are not made for, and what they can be held against in a whole engine.

The functions have the signatures of `kernels.gpu`'s, with the implementation before them where there are two
(`dispatch.gpu_operations` and `kv_moves` put them together). Those of a step wait for the device where a shape depends
on data, and tokens are drawn on the host, so nothing of theirs can be captured.
"""

"""KV between two workers of one host whose blocks lie in GPU memory: device to device, without a copy through the host.

Everything but the bytes is mapped memory's (`kvtransfer.mapped`): the descriptors over a Unix socket, one mapping for
each life of a peer, generations in host memory that are compared after each copy, references over gRPC. `driver` makes
device memory that has a descriptor, and maps another's; `memory` is the seam to whoever copies; `blocks` is a pull.
"""

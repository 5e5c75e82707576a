"""KV over memory that two workers of one host share.

`segment` is the memory itself, a sealed memfd; `fd_passing` hands its descriptor to workers of the same user over a
Unix socket; `transport` is the reader's end. Control (tickets, watermark, revocation, leases) stays on gRPC: what a
holder sends there in place of bytes is which block, at which generation.
"""

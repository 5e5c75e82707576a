"""`kvtransfer`: the passage of a request's KV from its prefill worker to its decode worker.

`ticket` names a handoff and why it may be refused; `protocol` decides, purely, on both sides; `source` (prefill worker)
and `sink` (decode worker) drive it; `transport` is the seam to the bytes, `wire` their form, `grpc_transport` and
`memory_transport` carry them; `layout` and `store` describe and hold KV blocks.
"""

"""`kvtransfer`: the passage of a request's KV from its prefill worker to its decode worker.

`ticket` names a handoff and why it may be refused; `protocol` decides, purely, on both sides; `source` (prefill worker)
and `sink` (decode worker) drive it; `transport` is the seam to the bytes: `grpc_transport` carries them in the messages
of `wire`, `mapped` reads them out of the memory of another worker of this host, `collective` sends them straight from
rank to rank, `memory_transport` is for tests; `mover` does one of the first two in a process beside the worker's;
`layout` and `store` describe and hold KV blocks.
"""

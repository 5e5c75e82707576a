"""`kvtransfer.collective`: KV straight between the ranks of two workers, over a process group for each pair of ranks
(NCCL between GPUs, Gloo between processors, the same code).

`plan` says what goes from which rank to which, a batch of blocks at a time; `holder` and `reader` are the two ends of
a session, which decides over gRPC what is sent when; `rank` is one rank's part, told what to do by `commands`: it
gathers, sends, receives and scatters through `groups`; `ports` joins a worker's ranks; `transport` is what a decode
worker pulls through.
"""

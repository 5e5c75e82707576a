"""`router`: front ends (HTTP, gRPC), tokenizer, admission, choice of workers, one request's coroutine, streams.

No torch, no Ray.
"""

"""A worker's KV moves in a process of its own, so that bytes never want the interpreter that the engine runs in.

`link`: calls between the two, over a socket pair. `process`: the mover, which maps the worker's KV memory. `worker`:
what the worker has of it. `messages`: what the two tell each other beside KV messages.
"""

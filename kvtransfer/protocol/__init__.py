"""The handoff protocol as pure state machines: events in, actions out; time is a parameter; no I/O, no sleeping.

`holder` is the prefill side, `puller` the decode side, `credits` the promise that stands before both.
"""

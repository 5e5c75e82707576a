"""`kvtransfer`: the handoff: KV layout descriptors, the protocol as pure state machines for both sides, and the
transports that carry it.
"""

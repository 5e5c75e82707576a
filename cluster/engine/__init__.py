"""`engine`: one model replica on one device group: scheduler, block pool, prefix cache, model, sampler, devices.

The scheduler, the block pool, the prefix cache and the policies are pure: no torch, no I/O, no sleeping.
"""

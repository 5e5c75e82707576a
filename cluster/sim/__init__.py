"""The cluster in virtual time: the scheduler, block pool, prefix cache, admission, placement and handoff classes of the
runtime, driven by discrete events; only the device is replaced, by a latency model (`cluster.latency`), and the network
by links with a bandwidth. Nothing sleeps, and the same seed gives the same bytes.
"""

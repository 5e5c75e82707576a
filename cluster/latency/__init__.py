"""`cluster.latency`: how long a step takes, and a transfer. Pure: the router, the paced device, the simulator and the
planner predict from the same models.

`linear` is the model that workers report and routers predict from, `profile` a finer one with measured terms.
"""

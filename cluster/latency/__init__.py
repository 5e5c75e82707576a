"""`cluster.latency`: how long a step takes, and a transfer. Pure: the router, the paced device, the simulator and the
planner predict from the same models.

`interface` is what is asked of one (`StepCosts`: whole steps, stages, runs of decode steps). Its sources: `profile`
(measured terms, DistServe's published ones; `profile_fit` fits them to steps), `roofline` (from `model_facts` and
`hardware` through `operators`). `links` costs transfers, `memory` says what a worker holds. `linear` is the coarse
model that workers fit to their own steps and routers predict from.
"""

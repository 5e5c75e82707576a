"""`cluster.profiler`: measured numbers into latency models. `tandem profile`: `points` (which steps, and their KV),
`repeat` (how often, in what time, and whether the times agree), `live` (an engine's device and thread), `transfers` (KV
between two workers), `fit` and `plot` of what came of it. `fit_operators` fits the constants of GPU operators
(`cluster.latency.operators`) to published measurements (`operator_data`) and writes them into the hardware files.
"""

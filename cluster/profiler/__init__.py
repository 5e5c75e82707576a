"""`cluster.profiler`: measured numbers into latency models. `fit_operators` fits the constants of GPU operators
(`cluster.latency.operators`) to published measurements (`operator_data`) and writes them into the hardware files.
"""

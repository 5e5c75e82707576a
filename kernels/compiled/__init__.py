"""Kernels for CPUs, written in Python and compiled by numba for the processor at hand, without the interpreter lock.

`simd` gives the vectors, `team` the threads; one operation a file, as everywhere under `kernels`; `decoder` strings
them together into one call for a whole step.
"""

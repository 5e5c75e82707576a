"""`kernels`: what runs on a device, one operation a file, each with its torch reference beside it.

`dispatch` is the one place that picks an implementation. Imports nothing of ours, and loads no torch by itself.
"""

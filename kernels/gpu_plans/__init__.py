"""What a step on a GPU is told, whoever computes it (`kernels.gpu` or `kernels.on_device`): plans of attention's work,
what draws ask and answer, which KV moves where. Plain data in torch tensors and the host code that makes it; nothing
here loads Triton.
"""

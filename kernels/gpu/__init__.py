"""`kernels.gpu`: Triton kernels for NVIDIA GPUs, one operation a file, held against the torch references in `kernels`.

Importing this loads nothing; importing one of its modules loads torch and triton (3.4 or later). They need a GPU, or
Triton's interpreter (`TRITON_INTERPRET=1` before triton is imported), which computes on CPU tensors. Each module says
in `SHIPPED` which configurations it runs with: `cubin` compiles them without a GPU and tells what they take.
"""

import os

# What triton 3.9 does and warns of when it is left unsaid: products and sums are fused where the hardware can.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

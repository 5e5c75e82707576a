"""Rewrites a GGUF file in another type with llama.cpp's own quantizer: SOURCE TARGET TYPE (bf16, q8_0, q4_0)."""

from __future__ import annotations

import sys

import llama_cpp

TYPES = {
    "bf16": llama_cpp.LLAMA_FTYPE_MOSTLY_BF16,
    "q8_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0,
    "q4_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0,
}

if __name__ == "__main__":
    source, target, kind = sys.argv[1:]
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = TYPES[kind]
    params.allow_requantize = True
    params.nthread = 1
    sys.exit(llama_cpp.llama_model_quantize(source.encode(), target.encode(), params))

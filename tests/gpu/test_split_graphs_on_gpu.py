"""One GPU, two processes, as they are served: bf16, decode steps captured, KV in 16 bits or 8. Apart from float32's
test, beside which it runs.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("no GPU here", allow_module_level=True)
sys.path.insert(0, str(Path(__file__).parent))  # modules that these tests share

from served import Served, answer_alone
from test_split_on_gpu import ENGINE, PROMPT, TOKENS

CAPTURED = dataclasses.replace(
    ENGINE, dtype="bfloat16", enforce_eager=False, kv_cache_bytes=2**28, max_running=4, max_model_len=512
)


@pytest.mark.parametrize("kv_cache_dtype", ["auto", "fp8"])
def test_two_workers_of_one_gpu_answer_as_one(tmp_path: Path, kv_cache_dtype: str) -> None:
    """Token by token: steps are of the same shapes, and the same kernels compute them."""
    engine = dataclasses.replace(CAPTURED, kv_cache_dtype=kv_cache_dtype)
    wanted = answer_alone(tmp_path / "alone", engine, PROMPT, TOKENS)
    assert len(wanted) == TOKENS

    served = Served(tmp_path, engine)
    try:
        served.worker("prefill", "p0", "auto")
        served.worker("decode", "d0", "cuda_ipc")
        answer = served.ask(PROMPT, TOKENS)
        assert (answer.timings.path, answer.timings.transport) == ("split", "cuda_ipc")
        assert answer.token_ids == wanted
    finally:
        served.close()

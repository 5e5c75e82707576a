"""One GPU, two processes: a prefill and a decode worker share it, KV goes by CUDA IPC, the answer is one worker's."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("no GPU here", allow_module_level=True)
pytest.importorskip("grpc_health")
pytest.importorskip("grpc_reflection")
pytest.importorskip("grpc_status")
pytest.importorskip("httptools")
pytest.importorskip("orjson")
pytest.importorskip("tokenizers")
pytest.importorskip("uvloop")
pytest.importorskip("xxhash")
sys.path.insert(0, str(Path(__file__).parent))  # modules that these tests share

from served import Served, answer_alone
from tandem.cluster.config import EngineConfig

ENGINE = EngineConfig(
    model="dummy:smollm2-135m",
    device="cuda",
    dtype="float32",
    gpus=(0,),
    gpu_memory_utilization=0.15,
    enforce_eager=True,
    max_batched_tokens=256,
    max_running=8,
    max_model_len=1024,
)
PROMPT = [(7 * i) % 1000 + 100 for i in range(300)]
TOKENS = 12


def test_two_workers_of_one_gpu_answer_as_one_and_a_killed_one_is_replaced(tmp_path: Path) -> None:
    wanted = answer_alone(tmp_path / "alone", ENGINE, PROMPT, TOKENS)
    assert len(wanted) == TOKENS

    served = Served(tmp_path, ENGINE)
    try:
        holder = served.worker("prefill", "p0", "auto")
        reader = served.worker("decode", "d0", "cuda_ipc")
        answer = served.ask(PROMPT, TOKENS)
        assert (answer.timings.path, answer.timings.transport) == ("split", "cuda_ipc")
        assert answer.token_ids == wanted
        served.end(holder)  # its memory is mapped by the reader, whose next pull maps that of the next life
        served.worker("prefill", "p0", "auto")
        answer = served.ask(PROMPT, TOKENS)
        assert (answer.timings.transport, answer.token_ids) == ("cuda_ipc", wanted)
        served.end(reader)
        served.worker("decode", "d1", "grpc")
        answer = served.ask([PROMPT[0] + 1, *PROMPT[1:]], TOKENS)
        assert answer.timings.transport == "grpc"
        answer = served.ask(PROMPT, TOKENS)
        assert (answer.timings.transport, answer.token_ids) == ("grpc", wanted)
    finally:
        served.close()

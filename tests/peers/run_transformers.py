"""transformers' decoder with its own cache, a batch of equal prompts, greedy."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from peer_runner import Engine, Setup, serve


class TransformersEngine(Engine):
    """`AutoModelForCausalLM` with `use_cache`: what `generate` does, without its bookkeeping."""

    def __init__(self, setup: Setup) -> None:
        os.environ["HF_HUB_OFFLINE"] = "1"
        import torch
        import transformers

        torch.set_num_threads(len(setup.cores))
        torch.set_grad_enabled(False)
        self._torch = torch
        self.versions = {"transformers": transformers.__version__, "torch": torch.__version__}
        dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[setup.form]
        self._model: Any = transformers.AutoModelForCausalLM.from_pretrained(setup.model, dtype=dtype).eval()
        self.vocab_size = self._model.config.vocab_size
        self._ids: Any = None
        self._cache: Any = None

    def begin(self, prompts: list[list[int]], max_tokens: int) -> None:
        self._ids, self._cache = self._torch.tensor(prompts), None

    def step(self) -> int:
        found = self._model(input_ids=self._ids, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        self._cache = found.past_key_values
        self._ids = found.logits[:, -1:].argmax(dim=-1)
        return len(self._ids)

    def end(self) -> None:
        self._ids = self._cache = None


if __name__ == "__main__":
    serve(TransformersEngine)

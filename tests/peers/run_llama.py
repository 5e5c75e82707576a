"""llama.cpp through its low-level batch interface: one sequence id per prompt, greedy from the logits."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from peer_runner import Engine, Setup, serve


class LlamaEngine(Engine):
    """A model file; a fresh context for each set of sequences."""

    def __init__(self, setup: Setup) -> None:
        import llama_cpp

        self._lib = llama_cpp
        self._setup = setup
        self.versions = {"llama-cpp-python": llama_cpp.__version__}
        llama_cpp.llama_backend_init()
        params = llama_cpp.llama_model_default_params()
        self._model = llama_cpp.llama_model_load_from_file(setup.model.encode(), params)
        if not self._model:
            raise OSError(f"{setup.model} cannot be loaded")
        self.vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        self._context = None
        self._batch = llama_cpp.llama_batch_init(setup.step_tokens, 0, 1)
        self._todo: list[tuple[int, int, int, bool]] = []
        self._length: list[int] = []
        self._next: dict[int, int] = {}

    def begin(self, prompts: list[list[int]], max_tokens: int) -> None:
        params = self._lib.llama_context_default_params()
        longest = max(map(len, prompts)) + max_tokens
        params.n_ctx = -(-longest // 256) * 256 * len(prompts)
        params.n_seq_max = len(prompts)
        params.n_batch = self._setup.step_tokens
        params.n_ubatch = min(512, self._setup.step_tokens)
        params.n_threads = params.n_threads_batch = len(self._setup.cores)
        self._context = self._lib.llama_init_from_model(self._model, params)
        if not self._context:
            raise MemoryError(f"no context of {params.n_ctx} positions")
        self._todo = [
            (token, place, sequence, place == len(prompt) - 1)
            for sequence, prompt in enumerate(prompts)
            for place, token in enumerate(prompt)
        ]
        self._length = [len(prompt) for prompt in prompts]
        self._next = {}

    def step(self) -> int:
        """Prompts in pieces of the budget, one after the other; when all are computed, a token of each sequence."""
        rows = self._todo[: self._setup.step_tokens]
        self._todo = self._todo[len(rows) :]
        if not rows:
            rows = [(self._next[sequence], length, sequence, True) for sequence, length in enumerate(self._length)]
            self._length = [length + 1 for length in self._length]
        batch = self._batch
        batch.n_tokens = len(rows)
        for index, (token, place, sequence, wanted) in enumerate(rows):
            batch.token[index] = token
            batch.pos[index] = place
            batch.n_seq_id[index] = 1
            batch.seq_id[index][0] = sequence
            batch.logits[index] = wanted
        failed = self._lib.llama_decode(self._context, batch)
        if failed:
            raise RuntimeError(f"llama_decode: {failed}")
        import numpy as np

        for index, (_, _, sequence, wanted) in enumerate(rows):
            if wanted:
                logits = self._lib.llama_get_logits_ith(self._context, index)
                self._next[sequence] = int(np.ctypeslib.as_array(logits, (self.vocab_size,)).argmax())
        return len(self._next)

    def end(self) -> None:
        self._lib.llama_free(self._context)
        self._context = None


if __name__ == "__main__":
    serve(LlamaEngine)

"""Our engine, in this process, step by step: scheduler, block pool and device as a mixed worker has them."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from peer_runner import Engine, Setup, serve

BLOCK_SIZE = 16
MAX_STEPS = 256
"""Positions beyond `max_len` that the KV memory holds: nothing is ever preempted."""


class TandemEngine(Engine):
    """The prefix cache is off: every prompt is new anyway."""

    def __init__(self, setup: Setup) -> None:
        from tandem import __version__
        from tandem.cluster.clock import MonotonicClock
        from tandem.cluster.config import EngineConfig
        from tandem.cluster.engine.block_pool import BlockPool
        from tandem.cluster.engine.devices.kv_memory import kv_layout
        from tandem.cluster.engine.policies import policy_for
        from tandem.cluster.engine.prefix_cache import PrefixCache
        from tandem.cluster.engine.scheduler import Scheduler
        from tandem.cluster.launch.compose import build_device
        from tandem.cluster.models.reference import resolve_model
        from tandem.cluster.types import Role

        files = resolve_model(setup.model)
        dtype = "float32" if setup.form == "fp32" else "bfloat16"
        block_bytes = kv_layout(files.config, dtype, BLOCK_SIZE).block_bytes
        blocks = setup.max_seqs * -(-(setup.max_len + MAX_STEPS) // BLOCK_SIZE)
        config = EngineConfig(
            model=setup.model,
            dtype=dtype,
            quantization="w8a8" if setup.form == "w8a8" else None,
            threads=len(setup.cores),
            cpus=tuple(setup.cores),
            block_size=BLOCK_SIZE,
            kv_cache_bytes=blocks * block_bytes,
        )
        self._device = build_device(config, files, None)
        pool = BlockPool(blocks, BLOCK_SIZE)
        self._scheduler = Scheduler(
            block_pool=pool,
            prefix_cache=PrefixCache(pool, enabled=False),
            policy=policy_for(Role.MIXED, config.batching),
            clock=MonotonicClock(),
            max_batched_tokens=max(setup.step_tokens, setup.max_seqs),
            max_running=setup.max_seqs,
            max_waiting=setup.max_seqs,
            max_model_len=files.config.max_model_len,
            eos_token_ids=(),
        )
        picked = getattr(self._device, "picked", None)
        self.versions = {"tandem": __version__, "kernels": f"{picked.kernels} ({picked.reason})" if picked else "?"}
        self.vocab_size = self._device.vocab_size
        self._run = 0
        self._ids: list[str] = []
        self._have: set[str] = set()

    def begin(self, prompts: list[list[int]], max_tokens: int) -> None:
        from tandem.cluster.types import SamplingParams, SequenceSpec

        self._run += 1
        params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
        self._ids = [f"{self._run}-{index}" for index in range(len(prompts))]
        self._have = set()
        for name, prompt in zip(self._ids, prompts, strict=True):
            self._scheduler.add(SequenceSpec(seq_id=name, prompt_token_ids=tuple(prompt), sampling=params))

    def step(self) -> int:
        from tandem.cluster.engine.scheduler_events import TokensEmitted

        plan = self._scheduler.schedule()
        assert plan is not None, "nothing to compute"
        self._device.launch(plan)
        self._scheduler.complete(self._device.collect())
        for event in self._scheduler.take_events():
            if isinstance(event, TokensEmitted):
                self._have.add(event.seq_id)
        return len(self._have)

    def end(self) -> None:
        for name in self._ids:
            self._scheduler.abort(name)
        self._scheduler.take_events()


if __name__ == "__main__":
    serve(TandemEngine)

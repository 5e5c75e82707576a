"""A few cells of the matrix with SmolLM2 on the CPU device, fp32: the tokens are those of an undisturbed run."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cells import Cell, run_cell
from faults import FAULTS, left_out
from recipes import HOLDER, PULLER
from scenes import Rig
from scripted_router import Request
from tandem.cluster.config import EngineConfig
from tandem.cluster.models.reference import ModelFiles
from tandem.cluster.types import Role
from tandem.cluster.workload.prompts import PROMPTS
from tandem.kvtransfer.protocol.holder_state import HolderState
from tandem.kvtransfer.protocol.puller_state import PullerState
from tandem.router.tokenizer import load_tokenizer

MAX_TOKENS = 6


class RealRig(Rig):
    """Real workers: every request is about the same text, and no prefix is kept, so that every KV is handed off."""

    def __init__(self, folder: Path, text_token_ids: tuple[int, ...]) -> None:
        super().__init__(folder, engine=self._real, lease_s=120.0, pull_wait_s=120.0, credit_ttl_s=120.0)
        self._text = text_token_ids
        self._undisturbed: tuple[int, ...] = ()

    @staticmethod
    def _real(role: Role) -> EngineConfig:
        return EngineConfig(
            model="smollm2-135m", device="cpu", dtype="float32", kv_cache_bytes=64 * 2**20, prefix_cache=False
        )

    def prompt(self, tokens: int) -> tuple[int, ...]:
        return self._text[:tokens]

    def expected(self, request: Request) -> tuple[int, ...]:
        return self._undisturbed[: request.sampling.max_tokens]

    async def listen(self) -> None:
        """An undisturbed run, from worker to worker: what every other must answer."""
        await self.heal()
        prompt = self.prompt(42)
        request = Request(self.neighbor, self.name(), self.prefill, self.decode, prompt, max_tokens=MAX_TOKENS)
        await request.reserve()
        await request.prefill()
        await request.decode()
        outcome = await request.outcome()
        assert (outcome.kind, len(outcome.tokens)) == ("answer", MAX_TOKENS)
        self._undisturbed = outcome.tokens


@pytest.fixture(scope="module")
def real_rig(runner: asyncio.Runner, smollm2: ModelFiles, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    text = tuple(load_tokenizer(smollm2).encode(" ".join(PROMPTS), add_special=False))
    rig = RealRig(tmp_path_factory.mktemp("real"), text)
    runner.run(rig.listen())
    yield rig
    runner.run(rig.close())


CELLS = [
    (HOLDER[HolderState.HELD], "block_bit_flipped"),
    (HOLDER[HolderState.HELD], "wrong_generation_said"),
    (HOLDER[HolderState.HELD], "block_of_other_request_sealed"),
    (HOLDER[HolderState.HELD], "pull_of_wrong_epoch"),
    (HOLDER[HolderState.AWAITED], "stop_holder"),
    (HOLDER[HolderState.AWAITED], "abort_reaches_holder_only"),
    (PULLER[PullerState.PULLING], "stream_cut"),
    (PULLER[PullerState.PULLING], "abort"),
    (PULLER[PullerState.PULLING], "stop_puller"),
    (PULLER[PullerState.CANCELLING], "kill_holder"),
]


@pytest.mark.parametrize(("recipe", "fault"), CELLS, ids=[f"{recipe.name}-{fault}" for recipe, fault in CELLS])
def test_fault(runner: asyncio.Runner, real_rig: RealRig, recipe: Any, fault: str) -> None:
    assert left_out(FAULTS[fault], recipe) is None
    runner.run(run_cell(real_rig, Cell(FAULTS[fault], recipe)))

"""Faults where the decode worker reads the prefill worker's memory: references travel, bytes do not.

What the memory itself must stand (torn reads, other people's descriptors) is in tests/integration/test_kv_mapped.py.
"""

from __future__ import annotations

import asyncio

import pytest
import tampers
from cells import RECIPES, SWEEP, Cell, run_cells
from faults import FAULTS, TYPICAL, Fault, ends, left_out
from kv_proxy import What
from members import WAIT_S
from recipes import Recipe, puller_pulling
from scenes import PREFILL_BLOCKS, SHORT_TOKENS, Rig, Scene
from scripted_router import Outcome, Request

ONLY_WITH_BYTES = frozenset(
    {
        "block_bit_flipped",
        "block_bit_always_flipped",
        "block_of_other_request_sealed",
        "block_without_checksum",
    }
)
"""Faults of payloads and their checksums: none travel here."""
STATES = TYPICAL | {"holder-awaited"} if SWEEP else frozenset({"holder-held", "puller-pulling"})
IN_SUITE = frozenset(
    {
        "abort",
        "abort_reaches_holder_only",
        "abort_reaches_puller_only",
        "router_gone",
        "kill_holder",
        "kill_puller",
        "stop_holder",
        "stop_puller",
        "block_truncated",
        "block_repeated",
        "blocks_swapped",
        "block_of_other_generation",
        "wrong_generation_said",
        "stream_cut",
        "end_too_early",
        "end_lost",
        "pull_of_wrong_epoch",
        "hello_of_another_life",
        "layout_mismatch_of_holder",
        "fingerprint_mismatch_of_puller",
        "reference_outside_of_memory",
    }
)
"""The sweep takes all."""


async def _finish(scene: Scene, recipe: Recipe) -> Outcome:
    return await scene.finish()


OUTSIDE = Fault(
    name="reference_outside_of_memory",
    strike=_finish,
    expect=ends("answer"),
    tamper=lambda: tampers.Change(What.BLOCK, tampers.outside_of_memory, first=1),
    needs=What.BLOCK,
)


@pytest.mark.parametrize("recipe", [r for r in RECIPES if r.name in STATES], ids=lambda recipe: recipe.name)
def test_every_fault_at(runner: asyncio.Runner, mapped_lanes: list[Rig], recipe: Recipe) -> None:
    """The matrix again, in some states."""
    faults = [f for f in (*FAULTS.values(), OUTSIDE) if not f.short and f.name not in ONLY_WITH_BYTES]
    faults = [f for f in faults if SWEEP or f.name in IN_SUITE]
    cells = [Cell(fault, recipe) for fault in faults if left_out(fault, recipe) is None]
    assert runner.run(run_cells(mapped_lanes, cells)) == len(cells) > 0


def test_memory_is_really_what_is_read(runner: asyncio.Runner, mapped_lanes: list[Rig]) -> None:
    async def story() -> None:
        rig = mapped_lanes[0]
        await rig.heal()
        before = (await rig.decode.status()).pulls_total["mapped"]
        await rig.normal_handoff()
        status = await rig.decode.status()
        assert status.pulls_total["mapped"] == before + 1
        assert status.pulls_total["grpc"] == 0

    runner.run(story())


def test_a_reference_to_blocks_that_others_have_now_is_refused(runner: asyncio.Runner, mapped_lanes: list[Rig]) -> None:
    """The ticket is ended while its references are on their way, and its blocks are handed to others: the generation in
    the memory tells the reader, which asks again and hears why it gets nothing.
    """

    async def story() -> None:
        rig = mapped_lanes[0]
        await rig.heal()
        scene = Scene(rig, tokens=SHORT_TOKENS, max_tokens=4, timeout_s=WAIT_S, tamper=None)
        await scene.open()
        await puller_pulling(scene)
        await scene.request.abort(scene.prefill_worker)
        await scene.prefill_worker.wait_clean()
        for _ in range(PREFILL_BLOCKS // 3 + 2):
            prompt = rig.prompt(SHORT_TOKENS)
            other = Request(rig.neighbor, rig.name(), rig.prefill, rig.decode, prompt, max_tokens=4)
            await other.prefill()
            await other.wait_first_token()
            await other.abort()
        outcome = await scene.finish()
        assert outcome.kind == "failed:aborted", outcome
        await scene.close()
        await rig.wait_clean()

    runner.run(story())


def test_a_mapping_survives_its_owner(runner: asyncio.Runner, mapped_lanes: list[Rig]) -> None:
    """kill -9 of the holder when all references have been sent: the reader still reads what was there."""

    async def story() -> None:
        rig = mapped_lanes[0]
        await rig.heal()
        scene = Scene(rig, tokens=SHORT_TOKENS, max_tokens=4, timeout_s=WAIT_S, tamper=None)
        await scene.open()
        await puller_pulling(scene)
        await scene.prefill_worker.kill()
        outcome = await scene.finish()
        assert (outcome.kind, outcome.tokens) == ("answer", rig.expected(scene.request)), outcome
        await scene.close()
        await rig.heal()
        await rig.wait_clean()
        await rig.normal_handoff()

    runner.run(story())

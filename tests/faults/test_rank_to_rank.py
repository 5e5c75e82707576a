"""Faults where KV goes from rank to rank (Gloo): references pass the proxy, and the session by which ranks meet; bytes
do not.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest
from cells import RECIPES, SWEEP, Cell, run_cells
from faults import FAULTS, HOLDER_LOST, TYPICAL, Fault, left_out
from recipes import Recipe
from scenes import Rig
from test_mapped import ONLY_WITH_BYTES

STATES = TYPICAL if SWEEP else frozenset({"puller-pulling"})
IN_SUITE = frozenset(
    {"abort", "kill_holder", "kill_puller", "stop_holder", "stop_puller", "stream_cut", "block_of_other_generation"}
)
"""The sweep takes all."""


def _still_needed(name: str, *kinds: str) -> Fault:
    """The fault, where a pull that is under way wants what the holder has not sent."""
    fault = FAULTS[name]
    return replace(fault, expect=lambda r: frozenset(kinds) if r.name == "puller-pulling" else fault.expect(r))


CHANGED = {
    fault.name: fault
    for fault in (
        _still_needed("kill_holder", *HOLDER_LOST),
        _still_needed("abort_reaches_holder_only", "failed:aborted", "refused:ABORTED"),
    )
}


@pytest.mark.parametrize("recipe", [r for r in RECIPES if r.name in STATES], ids=lambda recipe: recipe.name)
def test_every_fault_at(runner: asyncio.Runner, gloo_lanes: list[Rig], recipe: Recipe) -> None:
    """The matrix again, in some states."""
    faults = [f for f in (FAULTS | CHANGED).values() if not f.short and f.name not in ONLY_WITH_BYTES]
    faults = [f for f in faults if SWEEP or f.name in IN_SUITE]
    cells = [Cell(fault, recipe) for fault in faults if left_out(fault, recipe) is None]
    assert runner.run(run_cells(gloo_lanes, cells)) == len(cells) > 0


def test_ranks_are_really_what_hands_it_on(runner: asyncio.Runner, gloo_lanes: list[Rig]) -> None:
    async def story() -> None:
        (rig,) = gloo_lanes
        await rig.heal()
        before = (await rig.decode.status()).pulls_total["gloo"]
        await rig.normal_handoff()
        status = await rig.decode.status()
        assert status.pulls_total["gloo"] == before + 1
        assert status.pulls_total["grpc"] == 0

    runner.run(story())

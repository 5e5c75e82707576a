"""Faults where a process beside each worker moves its KV (`kv_mover: process`), and faults of that process.

The worker decides as ever; what is new is that bytes are written, and served, by somebody who may die alone.
"""

from __future__ import annotations

import asyncio
import os
import signal

import pytest
from cells import RECIPES, SWEEP, Cell, run_cells
from faults import FAULTS, Fault, ends, left_out
from members import WAIT_S, Member
from recipes import Recipe
from scenes import Rig, Scene
from scripted_router import Outcome

STOP_S = 0.3
STATES = frozenset({"holder-held", "puller-pulling"})
IN_SUITE = frozenset(
    {
        "abort",
        "abort_reaches_holder_only",
        "abort_reaches_puller_only",
        "block_bit_flipped",
        "block_truncated",
        "blocks_swapped",
        "end_too_early",
        "hello_of_another_life",
        "kill_holder",
        "kill_puller",
        "pull_of_wrong_epoch",
        "stop_holder",
        "stop_puller",
        "stream_cut",
        "wrong_generation_said",
    }
)
"""The sweep takes all."""


async def _mover_of(member: Member) -> int:
    pid = (await member.status()).kv_mover_pid
    assert pid, f"{member.worker_id} moves its KV itself"
    return pid


async def _kill(scene: Scene, member: Member) -> Outcome:
    """The worker goes with it, by itself."""
    os.kill(await _mover_of(member), signal.SIGKILL)
    await asyncio.wait_for(member.process.wait(), WAIT_S)
    return await scene.finish()


async def _stop(scene: Scene, member: Member) -> Outcome:
    pid = await _mover_of(member)
    os.kill(pid, signal.SIGSTOP)
    try:
        finished = asyncio.ensure_future(scene.finish())
        await asyncio.wait({finished}, timeout=STOP_S)
    finally:
        os.kill(pid, signal.SIGCONT)
    return await finished


async def kill_mover_of_holder(scene: Scene, recipe: Recipe) -> Outcome:
    return await _kill(scene, scene.prefill_worker)


async def kill_mover_of_puller(scene: Scene, recipe: Recipe) -> Outcome:
    return await _kill(scene, scene.decode_worker)


async def stop_mover_of_holder(scene: Scene, recipe: Recipe) -> Outcome:
    return await _stop(scene, scene.prefill_worker)


async def stop_mover_of_puller(scene: Scene, recipe: Recipe) -> Outcome:
    return await _stop(scene, scene.decode_worker)


OF_MOVERS = (
    Fault(
        name="kill_mover_of_holder",
        strike=kill_mover_of_holder,
        expect=FAULTS["kill_holder"].expect,
        kills=True,
        alone=False,
    ),
    Fault(
        name="kill_mover_of_puller",
        strike=kill_mover_of_puller,
        expect=FAULTS["kill_puller"].expect,
        kills=True,
        alone=False,
    ),
    Fault(name="stop_mover_of_holder", strike=stop_mover_of_holder, expect=ends("answer")),
    Fault(name="stop_mover_of_puller", strike=stop_mover_of_puller, expect=ends("answer")),
)


@pytest.mark.parametrize("recipe", [r for r in RECIPES if SWEEP or r.name in STATES], ids=lambda recipe: recipe.name)
def test_every_fault_at(runner: asyncio.Runner, moved_lanes: list[Rig], recipe: Recipe) -> None:
    """The matrix again, in some states, with faults of the process itself."""
    faults = [f for f in FAULTS.values() if not f.short and (SWEEP or f.name in IN_SUITE)]
    cells = [Cell(fault, recipe) for fault in (*faults, *OF_MOVERS) if left_out(fault, recipe) is None]
    assert runner.run(run_cells(moved_lanes, cells)) == len(cells) > 0

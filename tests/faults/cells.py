"""Which faults strike which states, and one such cell from beginning to end."""

from __future__ import annotations

import asyncio
import os
import time
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import grpc
import path_faults  # noqa: F401 - adds its rows
from faults import FAULTS, RULES, TYPICAL, Fault, left_out
from recipes import HOLDER, PULLER, Recipe
from scenes import Rig, Scene

SWEEP = bool(os.environ.get("TANDEM_FAULTS_SWEEP"))
"""Set: every fault in every state where it makes sense, as `make faults` runs it."""
REACH_TRIES = 3
"""A state that time itself ends may be over before a slow machine has reached it."""
STOOD_STILL_S = 0.1
"""On a machine that stands still for so long, what ends within a second may end before its turn."""
REACHED_LATE: list[str] = []
"""States and cells that took a second try, and what was seen of the first: told at the end, so that it can be looked
into.
"""


@dataclass(frozen=True, slots=True)
class Cell:
    """One fault in one state."""

    fault: Fault
    recipe: Recipe

    @property
    def name(self) -> str:
        return f"{self.recipe.name}-{self.fault.name}"

    @property
    def hurried(self) -> bool:
        return self.fault.short or self.fault.timeout_s(self.recipe) < 5


RECIPES: tuple[Recipe, ...] = (*HOLDER.values(), *PULLER.values())
ALL_CELLS = tuple(Cell(f, r) for r in RECIPES for f in FAULTS.values() if left_out(f, r) is None)
CELLS = tuple(c for c in ALL_CELLS if SWEEP or c.fault.everywhere or c.recipe.name in TYPICAL)


def summary() -> str:
    """What the tables come to."""
    left_out_cells = len(FAULTS) * len(RECIPES) - len(ALL_CELLS)
    return (
        f"handoff faults: {len(FAULTS)} faults at {len(RECIPES)} states, {len(CELLS)} cells of {len(ALL_CELLS)} "
        f"({left_out_cells} left out by {len(RULES)} rules)"
    )


def cells_at(recipe: Recipe, *, short: bool) -> list[Cell]:
    """The cells of one state that run now. `TANDEM_FAULTS_ONLY` names one fault, for looking into it."""
    only = os.environ.get("TANDEM_FAULTS_ONLY")
    return [c for c in CELLS if c.recipe is recipe and c.fault.short == short and only in (None, c.fault.name)]


def recipes_with(*, short: bool) -> list[Recipe]:
    """States of which some cell runs now."""
    return [recipe for recipe in RECIPES if cells_at(recipe, short=short)]


async def run_cells(lanes: Sequence[Rig], cells: Iterable[Cell]) -> int:
    """Runs the cells, each on whichever pair of workers is free, and says how many ran; raises all failures together,
    each with its cell's name.
    """
    waiting = deque(cells)
    failures: list[Exception] = []
    ran = 0

    async def run(rig: Rig) -> None:
        nonlocal ran
        while waiting:
            cell = waiting.popleft()
            ran += 1
            try:
                await run_cell(rig, cell)
            except Exception as error:
                error.add_note(f"cell: {cell.name}")
                failures.append(error)
        await rig.heal()
        await rig.prove()

    await asyncio.gather(*(run(rig) for rig in lanes))
    if failures:
        raise ExceptionGroup("what ended wrong", failures)
    return ran


async def run_cell(rig: Rig, cell: Cell) -> None:
    """Runs the cell; a hurried one again where the machine stood still meanwhile."""
    for tries_left in reversed(range(REACH_TRIES if cell.hurried else 1)):
        async with Pulse() as pulse:
            try:
                return await _run_cell(rig, cell)
            except Exception as error:
                if not tries_left or pulse.stood_still_s < STOOD_STILL_S:
                    raise
                REACHED_LATE.append(f"{cell.name}: the machine stood still for {pulse.stood_still_s:.2f} s; {error}")


class Pulse:
    """How long the machine stood still at the longest, as far as this event loop has seen."""

    PERIOD_S = 0.02

    def __init__(self) -> None:
        self.stood_still_s = 0.0

    async def __aenter__(self) -> Pulse:
        self._beats = asyncio.create_task(self._beat())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._beats.cancel()
        await asyncio.gather(self._beats, return_exceptions=True)

    async def _beat(self) -> None:
        while True:
            begun_s = time.monotonic()
            await asyncio.sleep(self.PERIOD_S)
            self.stood_still_s = max(self.stood_still_s, time.monotonic() - begun_s - self.PERIOD_S)


async def _run_cell(rig: Rig, cell: Cell) -> None:
    """Brings a handoff to the state, strikes, and looks at everything that must hold afterwards. Workers that did not
    come out of it clean are replaced, so that the next cell is not blamed.
    """
    try:
        await rig.heal()
        await _strike(rig, cell)
        await rig.heal()
        await rig.wait_clean()
        await rig.normal_handoff()
        await rig.wait_clean()
    except BaseException:
        await rig.end()
        raise


async def _strike(rig: Rig, cell: Cell) -> None:
    scene = await _reached(rig, cell)
    try:
        outcome = await cell.fault.strike(scene, cell.recipe)
        allowed = cell.fault.expect(cell.recipe)
        assert outcome.kind in allowed, f"ended with {outcome}, not with one of {sorted(allowed)}"
        if outcome.kind == "answer":
            assert outcome.tokens == rig.expected(scene.request), "a wrong answer"
        if outcome.kind in ("answer", "silence") and cell.fault.alone:
            await rig.wait_clean()
    finally:
        await scene.close()


async def _puller_of(scene: Scene) -> str:
    """How the decode worker says that its handoffs stand."""
    try:
        status = await scene.decode_worker.status()
    except grpc.aio.AioRpcError as error:
        return f"the decode worker says {error.code().name}"
    return f"puller {dict(status.puller_states)}, failed {dict(status.handoff_failures_total)}"


async def _reached(rig: Rig, cell: Cell) -> Scene:
    for tries_left in reversed(range(REACH_TRIES if cell.hurried else 2)):
        scene = Scene(
            rig,
            tokens=cell.recipe.tokens,
            max_tokens=cell.recipe.max_tokens,
            timeout_s=cell.fault.timeout_s(cell.recipe),
            tamper=cell.fault.tamper() if cell.fault.tamper else None,
        )
        await scene.open()
        try:
            await cell.recipe.reach(scene)
        except AssertionError as error:
            why = f"{error}; {await _puller_of(scene)}"
            await scene.close()
            if not tries_left:
                error.add_note(why)
                raise
            if not cell.hurried:
                REACHED_LATE.append(f"{cell.name}: {why}")
        except BaseException:
            await scene.close()
            raise
        else:
            break
    return scene

"""Every fault at every state of the handoff, on real processes.

Required each time: the right answer, or a clear error within the request's time; afterwards no block, lease, credit,
pull, sequence or handoff on any process that lives, a ledger that adds up, and a next request that is answered right.
"""

from __future__ import annotations

import asyncio

import pytest
from cells import ALL_CELLS, CELLS, RECIPES, Cell, run_cell
from faults import FAULTS, RULES, left_out
from recipes import HOLDER, PULLER
from scenes import Rig
from tandem.kvtransfer.protocol.holder_state import HolderState
from tandem.kvtransfer.protocol.puller import PullerState


def test_every_state_of_the_protocol_has_a_recipe() -> None:
    """The states are the machines' own: a new one fails here until somebody says how to reach it."""
    assert set(HOLDER) == set(HolderState)
    assert set(PULLER) == set(PullerState)


def test_cells_are_left_out_by_a_named_rule_only() -> None:
    """Every rule leaves something out, every fault strikes somewhere, and the rest is in the sweep."""
    reasons = [left_out(fault, recipe) for recipe in RECIPES for fault in FAULTS.values()]
    assert {reason for reason in reasons if reason} == set(RULES)
    assert {cell.fault.name for cell in CELLS} == set(FAULTS)
    assert len(ALL_CELLS) == reasons.count(None)


def cells(*, short: bool, kills: bool) -> list[object]:
    """Parameters: the cells of one kind, those of one state together."""
    kind = (short, kills)
    return [pytest.param(cell, id=cell.name) for cell in CELLS if (cell.fault.short, cell.fault.kills) == kind]


@pytest.mark.parametrize("cell", cells(short=False, kills=False))
def test_fault(runner: asyncio.Runner, rig: Rig, cell: Cell) -> None:
    runner.run(run_cell(rig, cell))


@pytest.mark.parametrize("cell", cells(short=True, kills=False))
def test_what_runs_out(runner: asyncio.Runner, short_rig: Rig, cell: Cell) -> None:
    runner.run(run_cell(short_rig, cell))


@pytest.mark.parametrize("cell", cells(short=False, kills=True))
def test_kill(runner: asyncio.Runner, rig: Rig, cell: Cell) -> None:
    """kill -9 of one side; what takes its place is another life of it."""
    runner.run(run_cell(rig, cell))

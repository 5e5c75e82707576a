"""Every fault at every state of the handoff, on real processes.

Required each time: the right answer, or a clear error within the request's time; afterwards no block, lease, credit,
pull, sequence or handoff on any process that lives, a ledger that adds up, and a next request that is answered right.
"""

from __future__ import annotations

import asyncio

import pytest
from cells import ALL_CELLS, CELLS, RECIPES, cells_at, recipes_with, run_cells
from faults import FAULTS, RULES, left_out
from recipes import HOLDER, PULLER, Recipe
from scenes import Rig
from tandem.kvtransfer.protocol.holder_state import HolderState
from tandem.kvtransfer.protocol.puller_state import PullerState


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


@pytest.mark.parametrize("recipe", recipes_with(short=False), ids=lambda recipe: recipe.name)
def test_every_fault_at(runner: asyncio.Runner, lanes: list[Rig], recipe: Recipe) -> None:
    """Whatever happens in this state. Who is killed is replaced by another life of the same name."""
    cells = cells_at(recipe, short=False)
    assert runner.run(run_cells(lanes, cells)) == len(cells)


@pytest.mark.parametrize("recipe", recipes_with(short=True), ids=lambda recipe: recipe.name)
def test_what_runs_out_at(runner: asyncio.Runner, short_lanes: list[Rig], recipe: Recipe) -> None:
    """The same where leases, credits and waits end soon, and must."""
    cells = cells_at(recipe, short=True)
    assert runner.run(run_cells(short_lanes, cells)) == len(cells)

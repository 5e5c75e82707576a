"""How long each part of a start took."""

from __future__ import annotations

import time

import pytest
from tandem.cluster.cli_serve import started
from tandem.cluster.launch import stages
from tandem.cluster.launch.stages import Stages, describe, process_age_s
from tandem.cluster.launch.state import MemberState, MemberView, Phase


def test_a_stage_that_comes_again_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(stages.time, "monotonic", lambda: now[0])
    watch = Stages(age_s=0.5)
    for stage, after_s in (("imports", 1.0), ("weights", 2.0), ("imports", 4.0), ("services", 8.0)):
        now[0] += after_s
        watch.enter(stage)
    now[0] += 16.0
    took = watch.end()
    assert took == {"process": 1.5, "imports": 2.0 + 8.0, "weights": 4.0, "services": 16.0}
    assert describe(took) == "31.5 s (process 1.5, imports 10.0, weights 4.0, services 16.0)"


def test_the_first_stage_began_with_the_process() -> None:
    age_s = process_age_s()
    time.sleep(0.02)
    assert 0 < age_s < process_age_s() < 3600


def test_serve_says_what_the_start_took() -> None:
    state = MemberState(phase=Phase.READY, started_s={"process": 1.0, "weights": 2.0})
    silent = MemberState(phase=Phase.READY)
    views = (MemberView(name="router", role="router", state=silent), MemberView(name="d", role="decode", state=state))
    assert started({"Ray": 3.0, "members": 4.0}, views) == (
        "up after 7.0 s (Ray 3.0, members 4.0)\n  d          3.0 s (process 1.0, weights 2.0)"
    )

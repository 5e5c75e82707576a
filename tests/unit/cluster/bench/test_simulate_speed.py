"""`tandem bench simulate`: every scene runs, twice alike, and the table tells of each."""

from __future__ import annotations

import pytest
from tandem.cluster.bench.simulate import SCENES, SimulateOptions, run_simulate, show


def test_every_scene_is_simulated_and_shown() -> None:
    said: list[str] = []
    result = run_simulate(SimulateOptions(requests=12, rounds=2), said.append)
    assert said == [scene.name for scene in SCENES] == [scene.name for scene in result.scenes]
    for scene in result.scenes:
        assert (scene.requests, len(scene.cpu_s)) == (12, 2)
        assert scene.decode_tokens > 100
        assert f"{scene.name:22} " in show(result)


def test_what_cannot_be_measured_is_refused() -> None:
    with pytest.raises(ValueError, match="rounds: 0 is not allowed; allowed: 1 to 100"):
        SimulateOptions(rounds=0)

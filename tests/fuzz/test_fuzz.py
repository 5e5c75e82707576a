"""Every parser on inputs made by hypothesis from its seeds, bounded; and again on everything that was ever a finding.

The long run, guided by coverage, is `make fuzz`.
"""

from __future__ import annotations

import random
from pathlib import Path

import mutate
import pytest
import run
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from targets import targets

HERE = Path(__file__).parent


TARGETS = targets()
SLOW = {"chat_template": 20, "gguf": 60, "yaml": 40, "http_wire": 60}
"""Examples of those that take milliseconds each; the others have EXAMPLES."""
EXAMPLES = 250


def feed(name: str, data: bytes) -> None:
    """Fails on anything but a return or an allowed error."""
    target = TARGETS[name]
    try:
        target.run(data)
    except target.allowed:
        return


@pytest.mark.parametrize("name", TARGETS)
def test_seeds_are_taken_and_noise_is_refused(name: str) -> None:
    target = TARGETS[name]
    for data in target.seeds:
        if name not in ("safetensors_index", "safetensors"):  # those name, or are, half a model
            target.run(data)
    for data in (b"", b"\x00", b"\xff" * 64, b"[" * 20_000, b"{" * 20_000, b"\x91" * 20_000):
        feed(name, data)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("name", TARGETS)
def test_only_the_errors_that_are_meant_come_out(name: str) -> None:
    @given(st.integers(0, 2**32), st.binary(max_size=64))
    @settings(
        max_examples=SLOW.get(name, EXAMPLES),
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    def check(seed: int, noise: bytes) -> None:
        feed(name, mutate.mutated(random.Random(seed), (*TARGETS[name].seeds, noise)))

    check()


@pytest.mark.parametrize("path", sorted(HERE.glob("corpus/*/*")), ids=lambda path: f"{path.parent.name}/{path.name}")
def test_what_was_found_once(path: Path) -> None:
    feed(path.parent.name, path.read_bytes())


def test_the_long_run_keeps_what_it_finds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What ends a process of the long run: here that end is caught."""
    trial = run.Trial(TARGETS["kv_layout"], tmp_path, "kv_layout")
    trial(b"\x00")  # refused, as it should be
    assert not list(tmp_path.iterdir())
    ended: list[int] = []
    monkeypatch.setattr(run.os, "_exit", ended.append)
    monkeypatch.setattr(run.signal, "alarm", lambda _: None)
    run.Trial(TARGETS["kv_layout"].__class__(lambda _: 1 // 0, (ValueError,), ()), tmp_path, "x")(b"found")
    assert ended == [77]
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"found"]

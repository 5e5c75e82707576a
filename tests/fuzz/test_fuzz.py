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
NOISE = (b"\x00", b"\xff" * 64, b"[" * 20_000, b"{" * 20_000, b"\x91" * 20_000)
ANSWERS = {"kv_message", "kv_sealed", "http_wire", "events"}
"""What refuses inside: by an answer, a record's error, or each of several decoders."""
TEXT = {"chat_template", "api_keys"}
"""Of which much noise is one."""


def refuses(name: str, data: bytes) -> bool:
    """Fails on anything but a return or an allowed error."""
    target = TARGETS[name]
    try:
        target.run(data)
    except target.allowed:
        return True
    return False


@pytest.mark.parametrize("name", TARGETS)
def test_seeds_are_taken_and_noise_is_refused(name: str) -> None:
    target = TARGETS[name]
    for data in target.seeds:
        if name not in ("safetensors_index", "safetensors"):  # those name, or are, half a model
            target.run(data)
    refuses(name, b"")
    refused = [refuses(name, data) for data in NOISE]
    assert name in ANSWERS or (any(refused) if name in TEXT else all(refused))


@pytest.mark.parametrize("name", ["kv_message", "kv_sealed"])
def test_a_message_between_workers_is_understood_by_some_decoder_and_noise_by_none(name: str) -> None:
    assert all(TARGETS[name].run(data) for data in TARGETS[name].seeds)
    assert not any(TARGETS[name].run(data) for data in NOISE)


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
        refuses(name, mutate.mutated(random.Random(seed), (*TARGETS[name].seeds, noise)))

    check()


@pytest.mark.parametrize("path", sorted(HERE.glob("corpus/*/*")), ids=lambda path: f"{path.parent.name}/{path.name}")
def test_what_was_found_once(path: Path) -> None:
    """Returned or refused: whatever else came out of it then is raised here."""
    refuses(path.parent.name, path.read_bytes())


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

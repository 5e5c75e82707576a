"""`tandem demo`: what is refused before a cluster starts, and a signal that comes just before the load listens."""

from __future__ import annotations

import asyncio
import io
import signal
from collections.abc import Callable
from typing import Any

import pytest
from tandem.cluster import cli, demo
from tandem.cluster.cli_display import Display
from tandem.cluster.launch.interrupts import Interrupts
from tandem.cluster.launch.state import Endpoints

ENDPOINTS = Endpoints(http="127.0.0.1:1", grpc="127.0.0.1:2", registries=("127.0.0.1:3",))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--request-rate", "0"], "--request-rate: 0.0 is not allowed; allowed: above 0"),
        (["--device", "tpu"], "--device: 'tpu' is not allowed; allowed: one of cpu, cuda, paced"),
    ],
)
def test_what_cannot_be_is_refused_first(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["demo", *arguments]) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith(f"tandem: {message}")
    assert shown.out == ""


def test_a_signal_just_before_the_load_listens_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    async def run_bench(options: Any, on_done: Callable[[object], None]) -> bool:
        """As the real one: a signal ends it, here after the first request."""
        ended = asyncio.Event()
        asyncio.get_running_loop().add_signal_handler(signal.SIGINT, ended.set)
        on_done(None)
        try:
            await asyncio.wait_for(ended.wait(), 60.0)
        finally:
            asyncio.get_running_loop().remove_signal_handler(signal.SIGINT)
        return True

    monkeypatch.setattr(demo, "run_bench", run_bench)
    options = demo.DemoOptions(model="m", device="paced", num_prompts=4, request_rate=1.0)
    with Interrupts() as interrupts:
        signal.raise_signal(signal.SIGINT)
        assert interrupts.first.is_set()
        assert demo._load(options, ENDPOINTS, Display(io.StringIO()), interrupts) is True  # type: ignore[comparison-overlap]

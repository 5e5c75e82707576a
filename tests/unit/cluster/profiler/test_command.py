"""`tandem profile` around its measuring: what is refused at the door, interrupted, drawn, told of transfers."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from tandem.cluster.bench.handoff_report import Cell, Handoff
from tandem.cluster.cli import run
from tandem.cluster.cli_display import Display
from tandem.cluster.cli_profile import Wanted, _measure_transfers
from tandem.cluster.config import EngineConfig
from tandem.cluster.latency.links import LinkTerms
from tandem.cluster.latency.measured import MeasuredProfile, MeasuredStep, MeasuredTransfer, Measurement
from tandem.cluster.latency.profile import DecodeTerms, StepProfile
from tandem.cluster.models.registry import CONFIGS
from tandem.cluster.profiler import live, transfers
from tandem.cluster.profiler.fit import fitted_profile
from tandem.cluster.profiler.points import Grid
from tandem.cluster.profiler.repeat import Disagreement, RepeatOptions, check_agreement
from tandem.cluster.profiler.show import others
from tandem.cluster.profiler.transfers import measure_transfers

TERMS = DecodeTerms(step_s=0.011, row_s=0.0035, context_token_s=4e-6)
TRUE = StepProfile(
    prefill_step_s=0.008,
    prefill_token_s=0.0029,
    decode=TERMS,
    large_decode=DecodeTerms(step_s=0.0, row_s=0.006, context_token_s=4e-6),
    large_batch_rows=16,
)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--prompt-lens", "some"], "--prompt-lens: 'some' is not allowed; allowed: numbers separated by commas"),
        (["--batch-sizes", "0"], "--batch-sizes: [0] is not allowed"),
        (["--budget-s", "0"], "--budget-s: 0 is not allowed"),
        (["--max-spread", "-1"], "--max-spread: -1 is not allowed"),
        (["--kv-cache", "much"], "--kv-cache: 'much' is not a size"),
        (["--device", "gpu"], "--device: 'gpu' is not allowed; allowed: one of cpu, cuda, paced"),
        (["--output", "nowhere/profile.json"], "--output: 'nowhere/profile.json' is not allowed; allowed: a file in a"),
        (["--output", "."], "--output: '.' is not allowed; allowed: a file in a folder that exists"),
        (
            ["--output", "/proc/a.json"],
            "--output: '/proc/a.json' is not allowed; allowed: a file in a folder that can be",
        ),
        (["--cpus", "0,65535"], "--cpus: [0, 65535] is not allowed; allowed: processors of this machine: "),
        (["--threads", "1024"], "--threads: 1024 is not allowed; allowed: 1 to "),
        (["--batch-sizes", ""], "--batch-sizes: [] is not allowed; allowed: at least one number"),
        (["--prompt-lens", "100000"], "--prompt-lens: [100000] is not allowed; allowed: below 512 tokens, the model's"),
        (["--save-plot", "fit.txt"], "--save-plot: 'fit.txt' is not allowed"),
        (["--model", "dummy:none"], "model 'none' is not known"),
        (["--kv-cache", "10KiB"], "points: 1 with a prompt are too few; allowed: at least 6; the model's context or"),
        (["--device", "paced", "--paced-profile", "nowhere.json"], "--paced-profile: 'nowhere.json' is not allowed"),
    ],
)
def test_wrong_input_is_named(
    options: list[str],
    named: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(["profile", "--model", "dummy:tiny-llama", *options]) == 2
    assert named in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_an_interrupt_leaves_the_old_profile_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(live, "measure_steps", interrupted)
    output = tmp_path / "profile.json"
    output.write_text("old")
    options = ["--model", "dummy:tiny-llama", "--device", "paced", "--no-transfers", "--output", str(output)]
    assert run(["profile", *options]) == 130
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"profile.json": "old"}


def test_transfers_count_from_the_end_of_prefill(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    async def handoffs(options: Any, on_cell: Any) -> None:
        asked.append(options)
        for transport in options.transports:
            for size in options.sizes_mib:
                moved = Handoff(stages_s={}, bytes=int(size * 2**20), reader_cpu_s=0.0, exposed_s=size, memcpy_s=0.0)
                on_cell(Cell(transport=transport, size_mib=size, handoffs=(moved, moved)))

    monkeypatch.setattr(transfers, "run_handoffs", handoffs)
    told: list[float] = []
    found = asyncio.run(measure_transfers(256, sizes_mib=(1, 2, 4), on_progress=lambda _, share: told.append(share)))
    assert list(found) == [f"{name} {size} MiB" for name in ("mapped", "grpc") for size in (1, 2, 4)]
    assert found["grpc 2 MiB"] == MeasuredTransfer(link="grpc", size_bytes=2**21, times_s=(2.0, 2.0))
    assert told == pytest.approx([number / 6 for number in range(7)])
    assert asked[0].token_bytes == 4096, "a tiny model's KV would be a prompt of millions"


def test_transfers_that_take_too_long_end(monkeypatch: pytest.MonkeyPatch) -> None:
    async def forever(*_: Any) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr(transfers, "run_handoffs", forever)
    with pytest.raises(TimeoutError):
        asyncio.run(measure_transfers(23040, timeout_s=0.01))


def measured() -> MeasuredProfile:
    steps, moved = {}, {}
    for point in Grid().points():
        prefill, squares, rows, context = point.sizes
        times = tuple(TRUE.step_time_s(*point.sizes) * factor for factor in (0.97, 1.0, 1.04))
        steps[point.name] = MeasuredStep(
            prefill_tokens=prefill, prefill_squares=squares, decode_rows=rows, context_tokens=context, times_s=times
        )
    link = LinkTerms(bandwidth_gb_s=2.0, latency_us=900).named("mapped")
    for size in (2**20, 2**22, 2**24):
        moved[str(size)] = MeasuredTransfer(link="mapped", size_bytes=size, times_s=(link.transfer_time_s(size),) * 2)
    return fitted_profile(
        Measurement(
            model="smollm2-135m",
            model_config=CONFIGS["smollm2-135m"],
            device="cpu",
            dtype="bfloat16",
            block_size=16,
            kv_token_bytes=23040,
            machine="a CPU",
            steps=steps,
            transfers=moved,
        )
    )


def test_a_fit_says_what_it_is_of() -> None:
    profile = measured()
    assert profile.steps.source == "tandem profile: smollm2-135m, bfloat16, cpu, 1 thread; a CPU"
    assert profile.steps.large_batch_rows == 16
    assert set(profile.measured.held_out) == {"all steps", "prefill", "decode", "mixed", "transfer mapped"}
    assert profile.links["mapped"].bandwidth_gb_s == pytest.approx(2.0)


def test_a_summary_has_terms_errors_links_and_what_is_missing() -> None:
    from tandem.cluster.profiler.show import summary

    profile = measured()
    lines = summary(profile).splitlines()
    starts = (
        "prompts",
        "decode",
        "16+ rows",
        "engine",
        "mapped",
        "error",
        "all steps",
        "decode",
        "mixed",
        "prefill",
    )
    assert [line[:12].strip() for line in lines[:-1]] == [start.ljust(12)[:12].strip() for start in starts]
    assert lines[-1].startswith("transfer mapped")


def test_a_fit_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from tandem.cluster.profiler.plot import plot_profile

    plot_profile(measured(), tmp_path / "fit.png")
    assert (tmp_path / "fit.png").read_bytes().startswith(b"\x89PNG")


def test_transfers_that_disagree_are_measured_once_more_and_all_times_count(monkeypatch: pytest.MonkeyPatch) -> None:
    rounds: list[tuple[float, ...]] = []

    async def measured(*_: Any, **__: Any) -> dict[str, MeasuredTransfer]:
        return {"mapped 1 MiB": MeasuredTransfer(link="mapped", size_bytes=2**20, times_s=rounds.pop(0))}

    monkeypatch.setattr(transfers, "measure_transfers", measured)
    rounds[:] = [(0.1, 0.1, 0.3, 0.3), (0.1,) * 9]
    found = asyncio.run(transfers.agreeing_transfers(23040, 0.5))
    assert found["mapped 1 MiB"].times_s == (0.1, 0.1, 0.3, 0.3, *(0.1,) * 9)
    rounds[:] = [(0.1,) * 4, (9.9,)]
    assert asyncio.run(transfers.agreeing_transfers(23040, 0.5))["mapped 1 MiB"].times_s == (0.1,) * 4
    rounds[:] = [(0.1, 0.1, 0.3, 0.3), (0.1, 0.3)]
    with pytest.raises(Disagreement, match=r"mapped 1 MiB \(100%\); .* larger --max-transfer-spread"):
        asyncio.run(transfers.agreeing_transfers(23040, 0.5))
    rounds[:] = [(0.1, 0.1, 0.3, 0.3), (9.9,)]
    with pytest.raises(Disagreement):
        asyncio.run(transfers.agreeing_transfers(23040, 0.5, timeout_s=0.0))
    assert rounds == [(9.9,)], "there was no time for a second round"
    rounds[:] = [(0.005, 0.005, 0.009, 0.009)]
    assert asyncio.run(transfers.agreeing_transfers(23040, 0.5)), "a few milliseconds are not noticed"


def test_what_others_did_meanwhile_is_told(tmp_path: Path) -> None:
    assert others(0.05) == ""
    assert others(0.43) == "others used 43% of the machine's processors meanwhile"
    with pytest.raises(Disagreement, match=r"a \(100%\); others used 43% .* meanwhile; measure on a quieter machine"):
        check_agreement({"a": (1.0, 1.0, 3.0, 3.0)}, 0.15, why=others(0.43))


def test_transfers_are_judged_apart_and_kept(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wanted = Wanted(
        config=EngineConfig(model="dummy:tiny-llama"),
        grid=Grid(),
        repeat=RepeatOptions(budget_s=200.0),
        transfers=True,
        max_transfer_spread=0.5,
        output=Path("profile.json"),
        plot=None,
    )
    unsteady = {"mapped 1 MiB": MeasuredTransfer(link="mapped", size_bytes=2**20, times_s=(0.1, 0.1, 0.3, 0.3))}

    async def disagree(*_: Any, **__: Any) -> None:
        raise transfers.TransfersDisagree("they disagree", unsteady)

    async def late(*_: Any, **__: Any) -> None:
        raise TimeoutError

    doubts: list[str] = []
    monkeypatch.setattr(transfers, "agreeing_transfers", disagree)
    assert _measure_transfers(wanted, 23040, Display(), doubts) == unsteady
    monkeypatch.setattr(transfers, "agreeing_transfers", late)
    assert _measure_transfers(wanted, 23040, Display(), doubts) == {}
    late_text = "transfers: they were not done after 80 s of --budget-s 200; allow more, or --no-transfers"
    assert doubts == ["transfers: they disagree", late_text]
    assert capsys.readouterr().out.splitlines() == doubts, "at once, before steps are measured"

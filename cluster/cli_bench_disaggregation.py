"""`tandem bench disaggregation`: prefill and decode pools against the same devices colocated, under the same load."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .cli_bench_claims import Dataset, Profile, SaveResult, Seed, numbers, save

if TYPE_CHECKING:
    from .bench.claims_cluster import System
    from .bench.claims_disaggregation import SystemResult
    from .bench.claims_load import Promise, Staircase
    from .cli_display import Display

PARALLEL = (1, 2, 4)
Rates = Annotated[str, typer.Option(help="Requests/s to all of them, ascending. Default: by the device.")]
Device = Annotated[str, typer.Option(help="paced: A100s in make-believe; cpu: the real engine.")]
Gpus = Annotated[int, typer.Option(help="Devices of each system; on cpu: workers.")]
Prefill = Annotated[int | None, typer.Option(help="Prefill workers. Default: half of the devices.")]
PrefillTP = Annotated[int, typer.Option(help="Tensor parallelism of the prefill workers: 1, 2 or 4.")]
DecodeTP = Annotated[int, typer.Option(help="Of the decode workers.")]
Settle = Annotated[float, typer.Option(help="Seconds of a rate that come before and are not judged.")]
Guard = Annotated[float, typer.Option(help="Seconds that come after; their answers run under the next rate.")]
Promises = Annotated[list[str] | None, typer.Option(help="TTFT:TPOT in ms; may be given again.")]
Chunk = Annotated[str, typer.Option(help="Of the mixed workers: tokens, alone, or the best in virtual time.")]
Versus = Annotated[str | None, typer.Option(metavar="FILE", help="Also colocated with another DistServe profile.")]
Only = Annotated[str | None, typer.Option(help="Systems whose label contains this.")]
TimeScale = Annotated[float, typer.Option(help="Everything takes so many times as long, for a slow machine.")]
Seeds = Annotated[int, typer.Option(help="Runs of each system, as far as the time allows.")]
Minutes = Annotated[float, typer.Option(help="No run starts that would not end by then.")]
Results = Annotated[str | None, typer.Option(metavar="FILE", help="Keep each run here; what it has is not run again.")]
Virtual = Annotated[bool, typer.Option("--virtual", help="No processes: predict every placement, in virtual time.")]
Model = Annotated[str, typer.Option(help="cpu: which one.")]
MaxInput = Annotated[int | None, typer.Option(help="Clips prompts; cpu: 512.")]
MaxOutput = Annotated[int | None, typer.Option(help="Clips answers; cpu: 128.")]
SavePlot = Annotated[str | None, typer.Option(metavar="FILE", help="Draw the curves.")]


def disaggregation(
    context: typer.Context,
    dataset_path: Dataset,
    profile: Profile = None,
    device: Device = "paced",
    gpus: Gpus = 2,
    prefill: Prefill = None,
    prefill_tp: PrefillTP = 1,
    decode_tp: DecodeTP = 1,
    chunk: Chunk = "best",
    versus_profile: Versus = None,
    rates: Rates = "",
    stair_s: Annotated[float, typer.Option(help="Judged seconds of each rate; longer is surer.")] = 40.0,
    settle_s: Settle = 8.0,
    guard_s: Guard = 8.0,
    promise: Promises = None,
    only: Only = None,
    time_scale: TimeScale = 1.0,
    seeds: Seeds = 1,
    max_minutes: Minutes = 30.0,
    results: Results = None,
    virtual: Virtual = False,
    model: Model = "smollm2-135m",
    max_input_len: MaxInput = None,
    max_output_len: MaxOutput = None,
    seed: Seed = 0,
    save_plot: SavePlot = None,
    save_result: SaveResult = None,
) -> None:
    """Attainment against rate: separate pools and colocation.

    The same devices under the same load.
    """
    import tempfile

    from .cli_display import Display

    given = dict(context.params)
    _check(given)
    display = Display()
    load = _load(given)
    with tempfile.TemporaryDirectory(prefix="tandem-claims-") as folder:
        if virtual:
            _predict_all(display, load, given, Path(folder))
            return
        systems = _systems(display, load, given, Path(folder))
        chosen = [system for system in systems if only is None or only in system.label]
        if not chosen:
            raise ValueError(f"only: {only!r} is in no label; there are {', '.join(s.label for s in systems)}")
        _run(display, chosen, load, given)


def _check(given: Mapping[str, Any]) -> None:
    """ValueError naming the option."""
    if given["device"] not in ("paced", "cpu"):
        raise ValueError(f"device: {given['device']!r} is not allowed; allowed: paced, cpu")
    if given["device"] == "paced" and given["profile"] is None:
        raise ValueError("profile: is missing; allowed: DistServe's profiler-a100-80g.distserve.json")
    if given["device"] == "cpu" and given["virtual"]:
        raise ValueError("virtual: is not allowed with device cpu; allowed: paced, which has a profile")
    for name in ("prefill_tp", "decode_tp"):
        if given[name] not in PARALLEL:
            raise ValueError(f"{name}: {given[name]} is not allowed; allowed: 1, 2, 4")
    for name, low in (("gpus", 2), ("seeds", 1)):
        if given[name] < low:
            raise ValueError(f"{name}: {given[name]} is not allowed; allowed: at least {low}")
    if not given["max_minutes"] > 0:
        raise ValueError(f"max_minutes: {given['max_minutes']} is not allowed; allowed: above 0")
    if given["chunk"] not in ("best", "alone") and not (given["chunk"].isdecimal() and int(given["chunk"]) >= 256):
        raise ValueError(f"chunk: {given['chunk']!r} is not allowed; allowed: best, alone, tokens from 256 on")


def _load(given: Mapping[str, Any]) -> Staircase:
    from .bench.claims_load import Staircase

    paced = given["device"] == "paced"
    defaults = [1.0, 1.5, 2.0, 2.5, 3.0] if paced else [0.25, 0.5, 1.0, 2.0, 3.0]
    if given["virtual"]:
        defaults = [0.5, *defaults]
    everywhere = ["250:100", "400:50", "1000:100", "1000:50", "1000:40", "2000:40", "2000:35"]
    promises = given["promise"] or (
        ["1500:100"] if not paced else everywhere if given["virtual"] else ["250:100", "1000:40"]
    )
    return Staircase(
        dataset_path=given["dataset_path"],
        rates=numbers("rates", given["rates"]) if given["rates"] else tuple(rate * given["gpus"] for rate in defaults),
        stair_s=given["stair_s"],
        settle_s=given["settle_s"],
        guard_s=given["guard_s"],
        promises=_promises(promises),
        time_scale=given["time_scale"] if paced else 1.0,
        max_model_len=2048,
        max_input_tokens=given["max_input_len"] or (None if paced else 512),
        max_output_tokens=given["max_output_len"] or (None if paced else 128),
        seed=given["seed"],
    )


def _profiles(file: str, scale: float, folder: Path) -> dict[int, str | Path]:
    """Writes the step profiles that workers read, by tensor parallelism."""
    from .bench.claims_systems import DISTSERVE_MODEL
    from .latency.profile import distserve_profile

    found: dict[int, str | Path] = {}
    for parallel in PARALLEL:
        path = folder / f"{Path(file).stem}-tp{parallel}.json"
        distserve_profile(file, DISTSERVE_MODEL, tensor_parallel=parallel).scaled(scale).save(path)
        found[parallel] = path
    return found


def _systems(display: Display, load: Staircase, given: Mapping[str, Any], folder: Path) -> Sequence[System]:
    """The split and what it is compared with."""
    from .bench.claims_systems import KV_TOKENS, colocated, cpu_systems, split, token_bytes

    gpus, chunk = given["gpus"], given["chunk"]
    if given["device"] == "cpu":
        budget = int(chunk) if chunk.isdecimal() else 512
        return cpu_systems(given["model"], gpus, kv_cache_bytes=512 * 2**20, budget=budget)
    display.line("paced: nothing is computed, steps take the time that a profile of A100s says")
    memory = f"{KV_TOKENS[1]} tokens x {token_bytes()} bytes = {KV_TOKENS[1] * token_bytes() / 1e9:.1f} GB"
    display.line(f"KV memory of a GPU: {memory}")
    profiles = _profiles(given["profile"], load.time_scale, folder)
    pools = split(
        gpus, profiles, prefill=given["prefill"], prefill_tp=given["prefill_tp"], decode_tp=given["decode_tp"]
    )
    if chunk == "best":
        mixed = _best_colocated(display, load, gpus, profiles)
    else:
        mixed = colocated(gpus, profiles, budget=int(chunk) if chunk.isdecimal() else None)
    systems = [pools, mixed]
    if (versus := given["versus_profile"]) is not None:
        theirs = _profiles(versus, load.time_scale, folder)
        name = Path(versus).stem.rpartition(".")[2]
        systems.append(colocated(gpus, theirs, budget=None, source=f" ({name} profile)"))
    return systems


def _best_colocated(display: Display, load: Staircase, gpus: int, profiles: Mapping[int, str | Path]) -> System:
    """The way to colocate on workers of one GPU with the highest goodput in virtual time under the first promise."""
    from .bench.claims_disaggregation import goodput_of
    from .bench.claims_predict import predict
    from .bench.claims_systems import CHUNK_BUDGETS, colocated

    tried = [colocated(gpus, profiles, budget=budget) for budget in (*CHUNK_BUDGETS, None)]
    found = []
    for system in tried:
        sweep = predict(system, load)[0]
        attained = sum(point.attainment for point in sweep.points)
        found.append((goodput_of(sweep, gpus).per_gpu, attained))
        display.line(f"in virtual time, {system.label}: {goodput_of(sweep, gpus)} requests/s per GPU")
    return tried[max(range(len(tried)), key=lambda place: found[place])]


def _predict_all(display: Display, load: Staircase, given: Mapping[str, Any], folder: Path) -> None:
    from .bench.claims_predict import predict
    from .bench.claims_show import show_predictions
    from .bench.claims_systems import candidates, colocated

    gpus = given["gpus"]
    systems = list(candidates(gpus, _profiles(given["profile"], load.time_scale, folder)))
    if (versus := given["versus_profile"]) is not None:
        theirs = _profiles(versus, load.time_scale, folder)
        systems.append(
            colocated(gpus, theirs, budget=None, source=f" ({Path(versus).stem.rpartition('.')[2]} profile)")
        )
    chosen = [system for system in systems if given["only"] is None or given["only"] in system.label]
    rows = []
    with display.count("systems", len(chosen)) as advance:
        for system in chosen:
            rows.append((system.label, system.gpus, predict(system, load)))
            advance()
    display.line(show_predictions(rows, load))
    found = [
        {"system": label, "gpus": gpus, "sweeps": [one.as_json() for one in sweeps]} for label, gpus, sweeps in rows
    ]
    save(display, given["save_result"], {"virtual": True, "systems": found})


def _run(display: Display, systems: Sequence[System], load: Staircase, given: Mapping[str, Any]) -> None:
    import signal
    import sys
    import time

    import uvloop

    from .bench.claims_disaggregation import Kept, as_json, compare, result_of
    from .bench.claims_predict import predict
    from .bench.claims_show import show
    from .bench.plots import check_plot

    if given["save_plot"] is not None:
        check_plot(given["save_plot"])
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that no process is left behind
    end_s = time.monotonic() + 60 * given["max_minutes"]
    kept = Kept(path=Path(given["results"]) if given["results"] is not None else None)
    predicted = [predict(system, load) if given["device"] == "paced" else () for system in systems]
    attempts = uvloop.run(compare(systems, load, seeds=given["seeds"], kept=kept, end_s=end_s, say=display.line))
    found = [result_of(*one) for one in zip(systems, [load] * len(systems), attempts, predicted, strict=True)]
    display.line(show(found, load))
    save(display, given["save_result"], as_json(found, load, {"options": dict(given)}))
    if given["save_plot"] is not None:
        _draw(display, found, load, Path(given["save_plot"]))
    if not all(result.sweep(0).points for result in found):
        raise typer.Exit(1)


def _draw(display: Display, results: Sequence[SystemResult], load: Staircase, file: Path) -> None:
    """A picture for each promise: what was measured, beside what virtual time predicted."""
    from dataclasses import replace

    from .bench.plots import plot_sweeps

    for place, promise in enumerate(load.promises):
        name = file if place == 0 else file.with_stem(f"{file.stem}-{place + 1}")
        sweeps = [sweep for result in results if (sweep := result.sweep(place)).points]
        sweeps += [
            replace(one, label=f"virtual: {one.label}") for r in results for one in r.predicted[place : place + 1]
        ]
        if not sweeps:
            display.line(f"not drawn   {name}: no stair counts")
            continue
        plot_sweeps(sweeps, name, title=f"{promise}")
        display.line(f"drawn       {name}")


def _promises(texts: Sequence[str]) -> tuple[Promise, ...]:
    from .bench.claims_load import Promise

    found = []
    for text in texts:
        try:
            ttft_ms, tpot_ms = (float(part) for part in text.split(":"))
        except ValueError:
            ttft_ms = tpot_ms = 0.0
        if not (0 < ttft_ms < 1e7 and 0 < tpot_ms < 1e7):
            raise ValueError(f"promise: {text!r} is not allowed; allowed: TTFT:TPOT in milliseconds, above 0")
        found.append(Promise(ttft_s=ttft_ms / 1e3, tpot_s=tpot_ms / 1e3))
    return tuple(found)

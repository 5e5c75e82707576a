"""`tandem bench validate`: what the simulator predicts of a cluster, beside what real processes then do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .cli_bench_claims import Dataset, SaveResult, Seed, numbers, save

if TYPE_CHECKING:
    from contextlib import ExitStack

    from .bench.claims_load import Staircase
    from .bench.validate import Look, Trial
    from .bench.validate_predict import Overheads, Subject
    from .cli_display import Display

PACED_PLANS, CPU_PLANS = "1P+1D,2M,2P+1D,1P+2D", "1P+1D,2M"
PACED_PROMISE, CPU_PROMISE = "400:100", "2000:150"
CPU_KV_BYTES = 512 * 2**20
CPU_MAX_INPUT, CPU_MAX_OUTPUT = 512, 128
Profile = Annotated[
    str | None,
    typer.Option(
        metavar="FILE",
        help="Step profile: of `tandem profile`, or DistServe's. Default, paced: an A100's, from its hardware file.",
    ),
]
Device = Annotated[str, typer.Option(help="paced: steps take what the profile says; cpu: the real engine.")]
Plans = Annotated[str, typer.Option(help=f"Clusters, e.g. {PACED_PLANS}; 2M/512: mixed, chunks of 512 tokens.")]
Config = Annotated[
    list[str] | None,
    typer.Option(metavar="FILE", help="Instead of --plans: files of `tandem plan`; may be given again."),
]
Rates = Annotated[str, typer.Option(help="Requests/s per worker, ascending. Default: --shares of what it can serve.")]
Shares = Annotated[str, typer.Option(help="Rates, as shares of the one at which 90 % attain in virtual time.")]
Promise = Annotated[str, typer.Option(help="TTFT:TPOT in ms. Default: by the device.")]
Stair = Annotated[float, typer.Option(help="Judged seconds of each rate.")]
Settle = Annotated[float, typer.Option(help="Seconds of a rate that come before and are not judged.")]
Guard = Annotated[float, typer.Option(help="Seconds that come after; their answers run under the next rate.")]
TimeScale = Annotated[float, typer.Option(help="paced: everything takes so many times as long, for a busy machine.")]
Seeds = Annotated[int, typer.Option(help="Runs of each cluster, as far as the time allows.")]
Minutes = Annotated[float, typer.Option(help="No run starts that would not end by then.")]
Results = Annotated[
    str | None,
    typer.Option(
        metavar="FILE",
        help="Keep each run here, and the machine's constants beside it; what it has is not measured again.",
    ),
]
Model = Annotated[str, typer.Option(help="cpu: which one.")]


def validate(
    context: typer.Context,
    dataset_path: Dataset,
    profile: Profile = None,
    device: Device = "paced",
    plans: Plans = "",
    config: Config = None,
    rates: Rates = "",
    shares: Shares = "0.4,0.7,0.9",
    promise: Promise = "",
    stair_s: Stair = 16.0,
    settle_s: Settle = 4.0,
    guard_s: Guard = 4.0,
    time_scale: TimeScale = 1.0,
    seeds: Seeds = 1,
    max_minutes: Minutes = 10.0,
    results: Results = None,
    model: Model = "smollm2-135m",
    seed: Seed = 0,
    save_result: SaveResult = None,
) -> None:
    """Predicted beside measured, of real processes here.

    Attainment, TTFT and TPOT of clusters of this machine.
    """
    run_validation(dict(context.params))


def run_validation(given: Mapping[str, Any]) -> None:
    """The command with its options by name. ValueError naming the one that is wrong."""
    import signal
    import sys
    import tempfile
    import time
    from contextlib import ExitStack

    from .cli_display import Display

    _check(given)
    end_s = time.monotonic() + 60 * given["max_minutes"]
    display = Display()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that no process is left behind
    with tempfile.TemporaryDirectory(prefix="tandem-validate-") as folder, ExitStack() as stack:
        subjects = _subjects(display, given, Path(folder))
        look = _look(display, subjects[0], given, stack) if given["device"] == "cpu" else None
        overheads = _overheads(display, _quick(Path(folder)), given, None if look is None else subjects[0])
        trials = [_trial(display, subject, given) for subject in subjects]
        run_trials(display, trials, overheads, given, end_s, look)


def run_trials(
    display: Display,
    trials: Sequence[Trial],
    overheads: Overheads,
    given: Mapping[str, Any],
    end_s: float,
    look: Look | None = None,
) -> None:
    """Runs them, prints the table and saves it: of what there is by then, where it is interrupted. `given`: the
    command's options; `look`: at the machine's pace, of engines that compute. Exits with 1 where nothing was measured.
    """
    import time

    import uvloop

    from .bench.claims_disaggregation import Kept
    from .bench.validate import Row, Validation
    from .bench.validate import validate as measure
    from .bench.validate_show import show, show_rows

    kept = Kept(path=Path(given["results"]) if given["results"] is not None else None)
    rows: dict[int, Sequence[Row]] = {}
    begin_s = time.monotonic()

    def on_rows(number: int, own: Sequence[Row]) -> None:
        rows[number] = own
        display.line(show_rows(own))

    work = measure(
        trials,
        overheads,
        seeds=given["seeds"],
        kept=kept,
        end_s=end_s,
        say=display.line,
        on_rows=on_rows,
        look=look,
    )
    try:
        uvloop.run(work)
    finally:
        found = Validation(overheads=overheads, rows=tuple(row for own in rows.values() for row in own))
        display.line(f"\n{show(found)}\nmeasured for {time.monotonic() - begin_s:.0f} s, {_asked(given)}")
        facts = {"options": {name: str(value) for name, value in given.items()}}
        save(display, given["save_result"], found.as_json(facts))
    if not any(row.measured for row in found.rows):
        raise typer.Exit(1)


def _asked(given: Mapping[str, Any]) -> str:
    """What a reader of the table must know of the load."""
    scale = f", {given['time_scale']:g} times as slow" if given.get("time_scale", 1.0) != 1.0 else ""
    stair = f"stairs of {given['settle_s']:g} + {given['stair_s']:g} + {given['guard_s']:g} s{scale}"
    return f"{stair}, lengths of {Path(given['dataset_path']).name}"


def _check(given: Mapping[str, Any]) -> None:
    """ValueError naming the option."""
    if given["device"] not in ("paced", "cpu"):
        raise ValueError(f"device: {given['device']!r} is not allowed; allowed: paced, cpu")
    if given["device"] == "cpu" and given["profile"] is None:
        raise ValueError("profile: is missing; allowed: the file that `tandem profile` wrote of this machine")
    if given["seeds"] < 1:
        raise ValueError(f"seeds: {given['seeds']} is not allowed; allowed: at least 1")
    if not 0 < given["max_minutes"] <= 600:
        raise ValueError(f"max_minutes: {given['max_minutes']} is not allowed; allowed: above 0, at most 600")


def _subjects(display: Display, given: Mapping[str, Any], folder: Path) -> list[Subject]:
    """The clusters."""
    from .bench.validate_subjects import cpu_subject, paced_subject

    if given["config"]:
        return _configured(given, folder)
    names = (given["plans"] or (PACED_PLANS if given["device"] == "paced" else CPU_PLANS)).split(",")
    if given["device"] == "cpu":
        sizes = {"kv_cache_bytes": CPU_KV_BYTES, "max_model_len": CPU_MAX_INPUT + CPU_MAX_OUTPUT}
        return [cpu_subject(text, given["model"], given["profile"], **sizes) for text in names]
    display.line("paced: nothing is computed, steps take the time that a profile says")
    steps = folder / "steps.json"
    _profile(display, given, steps)
    return [paced_subject(text, steps) for text in names]


def _configured(given: Mapping[str, Any], folder: Path) -> list[Subject]:
    """The clusters of files, all of one device."""
    from .bench.validate_subjects import config_subject
    from .config_file import load_config

    scale = given["time_scale"] if given["device"] == "paced" else 1.0
    found = []
    for place, path in enumerate(given["config"]):
        config, label = load_config(path), f"{Path(path).stem}-{place}"
        if config.engine.device != given["device"]:
            raise ValueError(f"config: {path} is for device {config.engine.device}; --device {given['device']} is not")
        found.append(config_subject(config, label, time_scale=scale, folder=folder, profile=given["profile"]))
    return found


def _quick(folder: Path) -> Subject:
    """The cluster that is asked for what processes add to it."""
    from .bench.validate_subjects import QUICK_PROFILE, paced_subject

    QUICK_PROFILE.save(folder / "quick.json")
    return paced_subject("1P+1D", folder / "quick.json")


def _profile(display: Display, given: Mapping[str, Any], path: Path) -> None:
    """Writes the step profile that paced workers read."""
    from .bench.claims_systems import DISTSERVE_MODEL, MODEL
    from .latency.hardware import load_hardware
    from .latency.model_facts import model_facts
    from .latency.profile import distserve_profile, read_json, read_profile
    from .latency.profile_fit import profile_of
    from .latency.roofline import Roofline

    file = given["profile"]
    if file is None:
        hardware = load_hardware("a100-80g")
        profile, _ = profile_of(Roofline(model_facts(MODEL), hardware), source=f"roofline: {MODEL} on {hardware.name}")
    elif DISTSERVE_MODEL in read_json(file):
        profile = distserve_profile(file, DISTSERVE_MODEL)
    else:
        profile = read_profile(file)
    display.line(f"steps: {profile.source or file}, {given['time_scale']:g} times as long")
    profile.scaled(given["time_scale"]).save(path)


def _look(display: Display, subject: Subject, given: Mapping[str, Any], stack: ExitStack) -> Look:
    """How an engine alone is timed between runs; it ends with `stack`. ValueError where the
    profile holds no times, or is of another engine.
    """
    from .bench.validate_pace import IdleEngine, check_same
    from .latency.measured import read_measured
    from .launch.compose import build_device
    from .models.reference import resolve_model

    engine = subject.system.engine
    files, profile = resolve_model(engine.model), read_measured(given["profile"])
    check_same(profile.measured, engine, files.config)
    display.line("an engine of this process is timed before and after each run: how fast is the machine now?")
    return stack.enter_context(IdleEngine(engine, profile, lambda config: build_device(config, files, None))).look


def _overheads(display: Display, quick: Subject, given: Mapping[str, Any], computes: Subject | None) -> Overheads:
    """The machine's constants: those with which kept runs were predicted, or measured now. ValueError."""
    import uvloop

    from .bench.validate import measure_overheads
    from .bench.validate_calibrate import keep_overheads, kept_overheads
    from .bench.validate_show import show_overheads

    path = None if given["results"] is None else Path(f"{given['results']}.constants")
    found = None if path is None else kept_overheads(path, given["device"])
    if found is not None:
        display.line(f"{show_overheads(found)} (kept in {path})")
        return found
    found = uvloop.run(measure_overheads(quick, computes))
    display.line(show_overheads(found))
    if path is not None:
        keep_overheads(path, given["device"], found)
    return found


def _trial(display: Display, subject: Subject, given: Mapping[str, Any]) -> Trial:
    """The cluster with the rates that it climbs."""
    from dataclasses import replace

    from .bench.validate import Trial, saturation
    from .bench.validate_predict import NONE

    load = _load(given)
    if given["rates"]:
        rates = tuple(rate * subject.system.workers for rate in numbers("rates", given["rates"]))
        return Trial(subject=subject, load=replace(load, rates=rates))
    # Without the overheads, which differ from one start to the next: runs that are kept have the same rates again.
    most = saturation(subject, load, NONE, start=float(subject.system.workers))
    if not most:
        raise ValueError(f"promise: {subject.label} keeps {load.promises[0]} at no rate, in virtual time")
    display.line(f"{subject.label}: in virtual time 90 % keep {load.promises[0]} up to {most:.3g} requests/s")
    rates = tuple(float(f"{share * most:.3g}") for share in numbers("shares", given["shares"]))
    return Trial(subject=subject, load=replace(load, rates=rates))


def _load(given: Mapping[str, Any]) -> Staircase:
    from .bench.claims_load import Promise, Staircase

    paced = given["device"] == "paced"
    text = given["promise"] or (PACED_PROMISE if paced else CPU_PROMISE)
    try:
        ttft_ms, tpot_ms = (float(part) for part in text.split(":"))
    except ValueError:
        ttft_ms = tpot_ms = 0.0
    if not (0 < ttft_ms < 1e7 and 0 < tpot_ms < 1e7):
        raise ValueError(f"promise: {text!r} is not allowed; allowed: TTFT:TPOT in milliseconds, above 0")
    return Staircase(
        dataset_path=given["dataset_path"],
        rates=(1.0,),
        stair_s=given["stair_s"],
        settle_s=given["settle_s"],
        guard_s=given["guard_s"],
        promises=(Promise(ttft_s=ttft_ms / 1e3, tpot_s=tpot_ms / 1e3),),
        time_scale=given["time_scale"] if paced else 1.0,
        max_model_len=2048 if paced else CPU_MAX_INPUT + CPU_MAX_OUTPUT,
        max_input_tokens=None if paced else CPU_MAX_INPUT,
        max_output_tokens=None if paced else CPU_MAX_OUTPUT,
        seed=given["seed"],
    )

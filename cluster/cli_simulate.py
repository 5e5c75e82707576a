"""`tandem simulate`: a load on a cluster in virtual time; prints the table, saves, draws and traces the result."""

from __future__ import annotations

import math
import signal
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import typer

from .cli_bench_serve_options import (
    AttainmentTarget,
    Label,
    MaxInputLen,
    MaxOutputLen,
    MetricPercentiles,
    ResultDir,
    SaveDetailed,
    SaveResult,
    Sweep,
    SweepDuration,
    SweepMaxPoints,
    SweepRates,
    SweepResolution,
    SweepSeeds,
)
from .cli_simulate_options import (
    PATHS,
    Arrivals,
    Burstiness,
    Cluster,
    Config,
    DatasetPath,
    Decode,
    DecodePp,
    DecodeTp,
    Dtype,
    Duration,
    Fail,
    Goodput,
    GpusPerNode,
    Hardware,
    InterNode,
    IntraNode,
    LocalPrefillThreshold,
    MaxBatchedTokens,
    MaxModelLen,
    Memory,
    Mixed,
    MixedPp,
    MixedTp,
    Model,
    NoRefuse,
    NumPrompts,
    OverLength,
    Prefill,
    PrefillPp,
    PrefillTp,
    Profile,
    RandomInputLen,
    RandomOutputLen,
    RandomRangeRatio,
    RateScale,
    RequestRate,
    ResultFilename,
    SavePlot,
    SaveRequests,
    SaveTrace,
    Seed,
    SloClass,
    of_cluster,
    overrides,
)
from .cli_typed import as_typed, check_sweep_options

if TYPE_CHECKING:
    from .bench.simulated import Simulation
    from .cli_display import Display, Report

FIRST_LINE = "VIRTUAL TIME: nothing is computed and nobody waits; steps take what a latency model says"


def simulate(
    context: typer.Context,
    config: Config = None,
    cluster: Cluster = None,
    model: Model = None,
    hardware: Hardware = None,
    profile: Profile = None,
    gpus_per_node: GpusPerNode = None,
    intra_node: IntraNode = None,
    inter_node: InterNode = None,
    memory: Memory = None,
    dtype: Dtype = None,
    prefill: Prefill = None,
    prefill_tp: PrefillTp = None,
    prefill_pp: PrefillPp = None,
    decode: Decode = None,
    decode_tp: DecodeTp = None,
    decode_pp: DecodePp = None,
    mixed: Mixed = None,
    mixed_tp: MixedTp = None,
    mixed_pp: MixedPp = None,
    max_batched_tokens: MaxBatchedTokens = None,
    max_model_len: MaxModelLen = None,
    local_prefill_threshold: LocalPrefillThreshold = None,
    no_refuse: NoRefuse = False,
    dataset_path: DatasetPath = None,
    num_prompts: NumPrompts = None,
    duration: Duration = None,
    random_input_len: RandomInputLen = None,
    random_output_len: RandomOutputLen = None,
    random_range_ratio: RandomRangeRatio = None,
    max_input_len: MaxInputLen = None,
    max_output_len: MaxOutputLen = None,
    over_length: OverLength = None,
    arrivals: Arrivals = None,
    burstiness: Burstiness = None,
    request_rate: RequestRate = None,
    rate_scale: RateScale = None,
    seed: Seed = None,
    fail: Fail = None,
    goodput: Goodput = None,
    slo_class: SloClass = None,
    metric_percentiles: MetricPercentiles = "90,99",
    sweep: Sweep = False,
    attainment_target: AttainmentTarget = 0.9,
    sweep_seeds: SweepSeeds = 3,
    sweep_duration: SweepDuration = 60.0,
    sweep_rates: SweepRates = None,
    sweep_resolution: SweepResolution = 0.05,
    sweep_max_points: SweepMaxPoints = 12,
    label: Label = None,
    save_result: SaveResult = False,
    save_detailed: SaveDetailed = False,
    result_dir: ResultDir = None,
    result_filename: ResultFilename = None,
    save_requests: SaveRequests = None,
    save_plot: SavePlot = None,
    save_trace: SaveTrace = None,
) -> None:
    """Put a load on a cluster in virtual time.

    Reports TTFT, TPOT and attainment as `tandem bench serve` does.

    Exit codes: 0 well, 1 no request came to its end, 2 wrong usage, 130 interrupted (143 by SIGTERM): what had ended is
    reported.
    """
    raise typer.Exit(_simulated(context, context.params))


def _simulated(context: typer.Context, given: Mapping[str, Any]) -> int:
    """Returns the exit code. `given`: the values of all options."""
    from .bench.simulated import Simulation
    from .bench.simulated_output import SimulatedOutput
    from .cli_display import Display
    from .sim.scenario import read_scenario

    config, cluster, display = given["config"], given["cluster"], Display()
    with as_typed(context, PATHS, config or cluster):
        output = SimulatedOutput(
            save_result=given["save_result"],
            detailed=given["save_detailed"],
            result_dir=given["result_dir"],
            result_filename=given["result_filename"],
            requests=given["save_requests"],
            plot=given["save_plot"],
            trace=given["save_trace"],
            sweep=given["sweep"],
            label=given["label"],
        )
        output.check()
        check_sweep_options(context)
        simulation = Simulation(read_scenario(config, of_cluster(given) | overrides(given)))
        percentiles = numbers("metric_percentiles", given["metric_percentiles"], "50,99", most=100.0)
        if given["sweep"]:
            return _sweep(simulation, output, given, display)
    return _run(simulation, output, percentiles, display)


def described(simulation: Simulation, *, sweep: bool = False) -> str:
    """The cluster and the load on one line."""
    scenario, device = simulation.scenario, simulation.device
    pools = []
    for role, pool in scenario.pools:
        split = f" TP {pool.tensor_parallel}" + (f" PP {pool.pipeline_stages}" if pool.pipeline_stages > 1 else "")
        pools.append(f"{pool.workers} x {role.value}{split}")
    rate = "as recorded" if scenario.rate is None else f"{'from' if sweep else 'at'} {scenario.rate:g}/s"
    if scenario.rate is None and scenario.rate_scale != 1.0:
        rate += f" x {scenario.rate_scale:g}"
    lengths = scenario.workload.lengths or "random lengths"
    cluster = f"{device.facts.name} on {device.hardware.name}: {' + '.join(pools)}"
    return f"{cluster}; {lengths}, {scenario.workload.arrivals.value} {rate}"


def _head(simulation: Simulation, display: Display, *, sweep: bool = False) -> None:
    display.line(FIRST_LINE)
    display.line(described(simulation, sweep=sweep))


def _run(simulation: Simulation, output: Any, percentiles: tuple[float, ...], display: Display) -> int:
    """Returns the exit code: 1 where no request came to its end, 130 where Ctrl-C ended the run."""
    from .bench.show import table
    from .bench.simulated import METRICS

    _head(simulation, display)
    with watched_run(display, "requests") as watch:
        result = simulation.run(percentiles=percentiles, record_all=output.records_all, on_progress=watch)
    for note in result.notes:
        display.line(f"note: {note}")
    display.line(table(result.summary, percentiles, METRICS, client=False, refused=result.refused))
    for line in result.lines():
        display.line(line)
    if result.refused:
        display.line("            with --no-refuse they wait all the same, as in what a plan predicts")
    for line in output.write_run(result):
        display.line(line)
    return watch.exit_code or (0 if result.summary.completed else 1)


def _sweep(simulation: Simulation, output: Any, given: Mapping[str, Any], display: Display) -> int:
    """Returns the exit code: 130 where Ctrl-C ended the sweep."""
    from .bench.show import SWEEP_HEAD, promised, sweep_row, sweep_verdict
    from .bench.simulated import promises_ms
    from .bench.simulated_sweep import sweep
    from .bench.sweep_load import SweepPlan

    rates = given["sweep_rates"]
    plan = SweepPlan(
        target=given["attainment_target"],
        seeds=given["sweep_seeds"],
        duration_s=given["sweep_duration"],
        start_rate=simulation.scenario.rate or 1.0,
        rates=() if rates is None else numbers("sweep_rates", rates, "1,2,4"),
        resolution=given["sweep_resolution"],
        max_points=given["sweep_max_points"],
    )
    _head(simulation, display, sweep=True)
    display.line(
        f"{plan.target:.0%} of requests to keep {promised(promises_ms(simulation.promises))}; "
        f"{plan.seeds} runs of {plan.duration_s:g} s at each rate"
    )
    display.line(SWEEP_HEAD)
    with watched_run(display, "a run's requests") as watch:
        result = sweep(
            simulation,
            plan,
            label=given["label"] or "",
            on_point=lambda point: display.line(sweep_row(point, plan.target)),
            on_progress=watch,
        )
    if watch.exit_code:
        display.line("PARTIAL: interrupted; the point under way is left out")
        if not result.points:
            return watch.exit_code
    display.line(f"\n{sweep_verdict(result)}")
    for line in output.write_sweep(result):
        display.line(line)
    return watch.exit_code


class RunWatch:
    """Shows how far a run is where a person watches, and stops it at the first signal; a second one does what it always
    did.
    """

    def __init__(self, what: str, report: Report | None) -> None:
        self._what = what
        self._report = report
        self.exit_code = 0
        """As shells count it: 130 after Ctrl-C; 0: there was none."""

    def __call__(self, now_s: float, ended: int, planned: int) -> bool:
        """See `bench.simulated.OnProgress`."""
        if self._report is not None:
            self._report("virtual time", f"{now_s:.0f} s, {ended} of {planned} {self._what}", ended / planned)
        return bool(self.exit_code)


@contextmanager
def watched_run(display: Display, what: str) -> Iterator[RunWatch]:
    """Inside, the first SIGINT or SIGTERM stops what asks the watch."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    with display.steps() as report:
        watch = RunWatch(what, report if display.live else None)

        def told(number: int, frame: object) -> None:
            watch.exit_code = 128 + number
            restore()

        for number in before:
            signal.signal(number, told)
        try:
            yield watch
        finally:
            restore()


def numbers(name: str, text: str, example: str, *, most: float = sys.float_info.max) -> tuple[float, ...]:
    """Comma-separated numbers from 0 to `most`. ValueError shows an example."""
    try:
        found = tuple(float(part) for part in text.split(","))
    except ValueError:
        found = (math.nan,)
    if not all(0.0 <= value <= most for value in found):
        bounds = f"0 to {most:g}, " if most < sys.float_info.max else ""
        raise ValueError(f"{name}: {text!r} is not allowed; allowed: {bounds}e.g. {example}")
    return found

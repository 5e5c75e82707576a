"""`tandem plan`: which placement serves most within its promises, and whether to disaggregate at all."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from .cli_plan_options import (
    Arrivals,
    Attainment,
    Burstiness,
    Choose,
    Config,
    Device,
    Dtype,
    Goodput,
    Gpus,
    Hardware,
    InputLen,
    InterNode,
    IntraNode,
    MaxInputLen,
    MaxModelLen,
    MaxOutputLen,
    MaxPp,
    MaxTp,
    Memory,
    Model,
    Nodes,
    OutputFile,
    OutputLen,
    Price,
    Processes,
    Profile,
    RangeRatio,
    Report,
    RequestRate,
    SaveResult,
    Seed,
    Seeds,
    SloClass,
    TimeLimit,
    Validate,
    Verbose,
    Workload,
)
from .cli_promises import slo_classes
from .cli_typed import as_typed

if TYPE_CHECKING:
    from .cli_display import Display
    from .planner.problem import Problem
    from .planner.result import Evaluation, PlanResult
    from .planner.setting import Setting

INFEASIBLE, RATE_NOT_KEPT, UNDECIDED, INTERRUPTED = 3, 4, 5, 130
"""Exit codes beside those of all commands: no plan keeps the promises; none keeps them at the rate that was asked; the
time limit ended the search before that was known; a signal did.
"""
CHOICES = ("best", "disaggregated", "colocated")
CROWDED_SCALE = 2.0
"""A validation's time, where it has more processes than the machine has processors."""
_PATHS = {
    "model": "model",
    "dtype": "dtype",
    "hardware": "hardware",
    "profile": "profile",
    "nodes": "nodes",
    "gpus_per_node": "gpus_per_node",
    "intra_node": "intra_node",
    "inter_node": "inter_node",
    "memory": "memory_bytes",
    "max_model_len": "max_model_len",
    "random_input_len": "workload.input_tokens",
    "random_output_len": "workload.output_tokens",
    "random_range_ratio": "workload.range_ratio",
    "max_input_len": "workload.max_input_tokens",
    "max_output_len": "workload.max_output_tokens",
    "arrivals": "workload.arrivals",
    "burstiness": "workload.burstiness",
    "attainment_target": "attainment",
    "request_rate": "rate",
    "price": "price_per_gpu_hour",
    "seeds": "search.seeds",
    "seed": "search.seed",
    "processes": "search.processes",
    "time_limit": "search.time_limit_s",
    "max_tp": "search.max_tensor_parallel",
    "max_pp": "search.max_pipeline_stages",
}
"""Where in a problem each option stands."""
_MADE = {
    "config": "problem",
    "workload": "workload.lengths",
    "goodput": "workload.slo_classes",
    "slo_class": "workload.slo_classes",
}
"""The same of options whose values are made of what was given."""
_RANDOM = ("random_input_len", "random_output_len", "random_range_ratio")
_EVEN = {"workload.range_ratio": 0.0}


def plan(
    context: typer.Context,
    config: Config = None,
    model: Model = None,
    dtype: Dtype = None,
    hardware: Hardware = None,
    profile: Profile = None,
    nodes: Nodes = None,
    gpus_per_node: Gpus = None,
    intra_node: IntraNode = None,
    inter_node: InterNode = None,
    memory: Memory = None,
    max_model_len: MaxModelLen = None,
    workload: Workload = None,
    random_input_len: InputLen = None,
    random_output_len: OutputLen = None,
    random_range_ratio: RangeRatio = None,
    max_input_len: MaxInputLen = None,
    max_output_len: MaxOutputLen = None,
    arrivals: Arrivals = None,
    burstiness: Burstiness = None,
    goodput: Goodput = None,
    slo_class: SloClass = None,
    attainment_target: Attainment = None,
    request_rate: RequestRate = None,
    price: Price = None,
    seeds: Seeds = None,
    seed: Seed = None,
    processes: Processes = None,
    time_limit: TimeLimit = None,
    max_tp: MaxTp = None,
    max_pp: MaxPp = None,
    output: OutputFile = None,
    choose: Choose = "best",
    device: Device = None,
    report: Report = None,
    validate: Validate = False,
    save_result: SaveResult = None,
    verbose: Verbose = False,
) -> None:
    """Search the placement with the highest goodput per GPU.

    Says whether to disaggregate at all, and what binds.

    Exit codes: 0 a plan was found, 1 failed, 2 wrong usage, 3 no plan keeps the promises, 4 none keeps them at
    --request-rate, 5 undecided: the time limit ended the search, and what is shown and written is the best so far,
    130 interrupted: the best so far is shown, nothing is written.
    """
    from .cli_display import Display
    from .planner.problem import load_problem
    from .planner.search import plan as search
    from .planner.setting import setting_of

    with as_typed(context, _PATHS | _MADE, config):
        problem = load_problem(config, overrides(context.params))
        _check(problem, context.params)
        setting = setting_of(problem)
    display = Display()
    with display.steps() as steps:
        result = search(problem, lambda what, share: steps("plan", what, share))
    _print(problem, setting, result, verbose=verbose)
    _write(display, problem, setting, result, context.params)
    code = exit_code(result)
    if report is not None and not (code == INTERRUPTED or _draw(display, problem, setting, result, report)):
        code = INTERRUPTED
    if validate and code != INTERRUPTED:
        _validate(problem, setting, result, device)
    raise typer.Exit(code)


def overrides(given: Mapping[str, Any]) -> dict[str, Any]:
    """The options that were given, by their place in a problem. ValueError naming the option that is wrong."""
    found = {} if given["workload"] is None else _workload(given["workload"])
    if given["workload"] is None and any(given[name] is not None for name in _RANDOM):
        found = {"workload.lengths": None}  # in place of the file's
    found |= {path: given[name] for name, path in _PATHS.items() if given[name] is not None}
    if given["burstiness"] is not None and given["arrivals"] is None:
        found["workload.arrivals"] = "gamma"
    if classes := slo_classes(given):
        found["workload.slo_classes"] = classes
    return found


def _workload(path: str) -> dict[str, Any]:
    """A .yaml file holds the whole section, anything else lengths."""
    from .config_file import read_yaml
    from .config_schema import ConfigError

    if not path.endswith((".yaml", ".yml")):
        # What a problem's file says of lengths was for want of a file.
        return {"workload.lengths": path, "workload.input_tokens": None, "workload.output_tokens": None, **_EVEN}
    section = read_yaml(path, "workload")
    section = section.get("workload", section) if isinstance(section, Mapping) else section
    if not isinstance(section, Mapping):
        raise ConfigError("workload", path, "a file with a section of keys and values")
    lengths = section.get("lengths")
    beside = Path(path).parent / lengths if isinstance(lengths, str) else None
    if beside is not None and beside.exists():
        section = {**section, "lengths": str(beside)}
    return {f"workload.{key}": value for key, value in section.items()}


def _check(problem: Problem, given: Mapping[str, Any]) -> None:
    """ValueError before anything is searched in vain."""
    from .planner.plan_file import device_of

    if given["choose"] not in CHOICES:
        raise ValueError(f"choose: {given['choose']!r} is not allowed; allowed: {', '.join(CHOICES)}")
    device_of(problem, given["device"])
    if given["output"] is None:
        if given["choose"] != "best":
            raise ValueError("choose: has no effect without --output")
        if given["device"] is not None and not given["validate"]:
            raise ValueError("device: has no effect without --output or --validate")
    if given["validate"]:
        _check_validation(problem)
    if given["report"] is not None:
        from .planner.report import check_report

        check_report(given["report"])
    for name in ("output", "save_result"):
        path = given[name]
        if path is not None and not Path(path).absolute().parent.is_dir():
            raise ValueError(f"{name}: {path!r} is not allowed; allowed: a file in a folder that exists")
    if given["output"] is not None and Path(given["output"]).suffix not in (".yaml", ".yml"):
        raise ValueError(f"output: {given['output']!r} is not allowed; allowed: a file that ends in .yaml or .yml")


def _check_validation(problem: Problem) -> None:
    """ValueError where the load cannot be put on real processes."""
    kinds = list(problem.workload.classes.values())
    if len(kinds) != 1 or kinds[0].ttft_s is None or kinds[0].tpot_s is None:
        raise ValueError("validate: is not allowed here; allowed with one class that has a TTFT and a TPOT")
    if problem.workload.lengths is None:
        raise ValueError("validate: is not allowed without a file of lengths; allowed with --workload FILE")


def _print(problem: Problem, setting: Setting, result: PlanResult, *, verbose: bool) -> None:
    from rich.console import Console

    from .planner.show import LOG_WIDTH, show

    console = Console(highlight=False, width=None if sys.stdout.isatty() else LOG_WIDTH)
    show(console, problem, setting, result, verbose=verbose)


def _chosen(result: PlanResult, choose: str) -> Evaluation | None:
    if choose == "best":
        return result.best
    found = result.disaggregated if choose == "disaggregated" else result.colocated
    return found if found is not None and found.goodput.mean > 0.0 else None


def _write(display: Display, problem: Problem, setting: Setting, result: PlanResult, given: Mapping[str, Any]) -> None:
    """The plan and the whole result, where they were asked for: before anything more is simulated for a picture. What
    was interrupted takes nobody's place.
    """
    if result.interrupted:
        for name in ("output", "save_result", "report"):
            if given[name] is not None:
                display.line(f"not written {given[name]}: interrupted")
        return
    if given["output"] is not None:
        _write_plan(display, problem, setting, result, given)
    if given["save_result"] is not None:
        _save(given["save_result"], problem, result)
        display.line(f"saved       {given['save_result']}")


def _write_plan(
    display: Display, problem: Problem, setting: Setting, result: PlanResult, given: Mapping[str, Any]
) -> None:
    """Writes the file and says what to do with it, or why `serve` will refuse it."""
    from .config import ConfigError
    from .config_file import load_config
    from .launch.checks import check_engines
    from .planner.plan_file import device_of, on_gpus, plan_file

    path, chosen = given["output"], _chosen(result, given["choose"])
    if chosen is None:
        why = "there is no such plan" if result.decided else "nothing was simulated in time, see --time-limit"
        display.line(f"not written {path}: {why}")
        return
    file = plan_file(problem, setting, result, chosen, name=Path(path).stem, device=given["device"], command=command())
    file.save(path)
    display.line(f"written     {path}" + "".join(f", {name}" for name in file.profiles))
    if on_gpus(problem) and device_of(problem, given["device"]) == "paced":
        display.line("rehearsal   its workers compute nothing, they take the time predicted; --device cuda for GPUs")
    try:
        check_engines(load_config(path), setting.device.facts.config)
    except ConfigError as error:
        display.line(f"            tandem serve cannot start it: {error}")
        display.line(f"simulate it tandem simulate --cluster {path}")
        return
    display.line(f"start it    tandem serve --config {path}")


def _draw(display: Display, problem: Problem, setting: Setting, result: PlanResult, path: str) -> bool:
    """The report, with runs of its own for its curves; False: interrupted, nothing was drawn."""
    from .planner.curves import with_curves
    from .planner.report import save_report

    try:
        with display.steps() as steps:
            result = with_curves(
                setting,
                result,
                processes=problem.search.chosen_processes,
                time_limit_s=max(0.0, problem.search.time_limit_s - result.wall_s),
                progress=lambda what, share: steps("report", what, share),
            )
    except KeyboardInterrupt:
        display.line(f"not drawn   {path}: interrupted")
        return False
    save_report(path, problem, setting, result, command())
    display.line(f"drawn       {path}")
    return True


def _validate(problem: Problem, setting: Setting, result: PlanResult, device: str | None) -> None:
    """`tandem bench validate` of the best plans: real router and worker processes, predicted beside measured."""
    import tempfile
    from inspect import Parameter, signature

    from .cli_bench_validate import run_validation
    from .cli_bench_validate import validate as validation
    from .planner.plan_file import device_of, plan_file
    from .processors import processors

    [kind] = problem.workload.classes.values()
    assert kind.ttft_s is not None  # _check
    assert kind.tpot_s is not None
    measured = problem.measured()
    with tempfile.TemporaryDirectory(prefix="tandem-plan-") as folder:
        files = []
        for one in (result.disaggregated, result.colocated):
            if one is None or one.goodput.mean == 0.0 or any(pool.pipeline_stages > 1 for pool in one.candidate.pools):
                continue
            name = one.candidate.kind
            files.append(str(Path(folder) / f"{name}.yaml"))
            plan_file(problem, setting, result, one, name=name, device=device).save(files[-1])
        if not files:
            raise ValueError("validate: there is no plan that can be started; allowed with one, see --max-pp 1")
        options: dict[str, Any] = {
            "config": files,
            "device": device_of(problem, device),
            "dataset_path": problem.workload.lengths,
        }
        options |= {"profile": problem.profile if measured is not None else None}
        options |= {"promise": f"{kind.ttft_s * 1e3:g}:{kind.tpot_s * 1e3:g}", "seed": problem.search.seed}
        defaults = {name: one.default for name, one in signature(validation).parameters.items()}
        if options["device"] == "paced":
            best = [one.candidate for one in (result.disaggregated, result.colocated) if one is not None]
            members = 2 + max(sum(pool.count for pool in one.pools) for one in best)  # a router and the load too
            if members > processors():  # they would wait for each other
                options |= {name: CROWDED_SCALE * defaults[name] for name in ("time_scale", "stair_s", "max_minutes")}
        run_validation({name: value for name, value in (defaults | options).items() if value is not Parameter.empty})


def command() -> list[str]:
    """As it was given, for whoever reads the file."""
    return ["tandem", *sys.argv[1:]]


def exit_code(result: PlanResult) -> int:
    """See `plan`."""
    if result.interrupted:
        return INTERRUPTED
    if result.infeasible:
        return INFEASIBLE
    if not result.decided:
        return UNDECIDED
    best = result.best
    if best is None:
        return INFEASIBLE
    return RATE_NOT_KEPT if result.target_rate is not None and not best.keeps_target_rate else 0


def _save(path: str, problem: Problem, result: PlanResult) -> None:
    import orjson

    from .config_schema import plain

    found = {"problem": plain(problem), "result": plain(result)}
    Path(path).write_bytes(orjson.dumps(found, option=orjson.OPT_INDENT_2) + b"\n")

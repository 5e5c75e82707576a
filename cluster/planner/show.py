"""What `tandem plan` prints: the problem, the best plans side by side, the verdict; on request all that was refused.

Tables by rich; in a log they are plain text, without control characters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from ..types import Role
from .nodes import nodes_of
from .problem import Problem
from .result import Evaluation, Fate, PlanResult, Pool, Quantiles
from .setting import Setting
from .verdict import binding_of, cost_of, for_rate, interval, marginal_of, verdict, why_above, without_interval
from .words import devices_text, loss_text, model_text, number, promises_text, source_text, workload_text

SEEN = (
    "Attainment and latencies are of the second half of runs near that rate in which nobody is refused, as a long "
    "`tandem simulate --cluster plan.yaml --no-refuse` has them; a router refuses what is lost anyway, and the others "
    "are faster for it."
)
LOG_WIDTH = 132
"""Columns where no terminal says how many it has."""
MAX_RUNNERS_UP = 6
MAX_NODES = 8


def show(console: Console, problem: Problem, setting: Setting, result: PlanResult, *, verbose: bool = False) -> None:
    """Prints all of it."""
    for part in parts(problem, setting, result, verbose=verbose):
        console.print(part, highlight=False)


def parts(problem: Problem, setting: Setting, result: PlanResult, *, verbose: bool = False) -> Iterable[RenderableType]:
    """What is printed, from top to bottom."""
    yield _facts(problem, setting)
    best = [one for one in (result.disaggregated, result.colocated) if one is not None]
    if best and not result.infeasible:
        yield _plans(problem, setting, result, best)
        others = runners_up(result)
        if others:
            yield _runners_up(result, others)
    yield Text(verdict(result), style="bold")
    yield Group(*(Text(line) for line in remarks(problem, result)))
    if verbose:
        yield _refused(result)


def remarks(problem: Problem, result: PlanResult, *, timed: bool = True) -> list[str]:
    """What else there is to say, a line each. `timed`: with how long it took, which no two runs have in common."""
    told = for_rate(result)
    lines = [told] if told and told not in verdict(result) else []
    if result.marginal:
        lines += [f"{marginal_of(one)}." for one in result.marginal]
    lines += list(result.notes) if result.best is not None else []
    lines += [text for text in (without_interval(result),) if text]
    best = [one for one in (result.disaggregated, result.colocated) if one is not None and not result.infeasible]
    lines += [text for one in best if (text := why_above(one, problem.attainment))]
    if any(one.prediction is not None for one in best):
        lines.append(SEEN)
    refused = sum(one.fate is Fate.REFUSED for one in result.explored)
    refused += sum(one.fate is Fate.REFUSED for one in result.phases)
    if refused:
        lines.append(f"{refused} splits and placements cannot run here (--verbose says why).")
    ended = "an interruption" if result.interrupted else "the time limit"
    end = "" if result.complete else f": {ended} ended the search, so the answer may not be the best one"
    took = f", in {result.wall_s:.1f} s ({result.cpu_s:.1f} s of processors)" if timed else ""
    lines.append(
        f"Placements looked at: {len(result.explored)}; requests simulated: {result.simulated_requests:,} under "
        f"{len(result.seeds)} seeds{took}{end}."
    )
    return lines


def runners_up(result: PlanResult) -> list[Evaluation]:
    """The next best that were simulated, one of each placement."""
    shown = {one.candidate.label for one in (result.disaggregated, result.colocated) if one is not None}
    found = []
    for one in result.explored:
        if one.fate not in (Fate.SIMULATED, Fate.SCREENED) or one.candidate.label in shown or not one.goodput.mean:
            continue
        shown.add(one.candidate.label)
        found.append(one)
    return found[:MAX_RUNNERS_UP]


def alternatives(result: PlanResult) -> list[Evaluation]:
    """What is drawn: the best of both kinds, and the next best of each."""
    best = [one for one in (result.disaggregated, result.colocated) if one is not None and one.goodput.mean > 0.0]
    others = runners_up(result)
    for disaggregated in (True, False):
        best += [one for one in others if one.candidate.disaggregated is disaggregated][:1]
    return best


def _facts(problem: Problem, setting: Setting) -> Table:
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column()
    for name, text in (
        ("model", model_text(setting)),
        ("devices", f"{devices_text(setting)}; {source_text(problem, setting)}"),
        ("workload", f"{workload_text(problem)}{loss_text(setting)}"),
        ("promises", promises_text(problem)),
    ):
        table.add_row(name, Text(text))
    if problem.rate is not None:
        table.add_row("rate", f"{number(problem.rate)} requests/s wanted")
    return table


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table of the best plans."""

    name: str
    cell: Callable[[Evaluation], str]


def plan_rows(problem: Problem, setting: Setting, result: PlanResult, best: Sequence[Evaluation]) -> list[Row]:
    """What is told of each of the best plans."""
    rows = [
        Row("placement", _placement),
        Row("nodes", lambda one: _nodes(setting, one)),
        Row("GPUs", lambda one: f"{one.candidate.gpus} of {setting.gpus}"),
        Row(f"goodput, requests/s at {problem.attainment * 100:g} %", lambda one: _goodput(one, 1.0)),
        Row("  per GPU (95 %)", lambda one: _goodput(one, 1 / one.candidate.gpus)),
    ]
    if any(one.prediction is not None for one in best):
        rows += [
            Row("seen at, requests/s", lambda one: "-" if one.prediction is None else number(one.prediction.rate)),
            Row("  attainment", _attainment),
            Row("  TTFT p50/p90/p99, ms", lambda one: quantiles(one.prediction.ttft if one.prediction else None)),
            Row("  TPOT p50/p90/p99, ms", lambda one: quantiles(one.prediction.tpot if one.prediction else None)),
        ]
    rows.append(Row("bound by", lambda one: binding_of(one) or "-"))
    if result.target_rate is not None:
        wanted = f"keeps {number(result.target_rate)} requests/s"
        rows.append(Row(wanted, lambda one: "yes" if one.keeps_target_rate else "no"))
    price = problem.price_per_gpu_hour
    if price is not None:
        rows.append(Row("cost of 1M tokens, in and out", lambda one: number(cost_of(one, result, price))))
    return rows


def _plans(problem: Problem, setting: Setting, result: PlanResult, best: list[Evaluation]) -> Table:
    """Columns: disaggregated and colocated."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("", no_wrap=True)
    for one in best:
        table.add_column(column_of(one, result), overflow="fold")
    for row in plan_rows(problem, setting, result, best):
        table.add_row(row.name, *(row.cell(one) for one in best))
    return table


def column_of(one: Evaluation, result: PlanResult) -> str:
    """The head of a best plan's column."""
    disaggregated = one.candidate.disaggregated
    decided = result.disaggregated_decided if disaggregated else result.colocated_decided
    return ("disaggregated" if disaggregated else "colocated") + ("" if decided else ", so far")


def _goodput(one: Evaluation, scale: float) -> str:
    if one.decided:
        return interval(one.goodput, scale) + (", its capacity" if one.at_bound else "")
    return f"at least {number(one.goodput.mean * scale)}" if one.goodput.mean else "-"


def _placement(one: Evaluation) -> str:
    lines = [f"{pool.label}, {limits_of(pool)}" for pool in one.candidate.pools]
    if one.candidate.cells > 1:
        lines.append(f"in {one.candidate.cells} cells that hand off inside")
    return "\n".join(lines)


def limits_of(pool: Pool) -> str:
    """What bounds a step: tokens of prompts, rows that decode, or both."""
    tokens, rows = f"{pool.max_batched_tokens} tokens a step", f"{pool.max_running} rows"
    by_role = {Role.PREFILL: tokens, Role.DECODE: rows, Role.MIXED: f"{tokens}, {rows}"}
    return by_role[pool.role]


def _nodes(setting: Setting, one: Evaluation) -> str:
    held = [f"{node}: {', '.join(workers)}" for node, workers in nodes_of(setting, one.candidate).items()]
    more = len(held) - MAX_NODES
    return "\n".join([*held[:MAX_NODES], *([f"and {more} more nodes"] if more > 0 else [])])


def _attainment(one: Evaluation) -> str:
    if one.prediction is None:
        return "-"
    found = one.prediction
    classes = [f"{name} {share * 100:.1f} %" for name, share in found.by_class.items()]
    return f"{found.attainment * 100:.1f} %" + (f" ({', '.join(classes)})" if len(classes) > 1 else "")


def quantiles(found: Quantiles | None) -> str:
    """`81 / 212 / 400`, milliseconds."""
    if found is None:
        return "-"
    return " / ".join(number(seconds * 1e3) for seconds in (found.p50, found.p90, found.p99))


def _runners_up(result: PlanResult, others: list[Evaluation]) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for name in ("runner-up", "GPUs", "goodput, requests/s", "per GPU, requests/s", "of the plan's per GPU", "from"):
        table.add_column(name, justify="left" if name in ("runner-up", "from") else "right")
    for one in others:
        table.add_row(
            one.candidate.label,
            str(one.candidate.gpus),
            _runner_up(one, 1.0),
            _runner_up(one, 1 / one.candidate.gpus),
            _beside_the_plan(result, one),
            one.candidate.affinity.value,
        )
    return table


def _runner_up(one: Evaluation, scale: float) -> str:
    return ("" if one.decided else "at least ") + number(one.goodput.mean * scale)


def _beside_the_plan(result: PlanResult, one: Evaluation) -> str:
    """In percent of the best plan of its kind, under the seeds that both saw; where these are not all, with both means,
    which are not those that are told of all.
    """
    best = result.disaggregated if one.candidate.disaggregated else result.colocated
    pairs = [] if best is None else list(zip(one.seeds, best.seeds, strict=False))
    theirs = sum(pair[1] for pair in pairs)
    if best is None or not theirs:
        return "-"
    own, other = sum(pair[0] for pair in pairs) / one.candidate.gpus, theirs / best.candidate.gpus
    share = f"{own / other * 100:.0f} %"
    if len(pairs) == len(best.seeds):
        return share
    both = f"{number(own / len(pairs))} against {number(other / len(pairs))}"
    return f"{share}: {both} under {len(pairs)} of {len(best.seeds)} seeds"


def _refused(result: PlanResult) -> Table:
    """Everything that cannot run or could not keep a promise, and why."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("not simulated", no_wrap=True)
    table.add_column("", no_wrap=True)
    table.add_column("why", overflow="fold")
    for phase in result.phases:
        if phase.why:
            stages = f" PP {phase.pipeline_stages}" if phase.pipeline_stages > 1 else ""
            table.add_row(f"{phase.role.value} TP {phase.tensor_parallel}{stages}", phase.fate.value, Text(phase.why))
    for one in result.explored:
        if one.why:
            table.add_row(one.candidate.label, one.fate.value, Text(one.why))
    return table

"""A plan's report: one HTML file that needs nothing from elsewhere, or one PNG.

    check_report("report.html")                       # before anything is searched in vain
    save_report("report.html", problem, setting, result, command=["tandem", "plan", …])

The same result gives the same bytes: nothing in it depends on when it was written.
"""

from __future__ import annotations

import html
import importlib.util
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path

from ... import __version__
from .problem import Problem
from .report_figures import PlotsMissing, legend, png, svg_counts, svg_curves, svg_goodputs, svg_map
from .result import Evaluation, Fate, PlanResult
from .setting import Setting
from .show import column_of, limits_of, plan_rows, remarks
from .verdict import binding_of, cost_of, verdict
from .words import devices_text, loss_text, model_text, number, promises_text, source_text, workload_text

SUFFIXES = (".html", ".png")
MAX_LISTED = 200
_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; color: #222; max-width: 1080px; margin: 2em auto; padding: 0 1em; }
h1 { font-size: 1.25em; line-height: 1.35; border-left: 5px solid #1f6fb4; padding-left: .6em; }
h2 { font-size: 1.05em; margin: 1.8em 0 .4em; }
table { border-collapse: collapse; font-size: 13.5px; }
th, td { text-align: left; vertical-align: top; padding: .25em .9em .25em 0; border-bottom: 1px solid #e4e4e4; }
th { font-weight: 600; } td.name { color: #555; white-space: nowrap; }
td { white-space: pre-line; } figure { margin: .5em 0; } svg { max-width: 100%; height: auto; }
p.note, figcaption, footer { color: #555; font-size: 13px; } code { background: #f4f4f4; padding: .1em .3em; }
"""


def check_report(path: str | Path) -> None:
    """ValueError before anything is searched in vain: no such kind of file, no such folder, no matplotlib."""
    file = Path(path)
    if file.suffix.lower() not in SUFFIXES:
        raise ValueError(f"report: {str(path)!r} is not allowed; allowed: a file that ends in {', '.join(SUFFIXES)}")
    if not file.absolute().parent.is_dir():
        raise ValueError(f"report: {str(path)!r} is not allowed; allowed: a file in a folder that exists")
    if importlib.util.find_spec("matplotlib") is None:
        raise PlotsMissing("report: matplotlib is missing; allowed where `pip install tandem-serve[plots]` put it")


def save_report(
    path: str | Path, problem: Problem, setting: Setting, result: PlanResult, command: Sequence[str] = ()
) -> None:
    """Writes it, of the kind that the suffix says. Raises OSError."""
    if Path(path).suffix.lower() == ".png":
        told = [f"{name}: {text}" for name, text in inputs(problem, setting)]
        caption = "\n".join([*of_the_best(problem, result), *remarks(problem, result, timed=False), *told])
        Path(path).write_bytes(png(result, problem.attainment, verdict(result), caption))
        return
    Path(path).write_text(page(problem, setting, result, command), encoding="utf-8")


def of_the_best(problem: Problem, result: PlanResult) -> list[str]:
    """What the picture does not show of both best plans, a line each: what binds them, what they cost."""
    lines = []
    for one in (result.disaggregated, result.colocated):
        if one is None or result.infeasible:
            continue
        parts = [f"bound by {bound}"] if (bound := binding_of(one)) else []
        if problem.price_per_gpu_hour is not None:
            cost = number(cost_of(one, result, problem.price_per_gpu_hour))
            parts.append(f"{cost} for 1M tokens, in and out, at {number(problem.price_per_gpu_hour)} per GPU-hour")
        if parts:
            lines.append(f"{column_of(one, result)}: {'; '.join(parts)}")
    return lines


def inputs(problem: Problem, setting: Setting) -> list[tuple[str, str]]:
    """What was asked, as names and texts."""
    search = problem.search
    found = [
        ("model", model_text(setting)),
        ("devices", devices_text(setting)),
        ("step times", source_text(problem, setting)),
        ("workload", f"{workload_text(problem)}{loss_text(setting)}"),
        ("promises", promises_text(problem)),
    ]
    if problem.rate is not None:
        found.append(("rate", f"{number(problem.rate)} requests/s wanted"))
    if problem.price_per_gpu_hour is not None:
        found.append(("price", f"{number(problem.price_per_gpu_hour)} per GPU-hour"))
    return [*found, ("search", f"{search.seeds} seeds from {search.seed}, at most {search.time_limit_s:g} s")]


def page(problem: Problem, setting: Setting, result: PlanResult, command: Sequence[str] = ()) -> str:
    """The HTML."""
    best = [one for one in (result.disaggregated, result.colocated) if one is not None]
    body = [f"<h1>{_text(verdict(result))}</h1>", _paragraphs(remarks(problem, result, timed=False))]
    if best and not result.infeasible:
        head = ["", *(column_of(one, result) for one in best)]
        rows = [[row.name, *(row.cell(one) for one in best)] for row in plan_rows(problem, setting, result, best)]
        body += [_table(head, rows)]
        body += [_figure(svg_curves(result, problem.attainment), _CURVES), _figure(svg_goodputs(result), _BARS)]
    if result.explored or result.phases:
        body += ["<h2>What was searched</h2>", _figure(svg_map(result) + svg_counts(result), _map_text(result))]
    body += ["<h2>Inputs</h2>", _table(["", ""], [list(pair) for pair in inputs(problem, setting)])]
    if command:
        body.append(f"<p>Made with <code>{_text(shlex.join(command))}</code></p>")
    body += _listed(result)
    body.append(f"<footer>tandem {__version__}</footer>")
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f"<title>{_text(_title(problem, setting))}</title><style>{_STYLE}</style></head>\n<body>\n"
        + "\n".join(body)
        + "\n</body></html>\n"
    )


_CURVES = (
    "Each line is the mean over the seeds, the band all of them; the dot is goodput, the highest rate at the target. "
    "Both promises count together, over the whole run and over its second half, whichever is worse."
)
_BARS = "The best plans and the next best; the line on a bar is the 95 % interval over the seeds, where there is one."


def _map_text(result: PlanResult) -> str:
    return f"{legend(result)} A phase alone has the other one cost nothing."


def _title(problem: Problem, setting: Setting) -> str:
    return f"Plan: {setting.device.facts.name} on {setting.gpus} x {setting.device.hardware.name}"


def _listed(result: PlanResult) -> list[str]:
    """Tables of everything that was looked at, and of what was refused, with the arithmetic."""
    served = [one for one in result.explored if not one.why]
    rows = [[one.candidate.label, *_facts_of(one)] for one in served[:MAX_LISTED]]
    found = []
    if rows:
        head = ["placement", "limits", "GPUs", "goodput, requests/s", "per GPU, requests/s", "looked at", "from"]
        found += ["<h2>Placements</h2>", _table(head, rows)]
    phases = [
        [f"{one.role.value} TP {one.tensor_parallel} PP {one.pipeline_stages}", one.fate.value, one.why]
        for one in result.phases
        if one.why
    ]
    unserved = [[one.candidate.label, one.fate.value, one.why] for one in result.explored if one.why]
    if phases or unserved:
        rows = [*phases, *unserved][:MAX_LISTED]
        found += ["<h2>Not simulated, and why</h2>", _table(["", "", "why"], rows)]
    return found


def _facts_of(one: Evaluation) -> list[str]:
    limits = "; ".join(limits_of(pool) for pool in one.candidate.pools)
    if one.fate is Fate.ESTIMATED or not (one.decided or one.goodput.mean):
        numbers = [f"~{number(one.estimate)}", f"~{number(one.estimate / one.candidate.gpus)}"]
    else:
        sign = "" if one.decided else "≥"
        numbers = [f"{sign}{number(one.goodput.mean)}", f"{sign}{number(one.goodput_per_gpu)}"]
    return [limits, str(one.candidate.gpus), *numbers, one.fate.value, one.candidate.affinity.value]


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    titles = "".join(f"<th>{_text(name)}</th>" for name in head)
    lines = ["<tr>" + "".join(_cell(place, cell) for place, cell in enumerate(row)) + "</tr>" for row in rows]
    return "<table>" + (f"<tr>{titles}</tr>" if any(head) else "") + "".join(lines) + "</table>"


def _cell(place: int, text: str) -> str:
    return f'<td class="name">{_text(text)}</td>' if not place else f"<td>{_text(text)}</td>"


def _paragraphs(lines: Iterable[str]) -> str:
    return "".join(f'<p class="note">{_text(line)}</p>' for line in lines)


def _figure(svg: str, caption: str) -> str:
    return f"<figure>{svg}<figcaption>{_text(caption)}</figcaption></figure>"


def _text(value: str) -> str:
    return html.escape(value, quote=True)

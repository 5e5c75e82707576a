"""What is printed, and the report: every fact of a result is in them, and nothing that a browser would fetch."""

from __future__ import annotations

import io
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from plan_cases import evaluated, mixed, opt, refused, result, split
from rich.console import Console
from tandem.cluster.planner.problem import Problem
from tandem.cluster.planner.report import check_report, of_the_best, page, save_report
from tandem.cluster.planner.report_figures import curve, legend
from tandem.cluster.planner.report_maps import pair_map
from tandem.cluster.planner.result import Affinity, Fate, Interval, PlanResult
from tandem.cluster.planner.setting import setting_of
from tandem.cluster.planner.show import _beside_the_plan, alternatives, remarks, runners_up, show


def shown(problem: Problem, found: PlanResult, **options: Any) -> str:
    console = Console(file=io.StringIO(), width=140)
    show(console, problem, setting_of(problem), found, **options)
    stream = console.file
    assert isinstance(stream, io.StringIO)
    return stream.getvalue()


def line_of(text: str, start: str) -> list[str]:
    [line] = [line for line in text.splitlines() if line.strip().startswith(start)]
    return re.split(r"\s{2,}", line.strip())


def test_the_table_has_both_plans() -> None:
    text = shown(opt(price_per_gpu_hour=2.5), result())
    assert line_of(text, "disaggregated") == ["disaggregated", "colocated"]
    assert line_of(text, "placement")[1] == "1 x prefill TP 2, 2048 tokens a step"
    assert "1 x decode TP 1, 256 rows" in text
    assert "3 x mixed TP 1, 512 tokens a step, 256 rows" in text
    assert line_of(text, "nodes")[1] == "node-0: prefill-0, decode-0"
    assert line_of(text, "goodput, requests/s at 90 %")[1:] == ["6.00 (5.70 to 6.30)", "4.50 (4.27 to 4.73)"]
    assert line_of(text, "per GPU (95 %)")[1:] == ["2.00 (1.90 to 2.10)", "1.50 (1.42 to 1.58)"]
    again = "in which nobody is refused, as a long `tandem simulate --cluster plan.yaml --no-refuse`"
    assert again in " ".join(text.split())
    assert line_of(text, "attainment")[1:] == ["91.2 %", "91.2 %"]
    assert line_of(text, "TTFT p50/p90/p99, ms")[1] == "81.2 / 212 / 400"
    assert line_of(text, "bound by")[1] == "TTFT of chat, in 83 % of what misses"
    assert float(line_of(text, "cost of 1M tokens")[1]) < float(line_of(text, "cost of 1M tokens")[2])
    assert line_of(text, "2 x prefill TP 2 + 1 x decode TP 1")[1:] == ["5", "8.00", "1.60", "80 %", "algorithm 1"]
    assert "Disaggregate: " in text
    assert "1 more prefill worker (2 GPUs) brings +2.20 requests/s" in text
    assert "\x1b" not in text


def test_without_a_prediction_or_a_price_nothing_is_made_up() -> None:
    bare = replace(evaluated(split(), 6.0), prediction=None, binding=None)
    text = shown(opt(), result(disaggregated=bare, colocated=None, explored=(bare,), difference=None))
    assert "TTFT p50" not in text
    assert "cost of" not in text
    assert "price" not in text
    assert "--no-refuse" not in text, "there is nothing to see again"
    assert line_of(text, "bound by") == ["bound by", "-"]


def test_what_was_refused_is_told_on_request() -> None:
    found = result()
    assert "24 GiB weights" not in shown(opt(), found)
    assert "7 splits and placements cannot run here (--verbose says why)." in remarks(opt(), found)
    text = shown(opt(), found, verbose=True)
    assert "opt-13b does not fit: 80.00 GiB x 0.9 - 24 GiB weights" in text
    assert line_of(text, "decode TP 4 PP 2")[1:] == ["refused", "does not fit: 80.00 GiB"]


def test_what_nobody_can_keep_is_one_sentence() -> None:
    nobody = result(
        infeasible="even one unloaded request takes 300 ms", disaggregated=None, colocated=None, difference=None
    )
    nobody = replace(nobody, notes=("only colocated is possible",))
    text = shown(opt(), nobody)
    assert "possible" not in text, "nothing is"
    assert "infeasible: even one unloaded request takes 300 ms" in text
    assert "goodput, requests/s at" not in text


def test_an_ended_search_says_so() -> None:
    assert "the time limit ended the search" in remarks(opt(), result(complete=False))[-1]
    assert "3.2 s" in remarks(opt(), result())[-1]
    assert not any("3.2 s" in line for line in remarks(opt(), result(), timed=False))


def test_what_is_known_so_far_is_told_as_that() -> None:
    cut = replace(evaluated(split(), 6.0), decided=False, seeds=(5.9,))
    found = result(disaggregated=cut, disaggregated_decided=False, complete=False, difference=None, explored=(cut,))
    text = shown(opt(), found)
    assert line_of(text, "disaggregated") == ["disaggregated, so far", "colocated"]
    assert line_of(text, "per GPU (95 %)")[1:] == ["at least 2.00", "1.50 (1.42 to 1.58)"]
    assert "an interruption ended the search" in remarks(opt(), replace(found, interrupted=True))[-1]
    assert "cut short" in legend(found)
    assert "cut short" not in legend(result())
    nothing = replace(cut, goodput=Interval(mean=0.0, low=0.0, high=0.0), estimate=6.0)
    [cell] = pair_map(replace(found, disaggregated=nothing, explored=(nothing,))).cells.values()
    assert (cell.fate, cell.value) == (Fate.ESTIMATED, 2.0), "what nothing was seen of is worth its estimate"


def test_a_picture_says_what_binds_and_what_it_costs() -> None:
    lines = of_the_best(opt(price_per_gpu_hour=2.0), result())
    assert [line.split(":")[0] for line in lines] == ["disaggregated", "colocated"]
    assert "bound by TTFT of chat, in 83 % of what misses" in lines[0]
    assert lines[0].endswith("for 1M tokens, in and out, at 2.00 per GPU-hour")


def test_cells_and_stages_have_their_nodes() -> None:
    problem = opt(nodes=4, gpus_per_node=2)
    candidate = split(2, 2, 1, 1, affinity=Affinity.LOW, cells=2)
    stages = replace(candidate, pools=tuple(replace(pool, pipeline_stages=2) for pool in candidate.pools))
    text = shown(problem, result(disaggregated=evaluated(stages, 6.0)))
    assert "node-0: prefill-0 stage 0, decode-0 stage 0" in text
    assert "node-3: prefill-1 stage 1, decode-1 stage 1" in text
    assert "in 2 cells that hand off inside" in text


def test_runners_up_are_others() -> None:
    labels = [one.candidate.label for one in runners_up(result())]
    assert labels == ["2 x prefill TP 2 + 1 x decode TP 1", "4 x mixed TP 1, chunks of 512"]


def test_runners_up_are_held_against_the_plan_under_the_seeds_that_both_saw() -> None:
    plan = result()
    best = plan.colocated
    assert best is not None
    first = replace(best, candidate=mixed(chunk=1024), fate=Fate.SCREENED, seeds=(best.seeds[0] * 1.1,))
    assert _beside_the_plan(plan, first) == "110 %: 1.61 against 1.46 under 1 of 3 seeds"
    assert _beside_the_plan(plan, replace(best, seeds=tuple(0.5 * one for one in best.seeds))) == "50 %"
    assert _beside_the_plan(replace(plan, colocated=None), first) == "-"


def test_a_curve_is_over_the_seeds_between_their_rates() -> None:
    one = evaluated(split(), 6.0)
    rates, values = curve(one)
    assert (rates[0], rates[-1], values.shape[0]) == (1.5, 6.0 * 1.4, 3)
    assert (np.diff(values[1]) <= 1e-12).all(), "more load, less attainment"
    late = min(point.late_attainment for point in one.points if point.rate == rates[-1] and point.seed == 0)
    assert values[0, -1] == pytest.approx(late), "the worse of the whole run and its second half"


def test_the_map_has_the_best_of_each_pair() -> None:
    more = replace(evaluated(split(3, 2), 12.0), fate=Fate.ESTIMATED, estimate=99.0)
    cells = pair_map(result(explored=(*result().explored, more))).cells
    best = cells[(2, 1), (1, 1)]
    assert (best.value, best.note, best.fate) == (2.0, "1:1", Fate.SIMULATED), "simulated before estimated"
    lucky = evaluated(split(1, 2, 2, 1), 99.0, fate=Fate.SCREENED)
    cells = pair_map(result(explored=(*result().explored, lucky))).cells
    assert cells[(2, 1), (1, 1)].value == 2.0, "the framed cell is the plan's own"
    assert cells[(1, 1), (4, 1)].fate is Fate.REFUSED


def test_the_page_needs_nothing_from_elsewhere() -> None:
    problem = opt(price_per_gpu_hour=2.5)
    odd = refused(split(1, 1, 1, 4), "does not <fit> & 'why'")
    found = result(explored=(*result().explored, odd))
    text = page(problem, setting_of(problem), found, ["tandem", "plan", "--model", "opt 13b"])
    assert text.count("<svg") == 4, "curves, bars, both maps, numbers of workers"
    links = re.findall(r"""(?:src|href)\s*=\s*["']([^"'#][^"']*)""", text)
    assert links == [], "only references inside the page"
    assert "<script" not in text
    assert "does not &lt;fit&gt; &amp;" in text
    assert "<h1>Disaggregate: " in text
    assert "TTFT 250 ms and TPOT 100 ms" in text
    assert "tandem plan --model &#x27;opt 13b&#x27;" in text
    again = page(problem, setting_of(problem), replace(found, wall_s=99.0), ["tandem", "plan", "--model", "opt 13b"])
    assert again == text, "the same result, the same bytes, however long it took"


@pytest.mark.parametrize("suffix", [".html", ".png"])
def test_a_report_is_written_even_of_nothing(tmp_path: Path, suffix: str) -> None:
    nobody = result(infeasible="even one", disaggregated=None, colocated=None, explored=(), phases=(), marginal=())
    path = tmp_path / f"report{suffix}"
    save_report(path, opt(), setting_of(opt()), nobody)
    head = path.read_bytes()[:15]
    assert head.startswith(b"\x89PNG" if suffix == ".png" else b"<!DOCTYPE html>")


@pytest.mark.parametrize(("name", "error"), [("r.pdf", "ends in .html, .png"), ("none/r.png", "a folder that exists")])
def test_a_report_that_cannot_be_written_is_refused_at_once(tmp_path: Path, name: str, error: str) -> None:
    with pytest.raises(ValueError, match=error):
        check_report(tmp_path / name)


def test_a_plan_that_is_colocated_alone() -> None:
    alone = evaluated(mixed(1), 1.2)
    found = result(disaggregated=None, colocated=alone, explored=(alone,), difference=None, phases=())
    assert line_of(shown(opt(), found), "placement")[1] == "1 x mixed TP 1, 512 tokens a step, 256 rows"


def test_what_is_drawn_is_the_best_and_the_next_of_both_kinds() -> None:
    labels = [one.candidate.label for one in alternatives(result())]
    assert labels[:2] == ["1 x prefill TP 2 + 1 x decode TP 1", "3 x mixed TP 1, chunks of 512"]
    assert labels[2:] == ["2 x prefill TP 2 + 1 x decode TP 1", "4 x mixed TP 1, chunks of 512"]

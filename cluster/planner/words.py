"""A problem and its numbers as a person reads them: the same in the terminal, the report and the plan's file."""

from __future__ import annotations

import math
from pathlib import Path

from ..latency.links import Link
from ..latency.measured import MeasuredProfile
from ..workload.spec import Arrivals
from .problem import Problem
from .setting import Setting

BURSTY_CV = 2.0
"""Of recorded gaps, from which on a plan for Poisson arrivals says that the file's are others."""
POOR_STEPS, POOR_TRANSFERS = 0.25, 0.5
"""Held-out errors (p90) of a profile, above which a plan says what it stands on."""


def number(value: float) -> str:
    """Three digits that mean something, without an exponent where that is readable."""
    if not math.isfinite(value):
        return "-"
    if value == 0.0:
        return "0"
    if not 1e-4 <= abs(value) < 1e6:
        return f"{value:.3g}"
    return f"{value:.{max(0, 2 - math.floor(math.log10(abs(value))))}f}"


def signed(value: float) -> str:
    """The same with its sign."""
    return f"{'-' if value < 0 else '+'}{number(abs(value))}"


def gpus(count: int) -> str:
    """`1 GPU`, `4 GPUs`."""
    return f"{count} GPU{'' if count == 1 else 's'}"


def model_text(setting: Setting) -> str:
    """Name, parameters, precision."""
    facts = setting.device.facts
    return f"{facts.name}, {facts.parameters / 1e9:.3g} B parameters, {facts.dtype}"


def devices_text(setting: Setting) -> str:
    """How many of what, and their links."""
    nodes = f"{setting.nodes} node{'' if setting.nodes == 1 else 's'} x {setting.gpus_per_node} {_device(setting)}"
    between = f", {_link(setting.between)} between nodes" if setting.nodes > 1 else ""
    return f"{nodes}, {_link(setting.inside)} inside a node{between}"


def source_text(problem: Problem, setting: Setting) -> str:
    """Where step times come from; of a profile that misses what it has not seen, by how much."""
    if problem.profile is not None:
        measured = problem.measured()
        return f"profile {Path(problem.profile).name}{poor_text(measured) if measured is not None else ''}"
    return f"roofline of {setting.device.hardware.name}"


def poor_text(profile: MeasuredProfile) -> str:
    """What a plan by that profile should be told of it; empty: its errors are small."""
    held_out = profile.measured.held_out
    poor = [
        f"{kind} {errors.p90 * 100:.0f} %"
        for kind, errors in held_out.items()
        if errors.p90 > (POOR_TRANSFERS if kind.startswith("transfer") else POOR_STEPS)
    ]
    why = list(profile.measured.doubts)
    if poor:
        why.append(f"one point in ten that its fit had not seen was missed by more than: {', '.join(poor)}")
    if not why:
        return ""
    again = "" if profile.measured.doubts else "; measure again (tandem profile) with nothing else running"
    return f"; A POOR PROFILE: {'; '.join(why)}; what is planned is no better{again}"


def workload_text(problem: Problem) -> str:
    """Lengths and arrivals."""
    spec = problem.workload
    if spec.lengths is not None:
        lengths = f"lengths of {Path(spec.lengths).name}"
        caps = [
            f"{name} up to {most}"
            for name, most in (("prompts", spec.max_input_tokens), ("answers", spec.max_output_tokens))
            if most is not None
        ]
        lengths += f" ({', '.join(caps)})" if caps else ""
    else:
        prompt, answer = spec.lengths_without_file
        varied = f" +-{spec.range_ratio * 100:.0f} %" if spec.range_ratio else ""
        lengths = f"{prompt} tokens in, {answer} out{varied}"
    arrivals = "as recorded" if spec.arrivals is Arrivals.TRACE else spec.arrivals.value
    if spec.arrivals is Arrivals.GAMMA:
        arrivals += f" with burstiness {spec.burstiness:g}"
    return f"{lengths}; arrivals {arrivals}"


def loss_text(setting: Setting) -> str:
    """What a plan does not have of the workload's file: requests over the caps and the context, and bursts; empty: it
    has all of it.
    """
    load, parts = setting.workload, []
    cv, arrivals = load.recorded_cv, load.spec.arrivals
    if cv is not None and cv > BURSTY_CV and arrivals in (Arrivals.POISSON, Arrivals.CONSTANT):
        parts.append(
            f"THE FILE IS BURSTIER: its gaps vary by {number(cv)} of their mean, Poisson's by 1, and only its lengths "
            f"are planned for; --arrivals trace replays them, --burstiness {number(1 / cv**2)} draws such gaps (gamma)"
        )
    if load.dropped:
        whole, most = load.dropped + len(load.pool), setting.device.context_tokens
        parts.append(f"{load.dropped:,} of {whole:,} requests are left out: over the caps or the context of {most:,}")
    if load.clipped:
        parts.append(f"{load.clipped:,} are shortened to the caps")
    return f"; {'; '.join(parts)}" if parts else ""


def promises_text(problem: Problem) -> str:
    """Every class and what share of it must keep what."""
    classes = problem.workload.classes
    parts = []
    for name, kind in classes.items():
        promised = [
            f"{what} {seconds * 1e3:g} ms"
            for what, seconds in (("TTFT", kind.ttft_s), ("TPOT", kind.tpot_s))
            if seconds
        ]
        share = f" ({kind.share * 100:g} %)" if len(classes) > 1 else ""
        parts.append(f"{name}{share}: {' and '.join(promised) or 'nothing promised'}")
    return f"{'; '.join(parts)}; {problem.attainment * 100:g} % of each class"


def _device(setting: Setting) -> str:
    return setting.device.hardware.name


def _link(link: Link) -> str:
    return f"{number(link.bandwidth_gb_s)} GB/s"

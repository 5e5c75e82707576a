"""From what was measured to what predicts it: steps to a `StepProfile`, transfers to links; and the errors on what a
fit has not seen. Pure.

Both fits minimize relative errors, of medians. A held-out error is that of each point by a fit of the others: of five
fits, each of which lacks every fifth point, for steps; of as many fits as there are sizes for a link.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np
from scipy.optimize import nnls

from ..latency.links import LinkTerms
from ..latency.measured import MeasuredProfile, MeasuredStep, MeasuredTransfer, Measurement, PointErrors
from ..latency.profile import StepProfile
from ..latency.profile_fit import StepSample, fit_profile, predictions_held_out

MAX_GB_S = 1e6
MIN_SIZES = 3
"""Of a link: two terms, and one size to leave out."""
ALL = "all steps"


@dataclass(frozen=True, slots=True)
class StepFit:
    """A profile, and its errors by kind of step and on all of them."""

    profile: StepProfile
    fitted: dict[str, PointErrors]
    held_out: dict[str, PointErrors]


@dataclass(frozen=True, slots=True)
class LinkFit:
    """Links by transport, and the errors of each."""

    links: dict[str, LinkTerms]
    fitted: dict[str, PointErrors]
    held_out: dict[str, PointErrors]


def fitted_profile(measured: Measurement) -> MeasuredProfile:
    """The profile of what was measured, with its errors. ValueError as `fit_steps` and `fit_links`."""
    m = measured
    precision, threads = m.quantization or m.dtype, f"{m.threads} thread{'s' if m.threads > 1 else ''}"
    source = f"tandem profile: {m.model}, {precision}, {m.device}, {threads}; {m.machine}"
    steps, links = fit_steps(m.steps, source=source), fit_links(m.transfers)
    return MeasuredProfile(
        steps=steps.profile,
        measured=replace(
            m, links=links.links, fitted=steps.fitted | links.fitted, held_out=steps.held_out | links.held_out
        ),
    )


def fit_steps(steps: Mapping[str, MeasuredStep], *, source: str = "") -> StepFit:
    """The profile that says the steps best. ValueError if there are too few of a kind."""
    samples = [StepSample(*step.sizes, step.median_s) for step in steps.values()]
    profile, _ = fit_profile(samples, source=source)
    return StepFit(
        profile,
        _by_kind(steps, [profile.step_time_s(*step.sizes) for step in steps.values()]),
        _by_kind(steps, predictions_held_out(samples)),
    )


def fit_links(transfers: Mapping[str, MeasuredTransfer]) -> LinkFit:
    """One link for each transport. ValueError naming one of which there are too few sizes."""
    fit = LinkFit({}, {}, {})
    for name in dict.fromkeys(transfer.link for transfer in transfers.values()):
        size, seconds = np.array([(t.size_bytes, t.median_s) for t in transfers.values() if t.link == name]).T
        if len(size) < MIN_SIZES:
            raise ValueError(f"transfers: {len(size)} sizes over {name} are too few; allowed: {MIN_SIZES} and more")
        latency_s, byte_s = _line(size, seconds)
        kept = [np.arange(len(size)) != number for number in range(len(size))]
        unseen = [_line(size[keep], seconds[keep]) for keep in kept]
        terms = LinkTerms(bandwidth_gb_s=min(MAX_GB_S, 1e-9 / max(byte_s, 1e-15)), latency_us=latency_s * 1e6)
        fit.links[name] = terms
        fit.fitted[f"transfer {name}"] = errors(latency_s + byte_s * size, seconds)
        predicted = [unseen[number][0] + unseen[number][1] * size[number] for number in range(len(size))]
        fit.held_out[f"transfer {name}"] = errors(predicted, seconds)
    return fit


def errors(predicted: Iterable[float], measured: Iterable[float]) -> PointErrors:
    """|predicted / measured - 1| of at least one point."""
    error = np.abs(np.array(list(predicted)) / np.array(list(measured)) - 1.0)
    median, p90 = (float(np.quantile(error, share)) for share in (0.5, 0.9))
    return PointErrors(median=median, p90=p90, worst=float(error.max()), points=len(error))


def _line(size: np.ndarray, seconds: np.ndarray) -> tuple[float, float]:
    """(seconds of nothing, seconds of a byte), both >= 0, that say the points with the least relative error."""
    scale = float(size.max())
    terms, _ = nnls(np.stack([1.0 / seconds, size / scale / seconds], axis=1), np.ones(len(size)))
    return float(terms[0]), float(terms[1]) / scale


def _by_kind(steps: Mapping[str, MeasuredStep], predicted: list[float]) -> dict[str, PointErrors]:
    pairs: dict[str, list[tuple[float, float]]] = {}
    for step, seconds in zip(steps.values(), predicted, strict=True):
        for kind in (step.kind, ALL):
            pairs.setdefault(kind, []).append((seconds, step.median_s))
    return {kind: errors(*zip(*found, strict=True)) for kind, found in sorted(pairs.items())}

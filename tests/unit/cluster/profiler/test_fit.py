"""Fits of what was measured, and their errors on what they have not seen."""

from __future__ import annotations

import random

import pytest
from tandem.cluster.latency.links import Link
from tandem.cluster.latency.measured import MeasuredStep, MeasuredTransfer
from tandem.cluster.latency.profile import DecodeTerms, StepProfile
from tandem.cluster.profiler.fit import ALL, errors, fit_links, fit_steps
from tandem.cluster.profiler.points import Grid

TERMS = DecodeTerms(step_s=0.011, row_s=0.0035, context_token_s=4e-6)
TRUE = StepProfile(
    prefill_step_s=0.008,
    prefill_token_s=0.0029,
    prefill_square_s=6e-7,
    decode=TERMS,
    large_decode=TERMS,
    large_batch_rows=1,
)


def measured(noise: float = 0.0, wild: str = "") -> dict[str, MeasuredStep]:
    """Three times a point; the step named `wild` takes twice as long."""
    draw, found = random.Random(5), {}
    for point in Grid().points():
        prefill, squares, rows, context = point.sizes
        seconds = TRUE.step_time_s(*point.sizes) * (2.0 if point.name == wild else 1.0)
        times = tuple(seconds * (1 + draw.uniform(-noise, noise)) for _ in range(3))
        found[point.name] = MeasuredStep(
            prefill_tokens=prefill, prefill_squares=squares, decode_rows=rows, context_tokens=context, times_s=times
        )
    return found


def test_terms_are_found_again_and_errors_told_by_kind() -> None:
    fit = fit_steps(measured(), source="here")
    assert fit.profile.source == "here"
    for point in Grid().points():
        assert fit.profile.step_time_s(*point.sizes) == pytest.approx(TRUE.step_time_s(*point.sizes), rel=1e-6)
    assert {kind: error.points for kind, error in fit.held_out.items()} == {
        ALL: 37, "decode": 18, "mixed": 8, "prefill": 11
    }  # fmt: skip
    assert max(error.worst for error in fit.held_out.values()) < 1e-6


def test_every_point_is_judged_by_a_fit_that_has_not_seen_it() -> None:
    """One that is far off shows as such: a fit that had seen it would bend towards it."""
    fit = fit_steps(measured(wild="decode 32 x 1024"))
    assert fit.held_out["decode"].worst == pytest.approx(0.5, abs=0.03), "half of what was measured"
    assert fit.fitted["decode"].worst < fit.held_out["decode"].worst


def test_noise_shows_in_the_errors() -> None:
    fit = fit_steps(measured(noise=0.05))
    assert 0.005 < fit.held_out[ALL].median < 0.05
    assert fit.fitted[ALL].median <= fit.held_out[ALL].median


def test_too_few_steps_are_refused() -> None:
    steps = {name: step for name, step in measured().items() if step.kind != "decode"}
    steps = dict(list(steps.items())[:6])
    with pytest.raises(ValueError, match="0 of decode steps are too few"):
        fit_steps(steps)


def transfers(link: Link, sizes: tuple[int, ...], factor: float = 1.0) -> dict[str, MeasuredTransfer]:
    return {
        f"{link.name} {size}": MeasuredTransfer(
            link=link.name, size_bytes=size, times_s=(link.transfer_time_s(size) * factor,) * 3
        )
        for size in sizes
    }


def test_links_are_found_again() -> None:
    mapped = Link(name="mapped", bandwidth_gb_s=2.5, latency_us=700)
    grpc = Link(name="grpc", bandwidth_gb_s=0.8, latency_us=3000)
    sizes = (2**20, 2**24, 2**26)
    fit = fit_links(transfers(mapped, sizes) | transfers(grpc, sizes))
    for true in (mapped, grpc):
        assert fit.links[true.name].bandwidth_gb_s == pytest.approx(true.bandwidth_gb_s)
        assert fit.links[true.name].latency_us == pytest.approx(true.latency_us)
        assert fit.held_out[f"transfer {true.name}"].worst < 1e-6
        assert fit.fitted[f"transfer {true.name}"].points == 3


def test_a_link_of_too_few_sizes_is_named() -> None:
    with pytest.raises(ValueError, match="transfers: 2 sizes over ib are too few; allowed: 3 and more"):
        fit_links(transfers(Link(name="ib", bandwidth_gb_s=1.0), (2**20, 2**21)))
    assert fit_links({}).links == {}


def test_errors_are_relative_to_what_was_measured() -> None:
    found = errors([1.1, 1.0, 0.5], [1.0, 1.0, 1.0])
    assert (found.median, found.worst, found.points) == (pytest.approx(0.1), pytest.approx(0.5), 3)

"""How long a step of a given shape takes on a given machine, finer than the linear model (`linear`): what the
paced device and claims in virtual time run on.

    step time = fixed + prefill_token_s · Σ l + prefill_square_s · Σ l²        prompts, l tokens each
                      + row_s · rows + context_token_s · Σ context             decode rows, with the token they compute
                      + overhead_s + overhead_token_s · (Σ l + Σ context)

`fixed` is prefill's in a step of prompts and decode's in a step of decode rows. In a mixed step it is the larger of the
two, not their sum: weights are read once and kernels launched once for both (Sarathi-Serve, OSDI '24, §3.3), which is
the reading that favors colocation. A chunk of a prompt costs `end² - start²` of Σ l², so that the chunks of a prompt
add up to the whole. From `large_batch_rows` on decode follows other terms. The form is that of DistServe (OSDI '24,
appendix A).

The terms are those of the whole step, through all `pipeline_stages`. A stage is taken for its share of them, and the
first one for the overhead as well:

    stage = (whole - overhead) / pipeline_stages + overhead
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from ..types import StepTimeCoefficients
from .interface import StepRun

MAX_FILE_BYTES = 2**20
MEASURED = "measured"
"""A section that a measured profile's file has besides (`measured`)."""
MAX_STEP_S = 3600.0
_MS = 1e-3
_FIRST_STAGE_S, _FIRST_STAGE_TOKEN_S = 2e-3, 1e-7
"""DistServe's simulator: what its control plane adds to a step, at the first stage of a pipeline."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeTerms:
    """What decode rows cost, seconds."""

    step_s: float
    row_s: float
    context_token_s: float

    def __post_init__(self) -> None:
        _check_seconds(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepProfile:
    """The terms above, seconds: a `StepCosts`. ValueError names one that is negative, not finite or above an hour."""

    prefill_step_s: float
    prefill_token_s: float
    prefill_square_s: float = 0.0
    decode: DecodeTerms
    large_decode: DecodeTerms
    """From `large_batch_rows` decode rows on."""
    large_batch_rows: int
    overhead_s: float = 0.0
    overhead_token_s: float = 0.0
    pipeline_stages: int = 1
    source: str = ""
    """Where the numbers are from, for whoever reads the file."""

    def __post_init__(self) -> None:
        _check_seconds(self)
        for name in ("large_batch_rows", "pipeline_stages"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ValueError(f"{name}: {value!r} is not allowed; allowed: an integer >= 1")

    def step_time_s(self, prefill_tokens: int, prefill_squares: int, decode_rows: int, context_tokens: int) -> float:
        """Seconds of one whole step; its shape as `cluster.engine.step_shape` counts it."""
        decode = self.decode if decode_rows < self.large_batch_rows else self.large_decode
        fixed_s = max(self.prefill_step_s if prefill_tokens else 0.0, decode.step_s if decode_rows else 0.0)
        prefill_s = self.prefill_token_s * prefill_tokens + self.prefill_square_s * prefill_squares
        decode_s = decode.row_s * decode_rows + decode.context_token_s * context_tokens
        overhead_s = self.overhead_s + self.overhead_token_s * (prefill_tokens + context_tokens)
        return fixed_s + prefill_s + decode_s + overhead_s

    def stage_time_s(self, prefill_tokens: int, prefill_squares: int, decode_rows: int, context_tokens: int) -> float:
        """Seconds that the first stage, the slowest one, is taken."""
        whole_s = self.step_time_s(prefill_tokens, prefill_squares, decode_rows, context_tokens)
        if self.pipeline_stages == 1:
            return whole_s
        overhead_s = self.overhead_s + self.overhead_token_s * (prefill_tokens + context_tokens)
        return (whole_s - overhead_s) / self.pipeline_stages + overhead_s

    def decode_steps(self, rows: int, context_tokens: int, steps: int) -> StepRun:
        """Ends of consecutive decode steps of the same rows, [steps]; see `StepCosts.decode_steps`."""
        decode = self.decode if rows < self.large_batch_rows else self.large_decode
        growth_s = (decode.context_token_s + self.overhead_token_s) * rows
        return StepRun(self.step_time_s(0, 0, rows, context_tokens), growth_s, steps)

    @classmethod
    def linear(cls, terms: StepTimeCoefficients) -> StepProfile:
        """The linear model as a profile."""
        decode = DecodeTerms(step_s=terms.step_s, row_s=terms.decode_row_s, context_token_s=terms.context_token_s)
        return cls(
            prefill_step_s=terms.step_s,
            prefill_token_s=terms.prefill_token_s,
            decode=decode,
            large_decode=decode,
            large_batch_rows=1,
        )

    def scaled(self, factor: float) -> StepProfile:
        """A machine that takes `factor` times as long for everything."""
        values = _mapped(asdict(self), lambda seconds: seconds * factor)
        return step_profile(values, "factor")

    def save(self, path: str | Path) -> None:
        """Writes the file that `read_profile` reads. Raises OSError."""
        Path(path).write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")


def read_profile(path: str | Path) -> StepProfile:
    """The profile in a JSON file of StepProfile's fields, or in one of `tandem profile`, which has them too. ValueError
    naming the file and what is wrong with it.
    """
    values = read_json(path)
    values.pop(MEASURED, None)
    return step_profile(values, str(path))


def distserve_profile(
    path: str | Path, model: str, *, tensor_parallel: int = 1, pipeline_stages: int = 1
) -> StepProfile:
    """A profile out of a file of DistServe's simulator (milliseconds by model and tensor parallelism).

    Its worker of a stage takes (a + b·Σ l + c·Σ l²)/pp + pp for prefill, (a + b·Σ context + c·rows)/pp for decode, with
    other coefficients from a batch of `decoding_large_small_bs_threshold` on; and the first stage 2 + 1e-4·Σ tokens
    more. So the whole is a + b·Σ l + c·Σ l² + pp², or a + b·Σ context + c·rows, and the overhead once. A coefficient
    below zero is taken for zero (c of vLLM's OPT-66B at TP 2: 4 % of a prompt of 2048 tokens). ValueError naming what
    the file lacks.
    """
    data = read_json(path)
    entry: Any = data
    for key in (model, str(tensor_parallel)):
        entry = entry.get(key) if isinstance(entry, Mapping) else None
        if entry is None:
            known = ", ".join(sorted(data))
            raise ValueError(
                f"profile: {path} has no {model!r} at tensor parallelism {tensor_parallel}; it has {known}"
            )
    try:
        a, b, c = (max(float(value), 0.0) * _MS for value in entry["prefill"])
        small, large = (_decode_terms(entry[name]) for name in ("decoding_smallbs", "decoding_largebs"))
        threshold = entry["decoding_large_small_bs_threshold"]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"profile: {path}: {model!r} is not what DistServe's files hold ({error!r})") from None
    return StepProfile(
        prefill_step_s=a + pipeline_stages**2 * _MS,
        prefill_token_s=b,
        prefill_square_s=c,
        decode=small,
        large_decode=large,
        large_batch_rows=threshold,
        overhead_s=_FIRST_STAGE_S,
        overhead_token_s=_FIRST_STAGE_TOKEN_S,
        pipeline_stages=pipeline_stages,
        source=f"DistServe's simulator, {Path(path).name}: {model}, TP {tensor_parallel}, PP {pipeline_stages}",
    )


def _decode_terms(coefficients: Any) -> DecodeTerms:
    a, b, c = (float(value) * _MS for value in coefficients)
    return DecodeTerms(step_s=a, context_token_s=b, row_s=c)


def read_json(path: str | Path) -> dict[str, Any]:
    """A file's JSON object. ValueError naming the file and what is wrong with it."""
    try:
        if Path(path).stat().st_size > MAX_FILE_BYTES:
            raise ValueError(f"profile: {path} is larger than {MAX_FILE_BYTES} bytes")
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        missing = isinstance(error, FileNotFoundError)
        hint = f"; `tandem profile --output {Path(path).name}` measures one" if missing else ""
        raise ValueError(f"profile: {path} cannot be read ({error.strerror or error}){hint}") from None
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"profile: {path} is not JSON ({error})") from None
    if not isinstance(data, dict):
        raise ValueError(f"profile: {path} is no JSON object")
    return data


def step_profile(values: Mapping[str, Any], where: str) -> StepProfile:
    """A profile of StepProfile's fields as plain values. ValueError naming a key that is missing, unknown or out of
    its range.
    """
    parts = {name: _terms(values.get(name), f"{where}: {name}") for name in ("decode", "large_decode")}
    try:
        return StepProfile(**{**values, **parts})
    except TypeError as error:
        allowed = ", ".join(item.name for item in fields(StepProfile))
        raise ValueError(f"profile: {where}: {error}; allowed: {allowed}") from None
    except ValueError as error:
        raise ValueError(f"profile: {where}: {error}") from None


def _terms(values: Any, where: str) -> DecodeTerms:
    names = [item.name for item in fields(DecodeTerms)]
    if not isinstance(values, Mapping) or sorted(values) != sorted(names):
        raise ValueError(f"profile: {where} is not allowed; allowed: {', '.join(names)}")
    try:
        return DecodeTerms(**values)
    except ValueError as error:
        raise ValueError(f"profile: {where}.{error}") from None


def _mapped(values: Mapping[str, Any], change: Any) -> dict[str, Any]:
    """The values with every field of seconds changed."""
    return {
        name: _mapped(value, change) if isinstance(value, Mapping) else change(value) if name.endswith("_s") else value
        for name, value in values.items()
    }


def _check_seconds(terms: DecodeTerms | StepProfile) -> None:
    for item in fields(terms):
        value = getattr(terms, item.name)
        if not item.name.endswith("_s"):
            continue
        number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if not (number and 0.0 <= value <= MAX_STEP_S):
            raise ValueError(f"{item.name}: {value!r} is not allowed; allowed: seconds from 0 to {MAX_STEP_S:g}")

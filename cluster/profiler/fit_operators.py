"""Fits the constants of GPU operators to published measurements and writes them into the hardware files.

    python -m tandem.cluster.profiler.fit_operators DATA [--write]

DATA holds `aiconfigurator/` and `vidur/`. Every fifth group of samples (a weight shape, a set of heads, a size) and
whole models of Vidur are left out of the fit; the errors on them are printed and stored beside the constants. The fit
minimizes the logarithm of predicted over measured, with a loss that outliers hardly move, and takes as many points of
each source of an operator. One set of constants for each device, whatever the model.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray
from scipy.optimize import least_squares

from ..config_file import read_yaml
from ..latency.hardware import FOLDER
from ..latency.operators import (
    AllReduceTerms,
    DecodeAttentionTerms,
    GemmTerms,
    Peaks,
    PrefillAttentionTerms,
    all_reduce_s,
    decode_attention_s,
    elementwise_s,
    gemm_s,
    prefill_attention_s,
)
from . import operator_data as data

Array = NDArray[np.float64]
MARK = "# Generated below: fit_operators."
HELD_OUT_EVERY = 5
MAX_POINTS = 3000
"""Of one source in a fit: more do not move five constants."""
_LOSS_SCALE = 0.1
_ELEMENT_BYTES = 2
_DIGITS = 4


@dataclass(frozen=True, slots=True)
class Fit:
    """Constants of one operator by name, and the errors on what was left out, by what that was."""

    terms: dict[str, float]
    held_out: dict[str, dict[str, float]]


Model = Callable[[Mapping[str, float], data.Samples], Any]


def fit(model: Model, start: Mapping[str, float], fitted: Sequence[data.Samples]) -> dict[str, float]:
    """Constants > 0 that predict the samples best, from `start`; see the module."""
    points = min(MAX_POINTS, *(len(source) for source in fitted))
    chosen = [_at_most(source, points) for source in fitted]

    def residuals(logs: Array) -> Array:
        terms = dict(zip(start, np.exp(logs), strict=True))
        ratios: Array = np.concatenate([model(terms, source) / source.seconds for source in chosen])
        return np.log(ratios)

    found = least_squares(residuals, np.log(list(start.values())), loss="soft_l1", f_scale=_LOSS_SCALE)
    return _rounded_terms(dict(zip(start, np.exp(found.x).tolist(), strict=True)))


def errors(model: Model, terms: Mapping[str, float], samples: data.Samples) -> dict[str, float]:
    """Median and 90th percentile of the relative error."""
    error = np.abs(model(terms, samples) / samples.seconds - 1.0)
    return {
        "median": _rounded(float(np.median(error))),
        "p90": _rounded(float(np.quantile(error, 0.9))),
        "points": len(samples),
    }


def split(samples: data.Samples) -> tuple[data.Samples, data.Samples]:
    """(fitted, held out): every fifth group is held out."""
    out = samples.group % HELD_OUT_EVERY == HELD_OUT_EVERY - 1
    return samples.where(~out), samples.where(out)


GEMM_START = {"launch_us": 4.0, "compute_share": 0.7, "inner_ns": 0.3, "bandwidth_share": 0.8, "overlap_power": 1.0}
"""Where fits begin; the power counts from 1, below which it has no meaning."""


def fit_gemm(folder: Path, files: data.OperatorFiles, peaks: Peaks) -> Fit:
    """Matrix products of bfloat16, of both sources."""
    fitted, out = split(data.gemm_samples(folder / files.gemm))
    models = [data.model_gemm_samples(folder / name) for name in files.fitted_models]
    model = _gemm_model(peaks, _ELEMENT_BYTES)
    terms = fit(model, GEMM_START, [fitted, _joined(models)])
    held = {"gemm": errors(model, terms, out)}
    for name in files.held_out_models:
        held[f"gemm of {_model_name(name)}"] = errors(model, terms, data.model_gemm_samples(folder / name))
    return Fit(_rounded_terms(_gemm_terms(terms)), held)


def fit_gemm_8bit(folder: Path, files: data.OperatorFiles, peaks: Peaks) -> Fit:
    """Matrix products of fp8, without quantizing what goes in; `peaks` are those of fp8."""
    fitted, out = split(data.gemm_samples(folder / files.gemm, "fp8"))
    model = _gemm_model(peaks, 1)
    terms = fit(model, GEMM_START, [fitted])
    return Fit(_rounded_terms(_gemm_terms(terms)), {"gemm_8bit": errors(model, terms, out)})


def _gemm_terms(found: Mapping[str, float]) -> dict[str, float]:
    return dict(found) | {"overlap_power": 1.0 + found["overlap_power"]}


def _gemm_model(peaks: Peaks, weight_bytes: int) -> Model:
    def model(terms: Mapping[str, float], samples: data.Samples) -> Any:
        s = samples.sizes
        return gemm_s(GemmTerms(**_gemm_terms(terms)), peaks, s["m"], s["n"], s["k"], weight_bytes, _ELEMENT_BYTES)

    return model


def fit_prefill(folder: Path, files: data.OperatorFiles, peaks: Peaks) -> Fit:
    """Attention of prompts."""

    def model(terms: Mapping[str, float], samples: data.Samples) -> Any:
        s = samples.sizes
        start = s.get("start", np.zeros(len(samples)))
        moved = 2 * _ELEMENT_BYTES * s["batch"] * (s["length"] - start) * (s["heads"] + s["kv_heads"]) * s["head_dim"]
        squares = s["batch"] * (s["length"] ** 2 - start**2)
        return prefill_attention_s(PrefillAttentionTerms(**terms), peaks, squares, moved, s["heads"], s["head_dim"])

    fitted, out = split(data.prefill_samples(folder / files.prefill))
    terms = fit(model, {"launch_us": 10.0, "compute_share": 0.5, "length_ns": 1.0, "bandwidth_share": 0.8}, [fitted])
    return Fit(terms, {"prefill_attention": errors(model, terms, out)} | _older(model, terms, folder, files, True))


def fit_decode(folder: Path, files: data.OperatorFiles, peaks: Peaks) -> Fit:
    """Attention of decode rows."""

    def model(terms: Mapping[str, float], samples: data.Samples) -> Any:
        s = samples.sizes
        kv_bytes = 2 * _ELEMENT_BYTES * s["batch"] * s["context"] * s["kv_heads"] * s["head_dim"]
        return decode_attention_s(DecodeAttentionTerms(**terms), peaks, s["batch"], s["kv_heads"], kv_bytes)

    fitted, out = split(data.decode_samples(folder / files.decode))
    terms = fit(model, {"launch_us": 10.0, "bandwidth_share": 0.8, "row_ns": 20.0}, [fitted])
    return Fit(terms, {"decode_attention": errors(model, terms, out)} | _older(model, terms, folder, files, False))


def _older(
    model: Model, terms: Mapping[str, float], folder: Path, files: data.OperatorFiles, prompts: bool
) -> dict[str, dict[str, float]]:
    """Errors on Vidur's attention, where there is a file of it."""
    if files.attention is None:
        return {}
    samples = data.model_attention_samples(folder / files.attention, prompts=prompts)
    name = f"{'prefill' if prompts else 'decode'}_attention of Vidur, older kernels"
    return {name: errors(model, terms, samples)}


def fit_elementwise(folder: Path, files: data.OperatorFiles, peaks: Peaks) -> Fit:
    """Norms, activations, residuals: one launch for all, a share of the bandwidth for each."""
    kinds = list(data.ELEMENTWISE)

    def read(names: Sequence[str]) -> list[data.Samples]:
        return [
            _marked(_joined([data.elementwise_samples(folder / name, operators) for name in names]), kind)
            for kind, operators in enumerate(data.ELEMENTWISE.values())
        ]

    def model(terms: Mapping[str, float], samples: data.Samples) -> Any:
        share = np.array([terms[kind] for kind in kinds])[samples.sizes["kind"].astype(int)]
        return elementwise_s(terms["launch_us"], share, peaks, samples.sizes["bytes"])

    terms = fit(model, {"launch_us": 2.0} | dict.fromkeys(kinds, 0.5), read(files.fitted_models))
    out = read(files.held_out_models)
    return Fit(terms, {f"elementwise: {kind}": errors(model, terms, s) for kind, s in zip(kinds, out, strict=True)})


def fit_all_reduce(folder: Path, files: data.OperatorFiles) -> Fit:
    """All-reduces inside a node, of one source; the other one is left out, and so is every fifth size."""

    def model(terms: Mapping[str, float], samples: data.Samples) -> Any:
        return all_reduce_s(AllReduceTerms(**terms), samples.sizes["ranks"], samples.sizes["bytes"])

    benchmark = data.all_reduce_samples(folder / files.collectives)
    engine = data.network_all_reduce_samples(folder / files.all_reduce)
    ours, other, name = (engine, benchmark, "NCCL's benchmark") if files.launches else (benchmark, engine, "Vidur")
    fitted, out = split(ours)
    terms = fit(model, {"launch_us": 20.0, "rank_us": 2.0, "bandwidth_gb_s": 200.0}, [fitted])
    return Fit(terms, {"all_reduce": errors(model, terms, out), f"all_reduce of {name}": errors(model, terms, other)})


def fit_link(folder: Path, files: data.OperatorFiles, *, inside_node: bool) -> Fit:
    """One device sending to another."""

    def model(terms: Mapping[str, float], samples: data.Samples) -> Any:
        return terms["latency_us"] * 1e-6 + samples.sizes["bytes"] / (terms["bandwidth_gb_s"] * 1e9)

    fitted, out = split(data.send_samples(folder / files.send_recv, inside_node=inside_node))
    terms = fit(model, {"bandwidth_gb_s": 50.0, "latency_us": 10.0}, [fitted])
    where = "inside a node" if inside_node else "between nodes"
    return Fit(terms, {f"send {where}": errors(model, terms, out)})


def fit_device(folder: Path, name: str) -> dict[str, Any]:
    """The generated part of a device's file. ValueError naming a file of the data that cannot be read."""
    facts, files = read_yaml(FOLDER / f"{name}.yaml"), data.FILES[name]
    tflops = facts["peak_tflops"]
    peaks = Peaks(tflops["bfloat16"] * 1e12, facts["memory_bandwidth_gb_s"] * 1e9)
    fits = {
        "gemm": fit_gemm(folder, files, peaks),
        "prefill_attention": fit_prefill(folder, files, peaks),
        "decode_attention": fit_decode(folder, files, peaks),
        "elementwise": fit_elementwise(folder, files, peaks),
        "all_reduce": fit_all_reduce(folder, files),
    }
    if "fp8" in tflops:
        fits["gemm_8bit"] = fit_gemm_8bit(folder, files, replace(peaks, flops_s=tflops["fp8"] * 1e12))
    links = {
        where: fit_link(folder, files, inside_node=where == "intra_node") for where in ("intra_node", "inter_node")
    }
    held_out = {k: v for fitted in (*fits.values(), *links.values()) for k, v in fitted.held_out.items()}
    return {
        **{where: fitted.terms for where, fitted in links.items()},
        "terms": {operator: fitted.terms for operator, fitted in fits.items()},
        "held_out": held_out,
    }


def write_device(name: str, generated: Mapping[str, Any]) -> None:
    """Puts the generated part below the mark of the device's file. ValueError if the file has no mark."""
    path = FOLDER / f"{name}.yaml"
    by_hand, mark, _ = path.read_text(encoding="utf-8").partition(MARK)
    if not mark:
        raise ValueError(f"{path} has no line {MARK!r}")
    text = yaml.safe_dump(dict(generated), sort_keys=False, default_flow_style=None, width=120)
    path.write_text(f"{by_hand}{mark}\n{text}", encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; see the module."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("data", type=Path, help="folder with aiconfigurator/ and vidur/")
    parser.add_argument("--write", action="store_true", help="write the constants into the hardware files")
    options = parser.parse_args(arguments)
    for name in data.FILES:
        try:
            generated = fit_device(options.data, name)
        except ValueError as error:
            print(error, file=sys.stderr)
            return 1
        print(f"{name}: relative error on what was left out of the fit")
        for operator, error_terms in generated["held_out"].items():
            print("  {:45} median {median:7.1%}  p90 {p90:7.1%}  {points:6} points".format(operator, **error_terms))
        for operator, terms in (generated["terms"] | {k: generated[k] for k in ("intra_node", "inter_node")}).items():
            print(f"  {operator}: " + ", ".join(f"{term} {value:g}" for term, value in terms.items()))
        if options.write:
            write_device(name, generated)
    return 0


def _at_most(samples: data.Samples, points: int) -> data.Samples:
    if len(samples) <= points:
        return samples
    chosen = np.zeros(len(samples), dtype=bool)
    chosen[np.random.default_rng(0).choice(len(samples), points, replace=False)] = True
    return samples.where(chosen)


def _joined(sources: Sequence[data.Samples]) -> data.Samples:
    sizes = {name: np.concatenate([source.sizes[name] for source in sources]) for name in sources[0].sizes}
    seconds, group = (np.concatenate([getattr(source, name) for source in sources]) for name in ("seconds", "group"))
    return data.Samples(sizes, seconds, group)


def _marked(samples: data.Samples, kind: int) -> data.Samples:
    return data.Samples(samples.sizes | {"kind": np.full(len(samples), float(kind))}, samples.seconds, samples.group)


def _model_name(path: str) -> str:
    return Path(path).name.removeprefix("compute_").partition("_")[2].removesuffix("_mlp.csv.gz")


def _rounded_terms(terms: Mapping[str, float]) -> dict[str, float]:
    return {name: _rounded(value) for name, value in terms.items()}


def _rounded(value: float) -> float:
    return float(f"{value:.{_DIGITS}g}")


if __name__ == "__main__":
    sys.exit(main())

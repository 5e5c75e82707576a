"""The promises of a load as `tandem plan` and `tandem simulate` are told them: `--goodput` or several `--slo-class`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from .config_schema import ConfigError

_CLASS = "NAME:SHARE:ttft:MS:tpot:MS, e.g. chat:0.8:ttft:250:tpot:100"


def slo_classes(given: Mapping[str, list[str] | None]) -> dict[str, dict[str, float]]:
    """The section `slo_classes` of a workload out of the options `goodput` and `slo_class`; empty: neither was given.
    ConfigError naming the option.
    """
    from .workload.spec import DEFAULT_CLASS

    goodput, classes = given["goodput"], given["slo_class"]
    if goodput and classes:
        raise ConfigError("slo_class", classes[0], "without goodput: promises of one class, or several classes")
    if goodput:
        return {DEFAULT_CLASS: _promises("goodput", goodput)}
    found: dict[str, dict[str, float]] = {}
    for text in classes or ():
        name, section = _slo_class(text)
        if name in found:
            raise ConfigError("slo_class", text, f"each class once, and {name} is there twice")
        found[name] = section
    return found


def _slo_class(text: str) -> tuple[str, dict[str, float]]:
    """`chat:0.8:ttft:250:tpot:100` to its name and its section; without promises: requests that nothing is promised."""
    name, *words = text.split(":")
    try:
        share = float(words[0])
    except (IndexError, ValueError):
        raise ConfigError("slo_class", text, _CLASS) from None
    if not name.strip() or len(words) % 2 == 0:
        raise ConfigError("slo_class", text, _CLASS)
    if not 0.0 < share <= 1.0:
        raise ConfigError("slo_class", text, f"a share above 0, at most 1: {_CLASS}")
    pairs = [f"{metric}:{limit}" for metric, limit in zip(words[1::2], words[2::2], strict=True)]
    return name, {"share": share, **_promises("slo_class", pairs)}


def _promises(option: str, pairs: Sequence[str]) -> dict[str, float]:
    """`["ttft:250", "tpot:100"]` to seconds."""
    from .workload.report import parse_goodput
    from .workload.spec import MAX_PROMISE_S

    for pair in pairs:
        if pair.partition(":")[0] not in ("ttft", "tpot"):
            raise ConfigError(option, pair, "ttft:MS, tpot:MS or both")
    try:
        promises_ms = parse_goodput(pairs)
    except ValueError as error:
        raise ValueError(f"{option}: {str(error).removeprefix('goodput: ')}") from None
    for metric, limit in promises_ms.items():
        if limit > MAX_PROMISE_S * 1e3:
            raise ConfigError(option, f"{metric}:{limit:g}", f"milliseconds above 0, at most {MAX_PROMISE_S * 1e3:g}")
    return {f"{metric}_s": limit / 1e3 for metric, limit in promises_ms.items()}

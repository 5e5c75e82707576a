"""What `tandem bench serve` is told, checked in one place; named as `vllm bench serve` names it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..tls import ClientTLS
from ..workload.report import METRICS
from .client import CHAT, COMPLETIONS

BACKENDS = ("openai", "openai-chat", "tandem-grpc")
DATASETS = ("prompts", "random", "trace")
OVER_LENGTH = ("clip", "drop")
RAMPS = ("linear", "exponential")
HTTP_URL, GRPC_URL = "http://127.0.0.1:8000", "127.0.0.1:8001"
MAX_PROMPTS = 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchOptions:
    """What to send, where, and what is promised. Raises ValueError naming field, value and what is allowed."""

    base_url: str | None = None
    """None: HTTP_URL, or GRPC_URL for tandem-grpc."""
    backend: str | None = None
    """`openai`: completions. `openai-chat`: chat. `tandem-grpc`: tandem.v1. None: by endpoint or dataset."""
    endpoint: str | None = None
    """Path that ends in /completions or /chat/completions; None: the backend's."""
    model: str | None = None
    """None: the first that the server lists."""
    dataset_name: str = "prompts"
    dataset_path: str | None = None
    """`prompts`: a .jsonl or .jsonl.gz file; None: the package's own. `trace`: a recorded load (`bench.traces`)."""
    num_prompts: int = 100
    output_len: int = 64
    """`prompts`: max_tokens of each request."""
    random_input_len: int = 1024
    random_output_len: int = 128
    random_range_ratio: float = 0.0
    """Lengths are drawn evenly from [length x (1 - ratio), length x (1 + ratio)]."""
    max_input_len: int | None = None
    max_output_len: int | None = None
    over_length: str = "clip"
    """What is done to a trace's requests over those two: `clip` them, or `drop` them."""
    rate_scale: float = 1.0
    """A recorded trace is sent this many times faster than it was recorded."""
    request_rate: float = math.inf
    """Requests per second; inf: all at once, or as the trace recorded it."""
    burstiness: float = 1.0
    ramp_up_strategy: str | None = None
    ramp_up_start_rps: float | None = None
    ramp_up_end_rps: float | None = None
    max_concurrency: int | None = None
    goodput_ms: Mapping[str, float] = field(default_factory=dict)
    """Promises by metric: ttft, tpot, e2el."""
    percentiles: tuple[float, ...] = (90.0, 99.0)
    percentile_metrics: tuple[str, ...] = METRICS
    """Which metrics the table and the saved result have."""
    num_warmups: int = 1
    """Requests sent one after the other before the run, not counted; none of the run's own prompts."""
    temperature: float | None = None
    ignore_eos: bool = False
    """`prompts`: answers run to max_tokens; those of the other datasets always do."""
    extra_body: Mapping[str, Any] = field(default_factory=dict)
    vocab_size: int | None = None
    """Random token ids are drawn below it; None: the server is asked."""
    seed: int = 0
    label: str | None = None
    metadata: tuple[tuple[str, str], ...] = ()
    """Added to the saved result."""
    api_key: str | None = None
    tls: ClientTLS = field(default_factory=ClientTLS)
    timeout_s: float = 600.0
    headers: tuple[tuple[str, str], ...] = ()
    """Sent with every request: an SLO class, say."""

    def __post_init__(self) -> None:
        _among("backend", self.backend, BACKENDS, optional=True)
        _among("dataset_name", self.dataset_name, DATASETS)
        _among("over_length", self.over_length, OVER_LENGTH)
        _among("ramp_up_strategy", self.ramp_up_strategy, RAMPS, optional=True)
        for metric in self.percentile_metrics:
            _among("percentile_metrics", metric, METRICS)
        if self.dataset_name == "trace" and self.dataset_path is None:
            raise ValueError("dataset_path: is missing; allowed: the file of a recorded load")
        if self.dataset_name == "random" and self.dataset_path is not None:
            raise ValueError(f"dataset_path: {self.dataset_path!r} is not allowed; allowed with prompts and trace")
        for name, low, high in (("num_prompts", 1, MAX_PROMPTS), ("output_len", 1, None), ("num_warmups", 0, 1000)):
            _within(name, getattr(self, name), low, high)
        for name in ("max_concurrency", "max_input_len", "max_output_len", "vocab_size"):
            if getattr(self, name) is not None:
                _within(name, getattr(self, name), 1, None)
        for name in ("request_rate", "burstiness"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: {getattr(self, name)} is not allowed; allowed: above 0, or inf")
        if self.temperature is not None and not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature: {self.temperature} is not allowed; allowed: 0 or more")
        if not 0 <= self.random_range_ratio < 1:
            raise ValueError(f"random_range_ratio: {self.random_range_ratio} is not allowed; allowed: 0 to below 1")
        if not 0 < self.rate_scale < math.inf:
            raise ValueError(f"rate_scale: {self.rate_scale} is not allowed; allowed: above 0")
        for percentile in self.percentiles:
            if not 0 <= percentile <= 100:
                raise ValueError(f"metric_percentiles: {percentile} is not allowed; allowed: 0 to 100")
        self._check_ramp()
        self._check_endpoint()

    def _check_ramp(self) -> None:
        edges = {"ramp_up_start_rps": self.ramp_up_start_rps, "ramp_up_end_rps": self.ramp_up_end_rps}
        for name, value in edges.items():
            if self.ramp_up_strategy is None and value is not None:
                raise ValueError(f"{name}: {value} is not allowed without ramp_up_strategy")
            if self.ramp_up_strategy is not None and value is None:
                raise ValueError(f"{name}: is missing; allowed with ramp_up_strategy: above 0")
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name}: {value} is not allowed; allowed with ramp_up_strategy: above 0")
        if self.ramp_up_strategy is not None and not math.isinf(self.request_rate):
            raise ValueError(f"request_rate: {self.request_rate:g} is not allowed with ramp_up_strategy")

    def _check_endpoint(self) -> None:
        chosen = self.chosen_backend
        if chosen != "tandem-grpc" and not self.url.startswith(("http://", "https://")):
            raise ValueError(
                f"base_url: {self.base_url!r} is not allowed; allowed: http://host:port, https://host:port"
            )
        if self.endpoint is not None:
            if chosen == "tandem-grpc":
                raise ValueError(f"endpoint: {self.endpoint!r} is not allowed; allowed with HTTP backends")
            if not (self.endpoint.startswith("/") and self.endpoint.endswith("/completions")):
                raise ValueError(f"endpoint: {self.endpoint!r} is not allowed; allowed: {COMPLETIONS}, {CHAT}")
            if self.endpoint.endswith("/chat/completions") != (chosen == "openai-chat"):
                raise ValueError(f"endpoint: {self.endpoint!r} is not allowed; allowed with {chosen}: {_PATHS[chosen]}")
        if chosen == "openai-chat" and self.dataset_name != "prompts":
            raise ValueError(
                f"backend: openai-chat takes text, and {self.dataset_name} makes token ids of exact lengths; "
                "allowed: openai, tandem-grpc"
            )
        if chosen == "tandem-grpc" and self.extra_body:
            raise ValueError("extra_body: is not allowed; allowed with HTTP backends")

    @property
    def chosen_backend(self) -> str:
        """The backend, where none was named too."""
        if self.backend is not None:
            return self.backend
        if self.endpoint is None:
            return "openai-chat" if self.dataset_name == "prompts" else "openai"
        return "openai-chat" if self.endpoint.endswith("/chat/completions") else "openai"

    @property
    def url(self) -> str:
        """Where the server is; without the /v1 that other clients want there, which is the endpoint's here."""
        if self.base_url is None:
            return GRPC_URL if self.chosen_backend == "tandem-grpc" else HTTP_URL
        return self.base_url.rstrip("/").removesuffix("/v1")

    @property
    def path(self) -> str:
        """The endpoint's path; empty for gRPC."""
        return self.endpoint or _PATHS.get(self.chosen_backend, "")


_PATHS = {"openai": COMPLETIONS, "openai-chat": CHAT}


def parse_headers(items: Sequence[str], slo_class: str | None = None) -> tuple[tuple[str, str], ...]:
    """`KEY=VALUE` each, and the header that names an SLO class. Raises ValueError."""
    headers = [] if slo_class is None else [("x-slo-class", slo_class)]
    return (*headers, *parse_pairs("header", items))


def parse_pairs(name: str, items: Sequence[str]) -> tuple[tuple[str, str], ...]:
    """`KEY=VALUE` each. Raises ValueError."""
    pairs = []
    for item in items:
        key, equals, value = item.partition("=")
        if not (key and equals):
            raise ValueError(f"{name}: {item!r} is not allowed; allowed: KEY=VALUE")
        pairs.append((key.strip(), value.strip()))
    return tuple(pairs)


def _among(name: str, value: str | None, allowed: Sequence[str], *, optional: bool = False) -> None:
    if value not in allowed and not (optional and value is None):
        raise ValueError(f"{name}: {value!r} is not allowed; allowed: {', '.join(allowed)}")


def _within(name: str, value: int, low: int, high: int | None) -> None:
    if value < low or (high is not None and value > high):
        allowed = f"at least {low}" if high is None else f"{low} to {high}"
        raise ValueError(f"{name}: {value} is not allowed; allowed: {allowed}")

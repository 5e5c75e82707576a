"""One benchmark run, from options to result: asks what is served, draws prompts and arrivals, sends, adds up."""

from __future__ import annotations

import datetime
import http.client
import json
import math
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..tls import ClientTLS
from .arrivals import arrival_times
from .client import CHAT, COMPLETIONS, Target, run_load, send
from .datasets import BenchRequest, prompt_requests, random_requests, vocabulary_of
from .no_answer import NoAnswer
from .report import RequestRecord, Summary, result_json, summarize
from .traces import MAX_TOKENS, arrival_times_of, read_trace, trace_requests

DATASETS = ("prompts", "random", "trace")
_ASK_TIMEOUT_S = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchOptions:
    """What to send, named as `vllm bench serve` names it."""

    base_url: str = "http://127.0.0.1:8000"
    model: str | None = None
    """None: the first that the server lists."""
    endpoint: str = CHAT
    """CHAT or COMPLETIONS; random tokens always go to COMPLETIONS."""
    dataset_name: str = "prompts"
    dataset_path: str | None = None
    """`prompts`: a .jsonl or .jsonl.gz file; None: the package's own. `trace`: a recorded load (`bench.traces`), whose
    own arrival times hold where `request_rate` is inf."""
    num_prompts: int = 100
    output_len: int = 64
    """`prompts`: max_tokens of each request."""
    random_input_len: int = 1024
    random_output_len: int = 128
    request_rate: float = math.inf
    """Requests per second; inf: all at once."""
    burstiness: float = 1.0
    max_concurrency: int | None = None
    goodput_ms: Mapping[str, float] = field(default_factory=dict)
    """Promises by metric: ttft, tpot, e2el."""
    percentiles: tuple[float, ...] = (99.0,)
    num_warmups: int = 1
    """Requests sent one after the other before the run, not counted."""
    temperature: float | None = None
    seed: int = 0
    api_key: str | None = None
    tls: ClientTLS = field(default_factory=ClientTLS)
    timeout_s: float = 600.0
    headers: tuple[tuple[str, str], ...] = ()
    """Sent with every request: an SLO class, say."""

    def __post_init__(self) -> None:
        if self.dataset_name not in DATASETS:
            raise ValueError(f"dataset_name: {self.dataset_name!r} is not allowed; allowed: {', '.join(DATASETS)}")
        if self.dataset_name == "trace" and self.dataset_path is None:
            raise ValueError("dataset_path: is missing; allowed: the file of a recorded load")
        for name, low in (("num_prompts", 1), ("output_len", 1), ("num_warmups", 0)):
            if getattr(self, name) < low:
                raise ValueError(f"{name}: {getattr(self, name)} is not allowed; allowed: at least {low}")
        if self.max_concurrency is not None and self.max_concurrency < 1:
            raise ValueError(f"max_concurrency: {self.max_concurrency} is not allowed; allowed: at least 1")
        for percentile in self.percentiles:
            if not 0 <= percentile <= 100:
                raise ValueError(f"metric_percentiles: {percentile} is not allowed; allowed: 0 to 100")


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchResult:
    """What came of it."""

    summary: Summary
    records: tuple[RequestRecord, ...]
    facts: Mapping[str, Any]

    def as_json(self) -> dict[str, Any]:
        """The result with vLLM's field names."""
        return result_json(self.summary, self.records, self.facts)

    def save(self, path: str | Path) -> None:
        """Writes `as_json` to a file. Raises OSError."""
        Path(path).write_text(json.dumps(self.as_json(), indent=1) + "\n", encoding="utf-8")


def parse_headers(items: Sequence[str], slo_class: str | None = None) -> tuple[tuple[str, str], ...]:
    """`KEY=VALUE` each, and the header that names an SLO class. Raises ValueError."""
    headers = [] if slo_class is None else [("x-slo-class", slo_class)]
    for item in items:
        name, equals, value = item.partition("=")
        if not (name and equals):
            raise ValueError(f"header: {item!r} is not allowed; allowed: KEY=VALUE")
        headers.append((name.strip(), value.strip()))
    return tuple(headers)


class ServerUnusable(OSError):
    """The server does not answer, or not as it should; one line."""


class ServerAbsent(ServerUnusable, NoAnswer):
    """Nothing answers there."""


async def run_bench(options: BenchOptions, on_done: Callable[[RequestRecord], None] | None = None) -> BenchResult:
    """Runs the load. Raises ServerUnusable where nothing can be sent; single failures are in the records."""
    model = options.model or served_model(options.base_url, options.api_key, options.tls)
    target = Target(
        base_url=options.base_url,
        model=model,
        endpoint=options.endpoint if options.dataset_name == "prompts" else COMPLETIONS,
        api_key=options.api_key,
        tls=options.tls,
        temperature=options.temperature,
        timeout_s=options.timeout_s,
        headers=options.headers,
    )
    requests, recorded = _requests(options, model)
    arrivals = recorded or arrival_times(len(requests), options.request_rate, options.burstiness, options.seed)
    for request in requests[: options.num_warmups]:
        record = await send(target, request, 0.0)
        if record.error:
            raise ServerUnusable(f"{options.base_url}{target.endpoint}: {record.error}")
    date = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
    records = await run_load(target, requests, arrivals, max_concurrency=options.max_concurrency, on_done=on_done)
    return BenchResult(
        summary=summarize(records, options.goodput_ms, options.percentiles),
        records=tuple(records),
        facts=_facts(options, target, date, len(requests)),
    )


def served_model(base_url: str, api_key: str | None = None, tls: ClientTLS | None = None) -> str:
    """The first model that the server lists. Raises ServerUnusable."""
    listed = ask(base_url, "/v1/models", api_key=api_key, tls=tls)
    try:
        return str(listed["data"][0]["id"])
    except (KeyError, IndexError, TypeError):
        raise ServerUnusable(f"{base_url}/v1/models lists no model") from None


def ask(
    base_url: str,
    path: str,
    body: Mapping[str, Any] | None = None,
    api_key: str | None = None,
    tls: ClientTLS | None = None,
) -> Any:
    """One short question to the server, GET or, with a body, POST; returns the answer's JSON. Raises ServerUnusable."""
    url = base_url.rstrip("/") + path
    headers = {"Content-Type": "application/json"}
    if api_key:
        headers["Authorization"] = f"Bearer {api_key}"
    data = None if body is None else json.dumps(body).encode()
    question = urllib.request.Request(url, data, headers)
    secure = (tls or ClientTLS()).context_for(url)
    try:
        with urllib.request.urlopen(question, timeout=_ASK_TIMEOUT_S, context=secure) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as error:
        hint = ": it wants another key; --api-key or TANDEM_API_KEY" if error.code == 401 else ""
        raise ServerUnusable(f"{url}: HTTP {error.code}{hint}") from None
    except (OSError, http.client.HTTPException) as error:
        raise ServerAbsent(url, error) from None
    except ValueError as error:
        raise ServerUnusable(f"{url}: {error}") from None


def _requests(options: BenchOptions, model: str) -> tuple[tuple[BenchRequest, ...], tuple[float, ...] | None]:
    """What to send, and when it is due where a recorded load says so."""
    if options.dataset_name == "prompts":
        return prompt_requests(options.num_prompts, options.output_len, options.dataset_path, options.seed), None

    def tokenize(text: str) -> list[int]:
        answer = ask(options.base_url, "/tokenize", {"model": model, "prompt": text}, options.api_key, options.tls)
        return [int(token) for token in answer["tokens"]]

    if options.dataset_name == "trace":
        assert options.dataset_path is not None
        trace = read_trace(options.dataset_path, options.num_prompts)
        longest = _max_model_len(options, model)
        pairs = trace_requests(trace, vocabulary_of(tokenize), options.seed, longest)
        if not pairs:
            raise ValueError(f"dataset_path: no request of the trace fits into the model's context of {longest} tokens")
        recorded = arrival_times_of([row for row, _ in pairs]) if math.isinf(options.request_rate) else None
        return tuple(request for _, request in pairs), recorded
    requests = random_requests(
        options.num_prompts,
        options.random_input_len,
        options.random_output_len,
        vocabulary_of(tokenize),
        options.seed,
    )
    return requests, None


def _max_model_len(options: BenchOptions, model: str) -> int:
    """The served model's context; a server that does not say takes whatever it is sent."""
    listed = ask(options.base_url, "/v1/models", api_key=options.api_key, tls=options.tls)
    found = [card.get("max_model_len") for card in listed.get("data", []) if card.get("id") == model]
    return found[0] if found and isinstance(found[0], int) else MAX_TOKENS


def _facts(options: BenchOptions, target: Target, date: str, sent: int) -> dict[str, Any]:
    rate = options.request_rate
    return {
        "date": date,
        "backend": "openai-chat" if target.endpoint == CHAT else "openai",
        "base_url": target.base_url,
        "endpoint": target.endpoint,
        "model_id": target.model,
        "dataset_name": options.dataset_name,
        "dataset_path": options.dataset_path,
        "num_prompts": sent,
        "request_rate": "inf" if math.isinf(rate) else rate,
        "burstiness": options.burstiness,
        "max_concurrency": options.max_concurrency,
        "seed": options.seed,
    }

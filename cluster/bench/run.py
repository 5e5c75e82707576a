"""One benchmark run, from options to result: asks what is served, draws up the load, sends it, adds up."""

from __future__ import annotations

import asyncio
import datetime
import math
import secrets
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from ..workload.report import RequestRecord, Summary, result_json, summarize
from ..workload.sweep import Watch
from .client import HttpSender, Send, Target
from .grpc_client import GrpcSender
from .interrupt import Stop, finishes, stops
from .load import Load, run_load
from .options import BenchOptions
from .server import COMMON_IDS, Server, ServerUnusable
from .workload import Workload, make_workload

OnDone = Callable[[RequestRecord], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchResult:
    """What came of it."""

    summary: Summary
    records: tuple[RequestRecord, ...]
    """In order of arrival."""
    facts: Mapping[str, Any]
    metrics: tuple[str, ...]
    notes: tuple[str, ...] = ()
    """What a reader of the numbers should know."""
    ended_early: bool = False
    interrupted: bool = False
    """By a signal: `records` are those of the requests that had ended by then."""
    exit_code: int = 0
    """What the signal asks for; 0: there was none."""
    overdue: int = 0
    """Requests without a record that had failed when the load was ended early."""
    name: str = ""
    """Requests were called `<name>-<place>`."""

    def as_json(self, *, detailed: bool = True) -> dict[str, Any]:
        """The result with vLLM's field names."""
        return result_json(self.summary, self.records, self.facts, metrics=self.metrics, detailed=detailed)

    def save(self, path: str | Path, *, detailed: bool = True) -> None:
        """Writes `as_json` to a file. Raises OSError."""
        Path(path).write_bytes(orjson.dumps(self.as_json(detailed=detailed), option=orjson.OPT_INDENT_2) + b"\n")


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """A server that can be sent to, and what is known of the model that it serves."""

    send: Send
    model: str
    max_model_len: int | None
    vocabulary: tuple[int, ...]
    notes: tuple[str, ...] = ()


async def run_bench(options: BenchOptions, on_done: OnDone | None = None) -> BenchResult:
    """Runs the load; a signal ends it with what has been measured. Raises ServerUnusable where nothing can be sent;
    single failures are in the records.
    """
    async with connect(options) as served:
        with stops() as stop:
            return await run_once(options, served, on_done, stop=stop)


@asynccontextmanager
async def connect(options: BenchOptions) -> AsyncIterator[Served]:
    """Asks the server what it serves, and keeps its connections until the end. Raises ServerUnusable, ValueError."""
    if options.chosen_backend == "tandem-grpc":
        grpc_sender = GrpcSender(
            options.url,
            api_key=options.api_key,
            tls=options.tls,
            temperature=options.temperature,
            timeout_s=options.timeout_s,
            headers=options.headers,
        )
        try:
            listed = {model.id: model for model in await grpc_sender.models()}
            grpc_sender.model = options.model or next(iter(listed))
            card = listed.get(grpc_sender.model)
            yield _served(options, grpc_sender.send, grpc_sender.model, card.max_model_len if card else None, None)
        finally:
            await grpc_sender.close()
        return
    prefix = options.path.removesuffix("/completions").removesuffix("/chat")
    server = Server(options.url, api_key=options.api_key, tls=options.tls, prefix=prefix)
    model = await asyncio.to_thread(server.first_model) if options.model is None else options.model
    target = Target(
        base_url=options.url,
        model=model,
        endpoint=options.path,
        api_key=options.api_key,
        tls=options.tls,
        temperature=options.temperature,
        timeout_s=options.timeout_s,
        headers=options.headers,
        extra_body=options.extra_body,
    )
    asks_ids = options.dataset_name != "prompts" and options.vocab_size is None
    vocabulary = await asyncio.to_thread(server.vocabulary, model) if asks_ids else None
    longest = await asyncio.to_thread(server.max_model_len, model) if options.dataset_name == "trace" else None
    sender = HttpSender(target)
    try:
        yield _served(options, sender.send, model, longest, vocabulary)
    finally:
        await sender.close()


def _served(
    options: BenchOptions, send: Send, model: str, max_model_len: int | None, vocabulary: tuple[int, ...] | None
) -> Served:
    notes = []
    if options.vocab_size is not None:
        # What special tokens a vocabulary has stand first or last, mostly outside its nominal size.
        vocabulary = tuple(range(min(256, options.vocab_size // 4), options.vocab_size))
    elif vocabulary is None and options.dataset_name != "prompts":
        vocabulary = tuple(COMMON_IDS)
        notes.append(
            f"the server does not tell its vocabulary: random token ids are {COMMON_IDS.start} to "
            f"{COMMON_IDS.stop - 1}; --vocab-size says otherwise"
        )
    return Served(send=send, model=model, max_model_len=max_model_len, vocabulary=vocabulary or (), notes=tuple(notes))


async def run_once(
    options: BenchOptions,
    served: Served,
    on_done: OnDone | None = None,
    watch: Watch | None = None,
    stop: Stop | None = None,
) -> BenchResult:
    """One load after its warm-ups; ended early where `watch` or `stop` say so. Raises ServerUnusable, ValueError."""
    workload = make_workload(options, served.vocabulary, served.max_model_len)
    warm = await finishes(warm_up(workload.warmups, served, options), stop)
    date = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
    name = f"bench-{secrets.token_hex(4)}"
    load = Load(records=[], begin_s=0.0, interrupted=True)
    if warm:
        load = await run_load(
            served.send,
            workload.requests,
            workload.arrivals_s,
            max_concurrency=options.max_concurrency,
            on_done=on_done,
            watch=watch,
            stop=stop,
            name=name,
        )
    percentiles = sorted({*options.percentiles, 99.0})
    return BenchResult(
        summary=summarize(load.records, options.goodput_ms, percentiles, load.stalls_s),
        records=tuple(load.records),
        facts=_facts(options, served.model, date, workload)
        | {"client_cpu_s": load.cpu_s, "interrupted": load.interrupted},
        metrics=options.percentile_metrics,
        notes=served.notes + workload.notes + _partial(load, len(workload.requests)),
        interrupted=load.interrupted,
        exit_code=stop.exit_code if stop is not None and load.interrupted else 0,
        ended_early=load.ended_early,
        overdue=load.overdue,
        name=name,
    )


def _partial(load: Load, planned: int) -> tuple[str, ...]:
    """What a reader of an interrupted run's numbers should know."""
    if not load.interrupted:
        return ()
    return (
        f"PARTIAL: interrupted when {len(load.records)} of {planned} requests had ended; {load.given_up} under way "
        "were given up and are not counted, long answers more often than short ones",
    )


async def warm_up(warmups: Sequence[Any], served: Served, options: BenchOptions) -> None:
    """Sends them one after the other. Raises ServerUnusable for the first that fails."""
    for request in warmups:
        record = await served.send(request, 0.0, "")
        if record.error:
            raise ServerUnusable(f"{options.url}{options.path}: {record.error}")


def _facts(options: BenchOptions, model: str, date: str, workload: Workload) -> dict[str, Any]:
    rate = options.request_rate
    facts: dict[str, Any] = {
        "date": date,
        "backend": options.chosen_backend,
        "endpoint_type": options.chosen_backend,
        "label": options.label,
        "base_url": options.url,
        "endpoint": options.path,
        "model_id": model,
        "tokenizer_id": None,
        "dataset_name": options.dataset_name,
        "dataset_path": options.dataset_path,
        "num_prompts": len(workload.requests),
        **dict(options.metadata),
        "request_rate": "inf" if math.isinf(rate) else rate,
        "burstiness": options.burstiness,
        "max_concurrency": options.max_concurrency,
        "seed": options.seed,
        "notes": list(workload.notes),
    }
    if options.ramp_up_strategy is not None:
        for name in ("ramp_up_strategy", "ramp_up_start_rps", "ramp_up_end_rps"):
            facts[name] = getattr(options, name)
    return facts

"""`tandem status`: the workers of a running cluster, as its router sees them."""

from __future__ import annotations

import http.client
import json
import os
import sys
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import IO, Any

from .bench.no_answer import NoAnswer
from .launch import runtime_file
from .tls import ClientTLS

_COLUMNS = ("worker", "role", "state", "device", "epoch", "KV use", "running", "waiting", "held", "leases")
_LEDGER = ("blocks", "held", "cached", "free", "credited", "proven")
_HANDOFFS = ("handoffs", "leases", "pulls", "giving", "taking", "moved", "ended early", "moved by")
_COMPUTE = ("compute", "split", "threads", "processes", "KV", "kernels")
_ROLES = ("prefill", "decode", "mixed")
_TIMEOUT_S = 10.0


def status(url: str, *, as_json: bool = False, api_key: str | None = None, tls: ClientTLS | None = None) -> int:
    """Prints a table, or the router's answer; returns the exit code: 0 ready, 1 not. Raises OSError, ValueError."""
    answer = fetch(url, api_key=api_key, tls=tls)
    if as_json:
        print(json.dumps(answer, indent=1))
    else:
        print(render(url, answer, scrape(url, api_key=api_key, tls=tls)))
    return 0 if answer.get("ready") else 1


def watch(url: str, every_s: float, *, api_key: str | None = None, tls: ClientTLS | None = None) -> int:
    """Prints the table again and again, in place on a terminal, until Ctrl-C. Raises OSError, ValueError."""
    if not 0.1 <= every_s <= 3600:
        raise ValueError(f"watch: {every_s:g} is not allowed; allowed: 0.1 to 3600 seconds")
    try:
        while True:
            answer, samples = fetch(url, api_key=api_key, tls=tls), scrape(url, api_key=api_key, tls=tls)
            clear = "\x1b[H\x1b[2J" if sys.stdout.isatty() else ""
            print(f"{clear}{render(url, answer, samples)}\n", flush=True)
            time.sleep(every_s)
    except KeyboardInterrupt:
        return 0


Samples = Mapping[str, Sequence[tuple[Mapping[str, str], float]]]
"""Metrics by sample name: labels and value of each series."""


def scrape(url: str, *, api_key: str | None = None, tls: ClientTLS | None = None) -> Samples:
    """The router's metrics; empty where it does not give them. Does not raise for an answer that is none."""
    from prometheus_client.parser import text_string_to_metric_families

    key = api_key or operator_key(url)
    address = url.rstrip("/") + "/metrics"
    question = urllib.request.Request(address, headers={"Authorization": f"Bearer {key}"} if key else {})
    secure = (tls or ClientTLS.from_environment()).context_for(url)
    found: dict[str, list[tuple[Mapping[str, str], float]]] = {}
    try:
        with urllib.request.urlopen(question, timeout=_TIMEOUT_S, context=secure) as reply:
            for family in text_string_to_metric_families(reply.read().decode()):
                for sample in family.samples:
                    found.setdefault(sample.name, []).append((sample.labels, sample.value))
    except (OSError, ValueError, http.client.HTTPException):
        return {}
    return found


def fetch(url: str, *, api_key: str | None = None, tls: ClientTLS | None = None) -> dict[str, Any]:
    """The answer of the router's `/ready`, which comes with 503 where it is not ready; without `workers` where it wants
    a key and got none of its own. None given: the operator's own, where this user's `tandem serve` runs here, else the
    environment's.
    """
    if not url.startswith(("http://", "https://")):
        raise ValueError(f"url: {url!r} is not allowed; allowed: http://host:port")
    address = url.rstrip("/") + "/ready"
    key = api_key or operator_key(url)
    question = urllib.request.Request(address, headers={"Authorization": f"Bearer {key}"} if key else {})
    secure = (tls or ClientTLS.from_environment()).context_for(url)
    try:
        with urllib.request.urlopen(question, timeout=_TIMEOUT_S, context=secure) as reply:
            answer = _json(reply)
    except urllib.error.HTTPError as error:
        if error.code != 503:
            raise OSError(f"{address}: HTTP {error.code}") from None
        answer = _json(error)
    except (OSError, http.client.HTTPException) as error:
        raise NoAnswer(address, error) from None
    if not isinstance(answer, dict) or "ready" not in answer:
        raise OSError(f"{address} is not a Tandem router")
    return answer


def elsewhere(error: Exception) -> str:
    """Where nothing answered: what else this user runs here, to be put behind the error; else empty."""
    if not isinstance(error, NoAnswer):
        return ""
    others = [cluster.url for cluster in runtime_file.running() if not cluster.serves(error.url)]
    return f"; this user's running cluster{'s' if len(others) > 1 else ''}: {', '.join(others)}" if others else ""


def operator_key(url: str) -> str | None:
    """The key of this user's own cluster at `url`, else the environment's."""
    running = runtime_file.find(url)
    if running is not None and running.api_key is not None:
        return running.api_key
    return first_key(os.environ.get("TANDEM_API_KEY"))


def first_key(keys: str | None) -> str | None:
    """A server takes several keys, separated by commas; a client shows the first."""
    return (keys or "").split(",")[0].strip() or None


def _json(reply: IO[bytes]) -> Any:
    try:
        return json.load(reply)
    except ValueError:
        return None


def render(url: str, answer: Mapping[str, Any], samples: Samples | None = None) -> str:
    """The answer as tables: workers, who computes in them, the ledger of blocks, handoffs; above them what is inside
    the router. Pure.
    """
    workers: Sequence[Mapping[str, Any]] = sorted(answer.get("workers") or (), key=_place)
    tables = [
        _table([_COLUMNS, *(_row(worker) for worker in workers)]),
        _table([_COMPUTE, *(_compute(worker) for worker in workers)]),
        _table([_LEDGER, *(_ledger(worker) for worker in workers)]),
        _table([_HANDOFFS, *(_handoffs(worker) for worker in workers)]),
    ]
    lines = "\n\n".join(tables)
    models = sorted({str(worker.get("model", "")) for worker in workers} - {""})
    state = "ready" if answer.get("ready") else f"not ready: {answer.get('reason', 'it does not say why')}"
    head = f"{url}  {state}" + (f"  {', '.join(models)}" if models else "")
    if longest := min((int(worker.get("max_model_len") or 0) for worker in workers), default=0):
        head += f", contexts of up to {longest} tokens"
    if "workers" not in answer:
        return f"{head}\nit tells more to those who show a key: --api-key, TANDEM_API_KEY"
    inside = [*_inside(samples or {}), *(_router(account) for account in answer.get("routers") or ())]
    return "\n".join([head, *inside, "", lines]) if workers else f"{head}\nno workers"


def _inside(samples: Samples) -> list[str]:
    """Requests in the router, and choices of theirs that wait there for a worker, by class."""
    if not (flying := samples.get("tandem:requests_in_flight")):
        return []
    queued: Counter[str] = Counter()
    for labels, value in samples.get("tandem:router_queue_choices", ()):
        queued[labels.get("slo_class", "")] += int(value)
    waiting = ", ".join(f"{name} {count}" for name, count in sorted(queued.items()) if count)
    inside = sum(value for _, value in flying)
    queue = f"; choices that wait for a worker: {waiting}" if waiting else ""
    return [f"{_requests(inside)} inside{queue}", *_kept(samples)]


def _requests(count: float) -> str:
    return f"{count:g} request{'s' * (count != 1)}"


def _kept(samples: Samples) -> list[str]:
    """What share of the requests kept their promises of late, and what the cluster's plan says of it."""
    seen, counts, predicted, parted = (
        {labels.get("slo_class", ""): value for labels, value in samples.get(f"tandem:{name}", ())}
        for name in ("attainment", "attainment_requests", "predicted_attainment", "plan_parted")
    )
    classes = [name for name in {**seen, **predicted} if name]
    if not seen and not predicted:
        return []
    told = [_share("promises kept", seen.get(""), predicted.get(""))]
    told += [_share(name, seen.get(name), predicted.get(name)) for name in classes if len(classes) > 1]
    standing = {-1.0: "below plan", 0.0: "as planned", 1.0: "above plan"}
    states = [
        f"{name} {standing[value]}" if name else standing[value]
        for name, value in parted.items()
        if value in standing and (not name or (value and len(classes) > 1))
    ]
    return ["; ".join([f"{', '.join(told)}, of {_requests(counts.get('', 0))}", *states])]


def _share(name: str, seen: float | None, predicted: float | None) -> str:
    shown = "-" if seen is None else f"{100 * seen:.1f} %"
    return f"{name} {shown}" + ("" if predicted is None else f" (predicted {100 * predicted:.1f} %)")


def _router(account: Mapping[str, Any]) -> str:
    """One of several router processes."""
    state = "ready" if account.get("ready") else f"not ready: {account.get('reason') or 'it does not say why'}"
    inside = f", {_requests(account['requests_inside'])} inside, pid {account['pid']}" if "pid" in account else ""
    return f"router {account.get('process')} ({account.get('registry')}): {state}{inside}"


def _table(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def _place(worker: Mapping[str, Any]) -> tuple[int, int, str]:
    """By pool, and in it by number: the router lists workers as they came, and each restart comes last."""
    role, name = str(worker.get("role", "")), str(worker.get("worker_id", ""))
    number = name.rpartition("-")[2]
    return _ROLES.index(role) if role in _ROLES else len(_ROLES), int(number) if number.isdecimal() else -1, name


def _compute(worker: Mapping[str, Any]) -> tuple[str, ...]:
    """Split, threads of each rank, processes by rank, KV's dtype, and who computes."""
    stages, pids = int(worker.get("pipeline_stages") or 0), processes(worker)
    split = f"TP {worker['tensor_parallel']}" if worker.get("tensor_parallel") else "-"
    threads = f"{worker['threads']}" + (" each" if worker.get("other_ranks") else "") if worker.get("threads") else "-"
    kernels = ": ".join(text for name in ("kernels", "kernels_reason") if (text := str(worker.get(name) or ""))) or "-"
    name = str(worker.get("worker_id", "-"))
    kv = str(worker.get("kv_dtype") or "-")
    return (name, split + (f" PP {stages}" if stages > 1 else ""), threads, pids or "-", kv, kernels)


def processes(worker: Mapping[str, Any]) -> str:
    """Of its ranks' processes in order, with the node of those that are not on the first one's."""
    others: Sequence[Mapping[str, Any]] = worker.get("other_ranks") or ()
    told = [str(worker["pid"])] if worker.get("pid") else []
    for host, ranks in groupby(others, key=lambda rank: rank.get("host", "")):
        told.append(", ".join(str(rank["pid"]) for rank in ranks) + (f" on {host}" if host else ""))
    return ", ".join(told)


def _ledger(worker: Mapping[str, Any]) -> tuple[str, ...]:
    blocks, free, cached = (int(worker.get(name) or 0) for name in ("num_blocks", "free_blocks", "cached_blocks"))
    credit = f"{worker.get('credited_blocks', '-')} of {worker.get('credit_limit_blocks', '-')}"
    proof = f"{float(worker.get('integrity_age_s') or 0):.0f} s ago" if worker.get("integrity_ok", True) else "BROKEN"
    return (str(worker.get("worker_id", "-")), str(blocks - free - cached), str(cached), str(free), credit, proof)


def _handoffs(worker: Mapping[str, Any]) -> tuple[str, ...]:
    def counts(name: str) -> str:
        return ", ".join(f"{key} {count}" for key, count in (worker.get(name) or {}).items()) or "-"

    names = ("holder_states", "puller_states", "pulls_total", "handoff_failures_total")
    return (
        *(str(worker.get(name, "-")) for name in ("worker_id", "leases", "pulls")),
        *(counts(name) for name in names),
        f"process {pid}" if (pid := int(worker.get("kv_mover_pid") or 0)) else "its loop",
    )


def _row(worker: Mapping[str, Any]) -> tuple[str, ...]:
    blocks = int(worker.get("num_blocks") or 0)
    free = int(worker.get("free_blocks") or 0) + int(worker.get("cached_blocks") or 0)
    use = f"{(blocks - free) / blocks:.0%} of {blocks}" if blocks else "-"
    counts = (str(worker.get(name, "-")) for name in ("running", "waiting", "held", "leases"))
    names = (str(worker.get(name, "-")) for name in ("worker_id", "role", "state", "device"))
    return (*names, str(worker.get("epoch", "-"))[:8], use, *counts)

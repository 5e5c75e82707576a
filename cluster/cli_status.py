"""`tandem status`: the workers of a running cluster, as its router sees them."""

from __future__ import annotations

import http.client
import json
import os
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from typing import IO, Any

from .bench.no_answer import no_answer
from .launch import runtime_file
from .tls import ClientTLS

_COLUMNS = ("worker", "role", "state", "device", "epoch", "KV use", "running", "waiting", "held", "leases")
_TIMEOUT_S = 10.0


def status(url: str, *, as_json: bool = False, api_key: str | None = None, tls: ClientTLS | None = None) -> int:
    """Prints a table, or the router's answer; returns the exit code: 0 ready, 1 not. Raises OSError, ValueError."""
    answer = fetch(url, api_key=api_key, tls=tls)
    if as_json:
        print(json.dumps(answer, indent=1))
    else:
        print(render(url, answer))
    return 0 if answer.get("ready") else 1


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
        raise OSError(no_answer(address, error)) from None
    if not isinstance(answer, dict) or "ready" not in answer:
        raise OSError(f"{address} is not a Tandem router")
    return answer


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


def render(url: str, answer: Mapping[str, Any]) -> str:
    """The answer as a table. Pure."""
    workers: Sequence[Mapping[str, Any]] = answer.get("workers") or ()
    rows = [_COLUMNS, *(_row(worker) for worker in workers)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_COLUMNS))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    models = sorted({str(worker.get("model", "")) for worker in workers} - {""})
    state = "ready" if answer.get("ready") else f"not ready: {answer.get('reason', 'it does not say why')}"
    head = f"{url}  {state}" + (f"  {', '.join(models)}" if models else "")
    if "workers" not in answer:
        return f"{head}\nit tells more to those who show a key: --api-key, TANDEM_API_KEY"
    return "\n".join([head, "", *lines]) if workers else f"{head}\nno workers"


def _row(worker: Mapping[str, Any]) -> tuple[str, ...]:
    blocks = int(worker.get("num_blocks") or 0)
    free = int(worker.get("free_blocks") or 0) + int(worker.get("cached_blocks") or 0)
    use = f"{(blocks - free) / blocks:.0%} of {blocks}" if blocks else "-"
    counts = (str(worker.get(name, "-")) for name in ("running", "waiting", "held", "leases"))
    names = (str(worker.get(name, "-")) for name in ("worker_id", "role", "state", "device"))
    return (*names, str(worker.get("epoch", "-"))[:8], use, *counts)

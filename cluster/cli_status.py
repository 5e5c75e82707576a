"""`tandem status`: the workers of a running cluster, as its router sees them."""

from __future__ import annotations

import http.client
import json
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from typing import IO, Any

from .bench.no_answer import no_answer

_COLUMNS = ("worker", "role", "state", "device", "epoch", "KV use", "running", "waiting", "held", "leases")
_TIMEOUT_S = 10.0


def status(url: str, *, as_json: bool = False) -> int:
    """Prints a table, or the router's answer; returns the exit code: 0 ready, 1 not. Raises OSError, ValueError."""
    answer = fetch(url)
    if as_json:
        print(json.dumps(answer, indent=1))
    else:
        print(render(url, answer))
    return 0 if answer.get("ready") else 1


def fetch(url: str) -> dict[str, Any]:
    """The answer of the router's `/ready`, which comes with 503 where it is not ready."""
    if not url.startswith(("http://", "https://")):
        raise ValueError(f"url: {url!r} is not allowed; allowed: http://host:port")
    address = url.rstrip("/") + "/ready"
    try:
        with urllib.request.urlopen(address, timeout=_TIMEOUT_S) as reply:
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
    state = "ready" if answer.get("ready") else f"not ready: {answer.get('reason')}"
    head = f"{url}  {state}" + (f"  {', '.join(models)}" if models else "")
    return "\n".join([head, "", *lines]) if workers else f"{head}\nno workers"


def _row(worker: Mapping[str, Any]) -> tuple[str, ...]:
    blocks = int(worker.get("num_blocks") or 0)
    free = int(worker.get("free_blocks") or 0) + int(worker.get("cached_blocks") or 0)
    use = f"{(blocks - free) / blocks:.0%} of {blocks}" if blocks else "-"
    counts = (str(worker.get(name, "-")) for name in ("running", "waiting", "held", "leases"))
    names = (str(worker.get(name, "-")) for name in ("worker_id", "role", "state", "device"))
    return (*names, str(worker.get("epoch", "-"))[:8], use, *counts)

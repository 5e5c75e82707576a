"""Where one request's time went, drawn as bars against a common axis of time. Pure."""

from __future__ import annotations

from dataclasses import dataclass

WIDTH = 56


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """One part of a request: seconds since it came in."""

    name: str
    start_s: float
    end_s: float
    note: str = ""


def spans(
    *,
    queue_s: float,
    prefill_s: float,
    ttft_s: float,
    transfer_s: float,
    exposed_transfer_s: float,
    decode_s: float,
    e2e_s: float,
    transferred_bytes: int,
    path: str,
) -> tuple[Span, ...]:
    """Lays a request's durations out in time.

    Prefill ends where the first token starts on its way; the transfer ends `exposed_transfer_s` after prefill's end (it
    runs beside prefill before that); decode ends with the request.
    """
    prefill_end_s = queue_s + prefill_s
    transfer_end_s = prefill_end_s + exposed_transfer_s
    parts = [
        Span(name="queue", start_s=0.0, end_s=queue_s),
        Span(name="prefill", start_s=queue_s, end_s=prefill_end_s),
        Span(name="first token", start_s=prefill_end_s, end_s=max(ttft_s, prefill_end_s)),
    ]
    if path == "split":
        note = f"{transferred_bytes / 2**20:.2f} MiB, ended {exposed_transfer_s * 1e3:.1f} ms after prefill"
        start_s = max(0.0, transfer_end_s - transfer_s)
        parts.append(Span(name="KV transfer", start_s=start_s, end_s=transfer_end_s, note=note))
    parts.append(Span(name="decode", start_s=max(0.0, e2e_s - decode_s), end_s=e2e_s))
    return tuple(parts)


def draw(parts: tuple[Span, ...], width: int = WIDTH) -> str:
    """One line per span: name, bar, milliseconds, note. Every span shows at least one mark."""
    total_s = max([part.end_s for part in parts] + [1e-9])
    lines = []
    for part in parts:
        left = min(width - 1, round(part.start_s / total_s * width))
        length = max(1, min(width - left, round((part.end_s - part.start_s) / total_s * width)))
        bar = " " * left + "#" * length
        note = f"  ({part.note})" if part.note else ""
        lines.append(f"{part.name:<12}|{bar:<{width}}| {(part.end_s - part.start_s) * 1e3:8.1f} ms{note}")
    lines.append(f"{'':<12}0{' ' * (width - 1)}{total_s * 1e3:.0f} ms")
    return "\n".join(lines)

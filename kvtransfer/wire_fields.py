"""Fields of KV messages (`kvtransfer.wire`): what is not what it should be is refused CORRUPT, naming the field."""

from __future__ import annotations

from .ticket import HandoffRefused, RefusalReason

MAX_TEXT = 512


def as_int(value: object, name: str, highest: int, *, lowest: int = 0) -> int:
    """An integer in `lowest`…`highest`."""
    if not isinstance(value, int) or isinstance(value, bool) or not lowest <= value <= highest:
        raise corrupt(f"{name}: not an integer in {lowest}…{highest}")
    return value


def as_float(value: object, name: str) -> float:
    """A number."""
    if not isinstance(value, float | int) or isinstance(value, bool):
        raise corrupt(f"{name}: not a number")
    return float(value)


def as_text(value: object, name: str, limit: int = MAX_TEXT) -> str:
    """A text of at most `limit` characters."""
    if not isinstance(value, str) or len(value) > limit:
        raise corrupt(f"{name}: not a text of at most {limit} characters")
    return value


def as_bool(value: object, name: str) -> bool:
    """A boolean."""
    if not isinstance(value, bool):
        raise corrupt(f"{name} is not a boolean")
    return value


def as_bytes(value: object, name: str) -> bytes:
    """Bytes."""
    if not isinstance(value, bytes):
        raise corrupt(f"{name}: not bytes")
    return value


def corrupt(message: str) -> HandoffRefused:
    """What a message that does not parse is refused with."""
    return HandoffRefused(RefusalReason.CORRUPT, message)

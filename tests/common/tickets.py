"""A handoff's ticket, where a test cares for few of its fields."""

from __future__ import annotations

from typing import Any

from tandem.kvtransfer.ticket import Ticket


def ticket_of(num_tokens: int = 4, **fields: Any) -> Ticket:
    """First attempts of both workers at the one choice of request `r`, but for `fields`."""
    usual: dict[str, Any] = {
        "request_id": "r",
        "choice": 0,
        "prefill_attempt": 0,
        "decode_attempt": 0,
        "prefill_worker": "p",
        "epoch": 7,
        "fingerprint": "fp",
    }
    return Ticket(num_tokens=num_tokens, **(usual | fields))

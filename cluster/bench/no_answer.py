"""One plain line for a router that does not answer, whichever library noticed it."""

from __future__ import annotations

import http.client
import re


def no_answer(url: str, error: Exception) -> str:
    """Says that no router answers at `url`, and why, without errno numbers or what was read from the wire."""
    cause = getattr(error, "reason", error)
    problem = re.sub(r"^\[Errno -?\d+\] ", "", str(cause)) or type(cause).__name__
    garbled = isinstance(cause, http.client.HTTPException) and not isinstance(cause, OSError)
    if garbled or "illegal status line" in problem:
        problem = "what listens there does not speak HTTP; is it the gRPC port?"
    return f"no router answers at {url} ({problem})"

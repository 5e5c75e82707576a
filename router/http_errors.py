"""Errors as OpenAI's clients read them: the object, and the headers beside it. Pure."""

from __future__ import annotations

import math
from typing import Any

from .errors import ServiceError


def error_json(error: ServiceError) -> dict[str, Any]:
    """OpenAI's error object."""
    return {
        "error": {
            "message": str(error.message),
            "type": error.type,
            "param": error.param,
            "code": error.code,
        }
    }


def error_headers(error: ServiceError) -> dict[str, str]:
    """Retry-After (whole seconds, RFC 9110 §10.2.3) and OpenAI's retry-after-ms, where the error says when; a 429 that
    does not would be the same the next time, and says that to OpenAI's clients.
    """
    if error.retry_after_s is None:
        return {"x-should-retry": "false"} if error.http_status == 429 else {}
    retry_after_s = max(error.retry_after_s, 0.0)
    return {
        "retry-after": str(max(math.ceil(retry_after_s), 1)),
        "retry-after-ms": str(math.ceil(retry_after_s * 1000)),
    }

"""Bodies in JSON, strictly: what two readers could take for two things is refused. Pure."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import orjson

from .errors import InvalidRequest
from .params import json_kind

MAX_ECHOED_CHARS = 128
MAX_JSON_DEPTH = 64
"""Lists and objects inside each other; the deepest of a legitimate request (a tool's schema) stays well below."""


def encode_json(value: object) -> bytes:
    """Compact JSON in UTF-8. What a client sent may be in it: integers beyond 64 bits and lone surrogates, which orjson
    refuses, go the long way.
    """
    try:
        return orjson.dumps(value)
    except TypeError:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        return text.encode("utf-8", "replace")


def parse_json_object(body: bytes) -> dict[str, Any]:
    """A JSON object (RFC 8259) that UTF-8 can carry: no NaN, no infinity, no lone surrogates, no key twice in one
    object, at most MAX_JSON_DEPTH levels. InvalidRequest otherwise.
    """
    try:
        value = json.loads(body.decode("utf-8"), parse_constant=_refuse_constant, object_pairs_hook=_unique_keys)
        if body.count(b"[") + body.count(b"{") > MAX_JSON_DEPTH:
            check_depth(value)
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"body: not UTF-8 at byte {error.start}; allowed: a JSON object in UTF-8") from None
    except RecursionError:
        raise InvalidRequest(f"body: JSON nested too deeply; allowed: {MAX_JSON_DEPTH} levels") from None
    except ValueError as error:
        raise InvalidRequest(f"body: not valid JSON: {error}; allowed: a JSON object") from None
    if not isinstance(value, dict):
        raise InvalidRequest(f"body: is {json_kind(value)}; allowed: a JSON object")
    if b"\\u" in body:  # only an escape can smuggle one in
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise InvalidRequest("body: has a lone surrogate (\\ud800 to \\udfff); allowed: Unicode text") from None
    return value


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not a JSON number")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        counts = Counter(key for key, _ in pairs)
        raise ValueError(f"the key {counts.most_common(1)[0][0][:MAX_ECHOED_CHARS]!r} comes twice in one object")
    return value


def check_depth(value: object, levels: int = MAX_JSON_DEPTH) -> None:
    """RecursionError where lists and objects are nested deeper than `levels`: what reads them afterwards recurses."""
    layer = [value]
    while layer:
        if levels < 0:
            raise RecursionError
        levels -= 1
        inside: list[object] = []
        for item in layer:
            if isinstance(item, dict):
                inside.extend(child for child in item.values() if isinstance(child, dict | list))
            elif isinstance(item, list):
                inside.extend(child for child in item if isinstance(child, dict | list))
        layer = inside

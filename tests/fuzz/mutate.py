"""Inputs from seeds by mutation: what a driver without coverage feeds to a parser. Deterministic for a generator."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable, Sequence

MAX_INPUT_BYTES = 64 * 1024
NUMBERS = (0, 1, 2**7 - 1, 2**7, 2**8 - 1, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1)
TOKENS = (
    *(b"\x00", b"\xff", b"\xff\xfe", b"\xed\xa0\x80", b"\xf0\x9f\x99\x82", b"\xc0\xaf", b"\r\n", b"\n", b" "),
    *(
        b"{",
        b"}",
        b"[",
        b"]",
        b'"',
        b"'",
        b":",
        b",",
        b"\\",
        b"\\u0000",
        b"\\ud800",
        b"null",
        b"true",
        b"NaN",
        b"1e999",
    ),
    *(b"-1", b"0", b"-0.0", b"99999999999999999999", b"1.5", b"&a", b"*a", b"<<: *a", b"- ", b"!!python/object", b"~"),
    *(
        b"{{",
        b"}}",
        b"{%",
        b"%}",
        b"{% for x in range(99999) %}",
        b"{% endfor %}",
        b"__class__",
        b"|",
        b"\x93",
        b"\xdd",
    ),
)


def _flip(draw: random.Random, data: bytearray) -> None:
    if data:
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)


def _set(draw: random.Random, data: bytearray) -> None:
    if data:
        data[draw.randrange(len(data))] = draw.randrange(256)


def _cut(draw: random.Random, data: bytearray) -> None:
    start = draw.randint(0, len(data))
    del data[start : start + draw.choice((1, 2, 4, 8, 64, 1024))]


def _truncate(draw: random.Random, data: bytearray) -> None:
    del data[draw.randint(0, len(data)) :]


def _insert(draw: random.Random, data: bytearray) -> None:
    at = draw.randint(0, len(data))
    data[at:at] = draw.choice((draw.randbytes(draw.randint(1, 8)), draw.choice(TOKENS)))


def _repeat(draw: random.Random, data: bytearray) -> None:
    start = draw.randint(0, len(data))
    part = data[start : start + draw.choice((1, 2, 8, 32, 256))]
    data[start:start] = part * draw.choice((1, 2, 16, 256))


def _number(draw: random.Random, data: bytearray) -> None:
    """A number of interest where one may stand, in either order of bytes."""
    width, layout = draw.choice(((1, "B"), (2, "H"), (4, "I"), (8, "Q")))
    if len(data) >= width:
        at = draw.randint(0, len(data) - width)
        value = draw.choice(NUMBERS) & (2 ** (8 * width) - 1)
        data[at : at + width] = struct.pack(draw.choice("<>") + layout, value)


MUTATIONS: tuple[Callable[[random.Random, bytearray], None], ...] = (
    *(_flip, _set, _cut, _truncate, _insert, _repeat, _number),
)


def mutated(draw: random.Random, seeds: Sequence[bytes]) -> bytes:
    """One input: a seed changed a few times, sometimes with the end of another, rarely plain noise."""
    if draw.random() < 0.02 or not seeds:
        return draw.randbytes(draw.randint(0, 256))
    data = bytearray(draw.choice(seeds))
    if draw.random() < 0.1:
        other = draw.choice(seeds)
        data = data[: draw.randint(0, len(data))] + other[draw.randint(0, len(other)) :]
    for _ in range(draw.choice((1, 1, 2, 3, 5, 9))):
        draw.choice(MUTATIONS)(draw, data)
    return bytes(data[:MAX_INPUT_BYTES])

"""How the tests of the two drivers play a scene."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from tandem.cluster.types import SampledToken
from tandem.kvtransfer.layout import KVLayout

TOKEN = SampledToken(42, -0.5, ((42, -0.5), (7, -1.5)))
P, D = "r/0/p0", "r/0/d0"


def play(pair_class: Any, scene: Callable[[Any], Awaitable[None]], **settings: Any) -> Any:
    async def run() -> Any:
        pair = pair_class(**settings)
        try:
            await scene(pair)
            pair.check()
        finally:
            await pair.close()
        return pair

    return asyncio.run(run())


def same_content(pair: Any, layout: KVLayout, count: int, *, start: int = 0, to: int = 3) -> bool:
    return all(bytes(pair.pulled.read_block(to + i)) == bytes(pair.held.read_block(i)) for i in range(start, count))

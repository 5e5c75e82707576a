"""Two workers under test, and one handoff between them that a test brings to a state and holds there."""

from __future__ import annotations

import asyncio
import itertools
import math
import random
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from kv_proxy import KVProxy, Tamper, What
from members import POLL_S, WAIT_S, Member, start_member
from scripted_router import Outcome, Refused, Request, ScriptedRouter
from tandem.cluster.config import EngineConfig
from tandem.cluster.engine.devices.paced_language import expected_tokens
from tandem.cluster.models.reference import resolve_model
from tandem.cluster.types import Role

MODEL = "dummy:tiny-llama"
PREFILL_BLOCKS, DECODE_BLOCKS = 40, 32
BLOCK_BYTES = 4096
"""Of dummy:tiny-llama in bfloat16, 16 tokens a block."""
SHORT_TOKENS = 42
"""Two full blocks and a part."""
MIDDLE_TOKENS = 170
"""More than what a blocker leaves free, 11 blocks."""
LONG_TOKENS = 330
"""Half a second of prefill in chunks."""
PREFILL_BLOCKER_TOKENS = 480
"""All but 10 blocks of the prefill worker."""
DECODE_BLOCKER_TOKENS = 380
"""All but 8 blocks of the decode worker; the prefill worker has enough left for one more."""
STEP_BLOCKER_TOKENS = 160
"""One step of about 0.5 s on the decode worker."""
PROOF_TRIES = 3
"""On a machine that stands still for half a second the proof may come before one has begun to look."""
MORE_TIME_S = 60.0
"""For requests that are only in the way."""


def paced_engine(role: Role) -> EngineConfig:
    """Steps long enough that a state can be caught, blocks few enough that they run out."""
    prefill = role is Role.PREFILL
    return EngineConfig(
        model=MODEL,
        device="paced",
        kv_cache_bytes=(PREFILL_BLOCKS if prefill else DECODE_BLOCKS) * BLOCK_BYTES,
        max_batched_tokens=32 if prefill else 256,
        max_running=8,
        paced_step_s=0.002 if prefill else 0.004,
        paced_prefill_token_s=0.0015 if prefill else 0.003,
        paced_decode_row_s=0.0,
    )


class Rig:
    """A prefill worker and a decode worker; what dies is replaced by another life of the same name."""

    def __init__(self, folder: Path, *, engine: Callable[[Role], EngineConfig] = paced_engine, **worker: Any) -> None:
        self._folder = folder
        self._engine = engine
        self._worker = {"transport": "grpc"} | worker
        self._grants_s = min(worker.get(name, math.inf) for name in ("lease_s", "pull_wait_s", "credit_ttl_s"))
        self._lives: dict[Role, Member] = {}
        self._numbers = itertools.count()
        self._random = random.Random(7)
        self.neighbor = ScriptedRouter("neighbor")

    @property
    def prefill(self) -> Member:
        return self._lives[Role.PREFILL]

    @property
    def decode(self) -> Member:
        return self._lives[Role.DECODE]

    @property
    def members(self) -> tuple[Member, ...]:
        return tuple(self._lives.values())

    async def heal(self) -> None:
        """Starts a new life of every worker that is not there."""
        missing = [r for r in (Role.PREFILL, Role.DECODE) if r not in self._lives or not self._lives[r].alive]
        for role in missing:
            if role in self._lives:
                await self._lives[role].close()
        lives = await asyncio.gather(
            *(start_member(self._folder, f"{role}-0", role, self._engine(role), **self._worker) for role in missing)
        )
        for member in lives:
            self._lives[member.role] = member
            await self.neighbor.attach(member)

    async def end(self) -> None:
        """Kills every worker; `heal` starts others."""
        for member in self.members:
            await member.close()

    async def close(self) -> None:
        await self.neighbor.detach()
        await self.end()

    async def wait_clean(self) -> None:
        """Returns when no worker owns anything of anybody."""
        await asyncio.gather(*(member.wait_clean() for member in self.members if member.alive))

    def name(self) -> str:
        return f"q{next(self._numbers)}"

    def prompt(self, tokens: int) -> tuple[int, ...]:
        """Another one each time: no block of it is in anybody's cache."""
        return tuple(self._random.randrange(3, 512) for _ in range(tokens))

    def expected(self, request: Request) -> tuple[int, ...]:
        """What a correct pair of paced workers answers."""
        config = resolve_model(MODEL).config
        return expected_tokens(
            request.prompt,
            request.sampling.max_tokens,
            request.sampling,
            vocab_size=config.vocab_size,
            eos_token_ids=config.eos_token_ids,
        )

    async def prove(self) -> None:
        """Both engines work once more, fall idle, and prove their ledgers."""
        for _ in range(PROOF_TRIES):
            await self.normal_handoff()
            start_s = time.monotonic()
            if all(await asyncio.gather(*(member.proven_since(start_s) for member in self.members))):
                return
        raise AssertionError("an idle engine has not proven its ledger")

    async def normal_handoff(self) -> None:
        """A request that nobody disturbs is answered right; asked again where it took the machine so long that what was
        granted has run out.
        """
        for tries_left in reversed(range(PROOF_TRIES)):
            start_s = time.monotonic()
            try:
                return await self._normal_handoff()
            except (AssertionError, Refused):
                if not tries_left or time.monotonic() - start_s < self._grants_s:
                    raise

    async def _normal_handoff(self) -> None:
        prompt = self.prompt(SHORT_TOKENS)
        request = Request(self.neighbor, self.name(), self.prefill, self.decode, prompt, max_tokens=4)
        try:
            await request.reserve()
            await request.prefill()
            await request.decode()
            outcome = await request.outcome()
        except Refused:
            await request.abort()
            raise
        assert (outcome.kind, outcome.tokens) == ("answer", self.expected(request)), outcome


class Scene:
    """One handoff under test. A recipe reaches a state and leaves in `pending` what the router would do next."""

    def __init__(self, rig: Rig, *, tokens: int, max_tokens: int, timeout_s: float, tamper: Tamper | None) -> None:
        self.rig = rig
        self.proxy = KVProxy(rig.prefill.kv_address, tamper)
        self.router = ScriptedRouter(f"router-{rig.name()}")
        self.pending: list[str] = []
        """Of `reserve`, `prefill`, `decode`, `second` (another attempt, as after a failure), in this order."""
        self.prefill_worker = rig.prefill
        self.decode_worker = rig.decode
        self._tokens, self._max_tokens, self._timeout_s = tokens, max_tokens, timeout_s
        self._blockers: list[Callable[[], Awaitable[None]]] = []
        self.request: Request

    async def open(self) -> None:
        await self.proxy.start()
        for member in (self.prefill_worker, self.decode_worker):
            await self.router.attach(member)
        self.request = Request(
            self.router,
            self.rig.name(),
            self.prefill_worker,
            self.decode_worker,
            self.rig.prompt(self._tokens),
            max_tokens=self._max_tokens,
            kv_address=self.proxy.address,
            timeout_s=self._timeout_s,
        )

    async def close(self) -> None:
        """What a router does at the end of an attempt, and everything of the scene itself."""
        await self.unblock()
        await self.request.abort()
        await self.proxy.close()
        await self.router.detach()

    # What holds a handoff where it is

    async def block_prefill(self) -> None:
        """Another request keeps most of the prefill worker's blocks."""
        rig = self.rig
        prompt = range(3, 3 + PREFILL_BLOCKER_TOKENS)  # mostly cached, the second time
        blocker = Request(
            rig.neighbor,
            rig.name(),
            self.prefill_worker,
            self.decode_worker,
            prompt,
            max_tokens=4,
            timeout_s=MORE_TIME_S,
        )
        await blocker.prefill()
        await blocker.wait_first_token()
        self._blockers.append(lambda: blocker.abort(self.prefill_worker))

    async def block_decode(self) -> None:
        """Another request keeps most of the decode worker's blocks: the end of its KV does not come."""
        rig = self.rig
        proxy = KVProxy(self.prefill_worker.kv_address)
        await proxy.start()
        proxy.hold(What.END)
        prompt = range(3, 3 + DECODE_BLOCKER_TOKENS)
        blocker = Request(
            rig.neighbor,
            rig.name(),
            self.prefill_worker,
            self.decode_worker,
            prompt,
            max_tokens=4,
            kv_address=proxy.address,
            timeout_s=MORE_TIME_S,
        )
        await blocker.reserve()
        await blocker.prefill()
        await blocker.decode()
        await seen(proxy, What.END)

        async def end() -> None:
            await blocker.abort()
            await proxy.close()

        self._blockers.append(end)

    async def block_step(self) -> None:
        """The decode worker begins a step that takes a while: somebody's prompt is prefilled there."""
        rig = self.rig
        prompt = rig.prompt(STEP_BLOCKER_TOKENS)
        blocker = Request(rig.neighbor, rig.name(), self.prefill_worker, self.decode_worker, prompt, max_tokens=1)
        await blocker.reserve()
        before = (await self.decode_worker.status()).running
        await blocker.decode(local=True)
        while (await self.decode_worker.status()).running == before:  # noqa: ASYNC110 - another process
            await asyncio.sleep(POLL_S)

    async def unblock(self) -> None:
        """Ends the blockers, where their worker still lives."""
        blockers, self._blockers = self._blockers, []
        for end in blockers:
            await end()

    @property
    def blocked(self) -> bool:
        """Whether other requests are in the way."""
        return bool(self._blockers)

    # How it goes on

    async def go_on(self) -> Outcome | None:
        """Lets everything go and makes the calls that are left; an outcome where one of them was refused."""
        self.proxy.let_go()
        await self.unblock()
        steps, self.pending = self.pending, []
        for step in steps:
            try:
                await self._step(step)
            except Refused as refused:
                return Outcome(f"refused:{refused.code.name}", message=str(refused))
        return None

    async def finish(self) -> Outcome:
        """Goes on, and says how the request ended."""
        return await self.go_on() or await self.request.outcome()

    async def _step(self, step: str) -> None:
        if step == "second":
            await self.begin_again()
        else:
            await getattr(self.request, step)()

    async def begin_again(self) -> None:
        """Another attempt, with the lives that are there now, past the proxy; the first one is closed."""
        first = self.request
        await first.abort()
        await self.rig.heal()
        for member in self.rig.members:
            if member not in (self.prefill_worker, self.decode_worker):
                await self.router.attach(member)
        self.prefill_worker, self.decode_worker = self.rig.prefill, self.rig.decode
        self.request = Request(
            self.router,
            first.request_id,
            self.prefill_worker,
            self.decode_worker,
            first.prompt,
            max_tokens=self._max_tokens,
            attempt=first.attempt + 1,
        )
        await self.request.reserve()
        await self.request.prefill()
        await self.request.decode()


async def seen(proxy: KVProxy, what: What, count: int = 1) -> None:
    """Returns when so many messages of this kind have reached the proxy."""
    try:
        async with asyncio.timeout(WAIT_S):
            while proxy.seen[what] < count:  # noqa: ASYNC110 - plain state of a test's own server
                await asyncio.sleep(POLL_S)
    except TimeoutError:
        raise AssertionError(f"{proxy.seen[what]} of {count} {what} messages came: {proxy.seen}") from None


async def opened(rig: Rig, tokens: int = SHORT_TOKENS) -> Scene:
    """A scene that nobody tampers with."""
    scene = Scene(rig, tokens=tokens, max_tokens=4, timeout_s=WAIT_S, tamper=None)
    await scene.open()
    return scene

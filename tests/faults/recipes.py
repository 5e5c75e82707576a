"""How a real handoff is brought to each state of the protocol, and held there: one recipe a state.

The states are those of `HolderState` and `PullerState`; `test_matrix.py` fails if one of them has no recipe. What a
recipe reached is read from the workers' own status (`holder_states`, `puller_states`), but for the two states that
begin and end within one call of the event loop (REVOKED, CANCELLING: a reader, or a writer, is told to stop and has
stopped when the call returns); those are passed through, with a reader or writer open, and held right behind.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from kv_proxy import What
from scenes import LONG_TOKENS, MIDDLE_TOKENS, SHORT_TOKENS, Scene, seen
from tandem.kvtransfer.protocol.holder_state import HolderState
from tandem.kvtransfer.protocol.puller_state import PullerState

Reach = Callable[[Scene], Awaitable[None]]
EVERYTHING = frozenset(What) - {What.REFUSED, What.ABORT}
FRAMES = frozenset({What.BLOCK, What.END, What.CONFIRM})
PULL_ON = FRAMES | {What.PULL}


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """One state, how to reach it, and what is true in it."""

    side: str
    state: str
    reach: Reach
    ahead: frozenset[What]
    """Messages of the good path that have yet to pass the proxy."""
    made: frozenset[str]
    """Calls that the router has made: `reserve`, `prefill`, `decode`."""
    tokens: int = SHORT_TOKENS
    max_tokens: int = 6
    second: bool = False
    """The first attempt is over; the router begins another."""
    lasts: bool = True
    """Held until the test lets go; False: as long as some steps of an engine take."""

    @property
    def name(self) -> str:
        return f"{self.side}-{self.state}"

    @property
    def answered(self) -> bool:
        """The whole answer has come."""
        return self.name == "puller-done"


HOLDER: dict[HolderState, Recipe] = {}
PULLER: dict[PullerState, Recipe] = {}
ALL = frozenset({"reserve", "prefill", "decode"})


def holder(state: HolderState, **facts: object) -> Callable[[Reach], Reach]:
    """The recipe for a state of the prefill side."""

    def note(reach: Reach) -> Reach:
        HOLDER[state] = Recipe(side="holder", state=state.value, reach=reach, **facts)  # type: ignore[arg-type]
        return reach

    return note


def puller(state: PullerState, **facts: object) -> Callable[[Reach], Reach]:
    """The recipe for a state of the decode side."""

    def note(reach: Reach) -> Reach:
        PULLER[state] = Recipe(side="puller", state=state.value, reach=reach, **facts)  # type: ignore[arg-type]
        return reach

    return note


# The prefill side


@holder(HolderState.ABSENT, ahead=PULL_ON, made=frozenset({"reserve", "decode"}))
async def holder_absent(scene: Scene) -> None:
    """The pull is on its way, the prefill is not sent: the holder has heard of neither."""
    scene.proxy.hold(What.PULL)
    await scene.request.reserve()
    await scene.request.decode()
    await seen(scene.proxy, What.PULL)
    await scene.decode_worker.wait_states(pulling=1)
    await scene.prefill_worker.wait_states()
    scene.pending = ["prefill"]


@holder(HolderState.AWAITED, ahead=FRAMES, made=frozenset({"reserve", "decode"}))
async def holder_awaited(scene: Scene) -> None:
    """The pull has overtaken its prefill."""
    await scene.request.reserve()
    await scene.request.decode()
    await scene.prefill_worker.wait_states(awaited=1)
    scene.pending = ["prefill"]


@holder(HolderState.QUEUED, ahead=FRAMES, made=ALL, tokens=MIDDLE_TOKENS)
async def holder_queued(scene: Scene) -> None:
    """The prefill waits for blocks, the reader for the prefill."""
    await scene.block_prefill()
    await scene.request.reserve()
    await scene.request.prefill()
    await scene.request.decode()
    await seen(scene.proxy, What.PULL)
    await scene.prefill_worker.wait_states(held=1, queued=1)


@holder(HolderState.COMPUTING, ahead=FRAMES, made=ALL, tokens=LONG_TOKENS, lasts=False)
async def holder_computing(scene: Scene) -> None:
    """Chunks are computed, and what is full is pulled."""
    await scene.request.reserve()
    await scene.request.prefill()
    await scene.request.decode()
    await seen(scene.proxy, What.PULL)
    await scene.prefill_worker.wait_states(computing=1)


@holder(HolderState.HELD, ahead=EVERYTHING, made=frozenset({"reserve", "prefill"}))
async def holder_held(scene: Scene) -> None:
    """Prefill is done, and nobody has pulled."""
    await scene.request.reserve()
    await scene.request.prefill()
    await scene.request.wait_first_token()
    await scene.prefill_worker.wait_states(held=1)
    scene.pending = ["decode"]


@holder(HolderState.REVOKED, ahead=frozenset(), made=ALL, tokens=LONG_TOKENS, second=True)
async def holder_revoked(scene: Scene) -> None:
    """The ticket was ended under an open reader, which has stopped; what it was told is still on its way."""
    await holder_computing(scene)
    scene.proxy.hold(What.REFUSED)
    await scene.request.abort(scene.prefill_worker)
    await seen(scene.proxy, What.REFUSED)
    assert scene.proxy.refusals == ["aborted"]
    await scene.prefill_worker.wait_states()
    await scene.decode_worker.wait_states(pulling=1)
    scene.pending = ["second"]


@holder(HolderState.DONE, ahead=frozenset(), made=ALL, max_tokens=60, lasts=False)
async def holder_done(scene: Scene) -> None:
    """Confirmed; the decode worker is in the middle of the answer."""
    await scene.request.reserve()
    await scene.request.prefill()
    await scene.request.decode()
    await seen(scene.proxy, What.CONFIRM)
    await scene.request.wait_tokens(3)
    await scene.prefill_worker.wait_states()
    await scene.decode_worker.wait_states()


# The decode side


@puller(PullerState.ABSENT, ahead=EVERYTHING, made=frozenset())
async def puller_absent(scene: Scene) -> None:
    """Nothing has been asked of anybody."""
    scene.pending = ["reserve", "prefill", "decode"]


@puller(PullerState.CREDITED, ahead=EVERYTHING, made=frozenset({"reserve"}))
async def puller_credited(scene: Scene) -> None:
    """A credit, and no more."""
    await scene.request.reserve()
    await scene.decode_worker.wait_states(credited=1)
    scene.pending = ["prefill", "decode"]


@puller(PullerState.WAITING_BLOCKS, ahead=EVERYTHING, made=ALL, tokens=MIDDLE_TOKENS)
async def puller_waiting_blocks(scene: Scene) -> None:
    """No block is free: the KV waits on the prefill worker."""
    await scene.block_decode()
    await scene.request.reserve()
    await scene.request.prefill()
    await scene.request.decode()
    await scene.request.wait_first_token()
    await scene.decode_worker.wait_states(pulling=1, waiting_blocks=1)


@puller(PullerState.PULLING, ahead=FRAMES, made=ALL)
async def puller_pulling(scene: Scene) -> None:
    """The first block is here, the others are on their way."""
    scene.proxy.hold(What.BLOCK, after=1)
    await scene.request.reserve()
    await scene.request.prefill()
    await scene.request.wait_first_token()
    await scene.request.decode()
    await seen(scene.proxy, What.BLOCK, 2)
    await scene.decode_worker.wait_states(pulling=1)


@puller(PullerState.CANCELLING, ahead=frozenset(), made=ALL, second=True)
async def puller_cancelling(scene: Scene) -> None:
    """The attempt was ended under an open writer, which has stopped; the holder has not been told yet."""
    scene.proxy.hold(What.ABORT)
    await puller_pulling(scene)
    await scene.request.abort(scene.decode_worker)
    await seen(scene.proxy, What.ABORT)
    await scene.decode_worker.wait_states()
    await scene.prefill_worker.wait_states(held=1)
    scene.pending = ["second"]


@puller(PullerState.READY, ahead=frozenset({What.CONFIRM}), made=ALL, lasts=False)
async def puller_ready(scene: Scene) -> None:
    """All KV is here, and the engine is in the middle of a long step."""
    scene.proxy.hold(What.END)
    await scene.request.reserve()
    await scene.request.prefill()
    await scene.request.decode()
    await seen(scene.proxy, What.END)
    await scene.block_step()
    scene.proxy.let_go()
    await scene.decode_worker.wait_states(ready=1)


@puller(PullerState.RUNNING, ahead=frozenset({What.CONFIRM}), made=ALL, max_tokens=60)
async def puller_running(scene: Scene) -> None:
    """The first step is done, the holder has not heard of it."""
    scene.proxy.hold(What.CONFIRM)
    await scene.request.reserve()
    await scene.request.prefill()
    await scene.request.decode()
    await seen(scene.proxy, What.CONFIRM)
    await scene.decode_worker.wait_states(running=1)
    await scene.prefill_worker.wait_states(held=1)


@puller(PullerState.DONE, ahead=frozenset(), made=ALL)
async def puller_done(scene: Scene) -> None:
    """The answer is complete."""
    await scene.request.reserve()
    await scene.request.prefill()
    await scene.request.decode()
    outcome = await scene.request.outcome()
    assert outcome.kind == "answer", outcome
    await seen(scene.proxy, What.CONFIRM)
    await scene.prefill_worker.wait_states()
    await scene.decode_worker.wait_states()

"""The faults: what happens to a handoff in some state, and how it must end. One table; `test_matrix.py` runs it.
What can happen to messages on their way is added by `path_faults.py`.

A fault strikes a scene that a recipe has brought to a state and returns how the request ended. `expect` says which
endings are right in that state: `answer` is the whole right answer, everything else is an error that the router hears
of within the request's time, or the silence that follows its own abort. What is left behind is looked at afterwards,
the same for all (`test_matrix.run_cell`).

A cell that makes no sense is left out by a rule of `RULES`, by name, and by nothing else.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace

import grpc
import pytest
from grpc import aio
from kv_proxy import Tamper, What
from members import WAIT_S, Member
from recipes import Recipe
from scenes import Scene
from scripted_router import Outcome, Refused
from tandem.cluster.auth import OPEN, MemberCredentials
from tandem.cluster.config import SecurityConfig
from tandem.kvtransfer import wire
from tandem.kvtransfer.grpc_transport import SERVICE
from tandem.kvtransfer.ticket import HandoffRefused, Ticket
from tandem.kvtransfer.transport import PullRequest

Strike = Callable[[Scene, Recipe], Awaitable[Outcome]]
Expect = Callable[[Recipe], frozenset[str]]
STOP_S = 0.3
LONG_STOP_S = 1.5
OVER_S = 1.0
"""Longer than everything that the short rig grants."""
TYPICAL = frozenset({"holder-computing", "holder-held", "puller-waiting_blocks", "puller-pulling", "puller-running"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """One row of the table."""

    name: str
    strike: Strike
    expect: Expect
    tamper: Callable[[], Tamper] | None = None
    needs: What | None = None
    """The message that it happens to."""
    timeout_s: Callable[[Recipe], float] = lambda recipe: WAIT_S
    """The request's own time."""
    short: bool = False
    """On workers whose leases, waits and credits end soon."""
    kills: bool = False
    alone: bool = True
    """After an answer, or the router's own abort, all must be clean before the router closes the attempt."""
    everywhere: bool = True
    """False: in the suite only in `TYPICAL` states, and everywhere in the sweep."""


FAULTS: dict[str, Fault] = {}


def fault(expect: Expect | str, **facts: object) -> Callable[[Strike], Strike]:
    """Adds a row: the function's name, what it does, and how that must end."""

    def note(strike: Strike) -> Strike:
        add(strike.__name__, strike, expect, **facts)
        return strike

    return note


def add(name: str, strike: Strike, expect: Expect | str, **facts: object) -> None:
    """Adds a row."""
    assert name not in FAULTS
    rule = ends(expect) if isinstance(expect, str) else expect
    FAULTS[name] = Fault(name=name, strike=strike, expect=rule, **facts)  # type: ignore[arg-type]


def ends(*kinds: str) -> Expect:
    """The same in every state."""
    return lambda recipe: frozenset(kinds)


# --- what the router does ---------------------------------------------------------------------------------------------


@fault(lambda recipe: frozenset({"answer"} if recipe.answered else {"silence", "failed:aborted"}))
async def abort(scene: Scene, recipe: Recipe) -> Outcome:
    """The client is gone. What the router had sent before and comes only now is refused."""
    await scene.request.abort()
    return await _silence(scene)


@fault(lambda recipe: frozenset({"answer"} if _has_all(recipe) else {"failed:aborted", "refused:ABORTED"}))
async def abort_reaches_holder_only(scene: Scene, recipe: Recipe) -> Outcome:
    """The decode worker finds out from the holder."""
    await scene.request.abort(scene.prefill_worker)
    return await scene.finish()


@fault(lambda recipe: frozenset({"answer"} if recipe.answered or recipe.second else {"silence"}), alone=False)
async def abort_reaches_puller_only(scene: Scene, recipe: Recipe) -> Outcome:
    """The holder finds out from the decode worker, where that knows the ticket."""
    await scene.request.abort(scene.decode_worker)
    outcome = await scene.finish() if recipe.second else await _silence(scene)
    if "decode" in recipe.made:
        await scene.prefill_worker.wait_clean()
    return outcome


@fault(lambda recipe: frozenset({"answer"} if recipe.answered else {"lost:decode", "refused:FAILED_PRECONDITION"}))
async def router_gone(scene: Scene, recipe: Recipe) -> Outcome:
    """Its streams break: what it had asked for ends, and what comes from it later is refused."""
    await scene.router.detach()
    outcome = await scene.finish()
    await scene.rig.wait_clean()
    return outcome


@fault("answer")
async def calls_repeated(scene: Scene, recipe: Recipe) -> Outcome:
    """Every call that was made comes again, and is refused."""
    for name in sorted(recipe.made - {"reserve"}):
        assert await _refusal(getattr(scene.request, name)()) == "ABORTED"
    return await scene.finish()


@fault("answer")
async def calls_for_another_life(scene: Scene, recipe: Recipe) -> Outcome:
    """Every call, for another epoch of its worker."""
    request = scene.request
    for call, member in (
        (request.reserve, scene.decode_worker),
        (request.prefill, scene.prefill_worker),
        (request.decode, scene.decode_worker),
    ):
        assert await _refusal(call(epoch=member.epoch ^ 2)) == "FAILED_PRECONDITION"
    return await scene.finish()


# --- what happens to processes ----------------------------------------------------------------------------------------

HOLDER_LOST = frozenset({"failed:peer_lost", "lost:prefill", "refused:UNAVAILABLE"})
PULLER_LOST = frozenset({"lost:decode", "refused:UNAVAILABLE"})


def _has_all(recipe: Recipe) -> bool:
    """The holder is not needed any more, or not in this attempt."""
    return recipe.second or recipe.name in (
        "puller-ready",
        "puller-running",
        "puller-done",
        "holder-done",
        "puller-pulling",
    )


@fault(lambda recipe: frozenset({"answer"} if _has_all(recipe) else HOLDER_LOST), kills=True, alone=False)
async def kill_holder(scene: Scene, recipe: Recipe) -> Outcome:
    await scene.prefill_worker.kill()
    return await scene.finish()


@fault(
    lambda recipe: frozenset({"answer"} if recipe.answered or recipe.second else PULLER_LOST), kills=True, alone=False
)
async def kill_puller(scene: Scene, recipe: Recipe) -> Outcome:
    await scene.decode_worker.kill()
    return await scene.finish()


@fault("answer")
async def stop_holder(scene: Scene, recipe: Recipe) -> Outcome:
    return await _stopped(scene, scene.prefill_worker, STOP_S)


@fault("answer")
async def stop_puller(scene: Scene, recipe: Recipe) -> Outcome:
    return await _stopped(scene, scene.decode_worker, STOP_S)


LATE = ends("answer", "failed:deadline", "failed:peer_lost", "failed:aborted", "refused:ABORTED")
"""The last two: one side has ended it by its own clock, and says so to whoever comes after."""


@fault(LATE, timeout_s=lambda recipe: 1.2, alone=False, everywhere=False)
async def stop_holder_past_deadline(scene: Scene, recipe: Recipe) -> Outcome:
    return await _stopped(scene, scene.prefill_worker, LONG_STOP_S)


@fault(LATE, timeout_s=lambda recipe: 1.2, alone=False, everywhere=False)
async def stop_puller_past_deadline(scene: Scene, recipe: Recipe) -> Outcome:
    return await _stopped(scene, scene.decode_worker, LONG_STOP_S)


# --- time -------------------------------------------------------------------------------------------------------------

EXPIRED = {
    "holder-awaited": "failed:unknown_ticket",
    "holder-held": "refused:FAILED_PRECONDITION",
    "puller-credited": "refused:FAILED_PRECONDITION",
    "puller-waiting_blocks": "failed:expired",
}


@fault(lambda recipe: frozenset({EXPIRED.get(recipe.name, "answer")}), short=True, alone=False)
async def expired(scene: Scene, recipe: Recipe) -> Outcome:
    """Lease, credit and the wait for a prefill run out, whichever runs in this state."""
    await asyncio.sleep(OVER_S)
    return await scene.finish()


DEADLINES = {"holder-computing": 0.3, "puller-ready": 0.35}
"""Seconds, where a state does not last as long as `DEADLINE_S`."""
DEADLINE_S = 0.8
ENDED_BY_ITS_TIME = {"holder-held": "silence", "puller-cancelling": "silence", "puller-running": "answer"}
"""Where it is not the failure `deadline`: nobody was asked, or told, who would say so; or the answer was faster."""


@fault(
    lambda recipe: frozenset({ENDED_BY_ITS_TIME.get(recipe.name, "failed:deadline")}),
    timeout_s=lambda recipe: DEADLINES.get(recipe.name, DEADLINE_S),
    alone=False,
)
async def deadline(scene: Scene, recipe: Recipe) -> Outcome:
    """The request's own time ends while everything is held: each side ends it by its own clock."""
    scene.pending = []
    await asyncio.sleep(scene.request.timeout_s)
    if not scene.blocked:
        await scene.prefill_worker.wait_clean()
    if recipe.name in ENDED_BY_ITS_TIME:
        return scene.request.ended() or Outcome("silence")
    return await scene.request.outcome()


# --- strangers' messages beside the right ones ------------------------------------------------------------------------


@fault("answer")
async def stray_of_wrong_epoch(scene: Scene, recipe: Recipe) -> Outcome:
    """A peer that means the holder's earlier life pulls, confirms and aborts."""
    ticket = await _ticket(scene)
    said = await _stray(scene, replace(ticket, epoch=ticket.epoch ^ 2))
    assert set(said) <= {"wrong_epoch", "stale_attempt"}, said
    assert said[0] == "wrong_epoch"
    return await scene.finish()


@fault("answer")
async def stray_of_wrong_fingerprint(scene: Scene, recipe: Recipe) -> Outcome:
    """A decode worker with other weights pulls."""
    ticket = replace(await _ticket(scene), fingerprint="other weights")
    assert await _said(scene.prefill_worker, "Pull", _pull(ticket)) == "fingerprint_mismatch"
    return await scene.finish()


@fault("answer")
async def stray_of_older_attempt(scene: Scene, recipe: Recipe) -> Outcome:
    """An older decode attempt, which had not heard that it was over, pulls, confirms and aborts."""
    said = await _stray(scene, replace(await _ticket(scene), decode_attempt=0))
    assert set(said) <= {"stale_attempt", "unknown_ticket", "aborted"}, said
    return await scene.finish()


@fault("answer")
async def stray_bytes(scene: Scene, recipe: Recipe) -> Outcome:
    """Bytes that are no message, to every method of the holder's port."""
    for method in ("Hello", "Pull", "Confirm", "Abort"):
        for data in (b"", b"\x00", bytes(range(256)), wire.encode_ack()):
            assert await _said(scene.prefill_worker, method, data) == "corrupt"
    return await scene.finish()


@fault("answer")
async def stray_without_the_secret(scene: Scene, recipe: Recipe) -> Outcome:
    """Somebody who knows the ticket, but not the cluster's secret, says everything that there is to say."""
    ticket = await _ticket(scene)
    messages = {"Hello": b"", **_messages(ticket)}
    for stranger in (OPEN, MemberCredentials.load(SecurityConfig(secret="the secret of another cluster"))):
        for method, data in messages.items():
            with pytest.raises(aio.AioRpcError) as refused:
                await _said(scene.prefill_worker, method, data, stranger)
            assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED, method
    return await scene.finish()


# --- rules: cells that make no sense ----------------------------------------------------------------------------------

RULES: dict[str, Callable[[Fault, Recipe], bool]] = {
    "the message that it happens to has passed already": lambda f, r: f.needs is not None and f.needs not in r.ahead,
    "nothing was submitted whose time could end": lambda f, r: f.name == "deadline" and r.made <= {"reserve"},
    "the answer is complete before its time ends": lambda f, r: (
        f.name.endswith("deadline") and r.name in ("holder-done", "puller-done")
    ),
    "nothing was called that could be repeated": lambda f, r: f.name == "calls_repeated" and r.made <= {"reserve"},
    "nobody has pulled yet whom an attempt could be older than": lambda f, r: (
        f.name == "stray_of_older_attempt" and What.PULL in r.ahead
    ),
}
"""Name -> True where the cell is left out."""


def left_out(fault: Fault, recipe: Recipe) -> str | None:
    """The rule by which a cell is left out, or None."""
    return next((name for name, rule in RULES.items() if rule(fault, recipe)), None)


# --- within -----------------------------------------------------------------------------------------------------------


async def _silence(scene: Scene) -> Outcome:
    """Everything goes on and is refused; when both sides are clean, nothing but the answer may have been said."""
    scene.proxy.let_go()
    await scene.unblock()
    for step in scene.pending:
        if step != "second":
            with contextlib.suppress(Refused):
                await getattr(scene.request, step)()
    scene.pending = []
    await scene.decode_worker.wait_clean()
    return scene.request.ended() or Outcome("silence")


async def _stopped(scene: Scene, member: Member, stop_s: float) -> Outcome:
    """SIGSTOP; the rest of the script goes on meanwhile; SIGCONT."""
    member.signal(signal.SIGSTOP)
    try:
        going_on = asyncio.create_task(scene.go_on())
        await asyncio.sleep(stop_s)
    finally:
        member.signal(signal.SIGCONT)
    return await going_on or await scene.request.outcome()


async def _refusal(call: Awaitable[None]) -> str:
    try:
        await call
    except Refused as refused:
        return refused.code.name
    return "OK"


async def _ticket(scene: Scene) -> Ticket:
    """The ticket of the handoff under test."""
    request, member = scene.request, scene.prefill_worker
    return Ticket(
        request_id=request.request_id,
        choice=0,
        prefill_attempt=request.attempt,
        decode_attempt=request.attempt,
        prefill_worker=member.worker_id,
        epoch=member.epoch,
        num_tokens=len(request.prompt),
        fingerprint=(await member.status()).fingerprint,
    )


def _pull(ticket: Ticket) -> bytes:
    return wire.encode_pull(PullRequest(ticket=ticket, first_block=0))


async def _stray(scene: Scene, ticket: Ticket) -> list[str]:
    """What the holder answers to a pull, a confirmation and an abort."""
    return [await _said(scene.prefill_worker, method, data) for method, data in _messages(ticket).items()]


def _messages(ticket: Ticket) -> dict[str, bytes]:
    return {"Pull": _pull(ticket), "Confirm": wire.encode_ticket(ticket), "Abort": wire.encode_ticket(ticket)}


async def _said(member: Member, method: str, data: bytes, credentials: MemberCredentials | None = None) -> str:
    """The reason with which the holder refuses a raw message, of a member of its cluster unless `credentials` are other
    ones; `ok` where it does not.
    """
    async with (credentials or member.credentials).channel(member.kv_address, ()) as channel:
        if method == "Pull":
            call = channel.unary_stream(f"/{SERVICE}/Pull")(data, timeout=WAIT_S)
            answer = await call.read()
        else:
            answer = await channel.unary_unary(f"/{SERVICE}/{method}")(data, timeout=WAIT_S)
    assert isinstance(answer, bytes), f"{method} was answered by the end of its stream"
    try:
        return wire.decode_refused(answer).reason.value
    except HandoffRefused:
        return "ok"

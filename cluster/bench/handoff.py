"""What a handoff costs: two real workers, each in its own process, and this process as their router.

For every transport and size, one handoff after another, nothing else under way:

    reserve      the router asks the decode worker for a credit, until it has it
    dispatch     the router sends the prompt, until the prefill worker's engine begins its step
    (prefill)    the step
    open         the prefill step ends, until the decode worker has the first block before it, ready to be written
    transfer     from there until the last block is written
    join         until the decode worker's engine begins a step with the sequence
    (decode)     the step
    reply        the step ends, until the router has the token
    confirm      the confirmation, until its answer; off the request's path

Orchestration is reserve + dispatch + open + join + reply: all but bytes and computing. The device is paced and computes
nothing, its KV has the size of a real model's and is checked by the decode step; one step takes in the whole prompt, so
that no byte moves before prefill has ended: nothing is hidden.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass

from ..messages import sampling_to_proto
from ..proto import tandem_internal_v1_pb2 as pb
from ..types import SamplingParams
from .handoff_copies import MemoryCopies
from .handoff_process import CALL_S, ROUTER_ID, WorkerProcess
from .handoff_report import Cell, Handoff, stages_of
from .handoff_worker import VOCAB_SIZE, WorkerSpec

TRANSPORTS = ("grpc", "grpc-nosum", "mapped")
"""`grpc-nosum`: without the checksum."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HandoffOptions:
    """What to measure."""

    transports: tuple[str, ...] = TRANSPORTS
    sizes_mib: tuple[float, ...] = (1.0, 16.0, 256.0)
    repeats: int = 30
    """Handoffs of each size and transport; fewer of big ones, so that each takes about as much time."""
    warmups: int = 3
    token_bytes: int = 23040
    """KV of one token; SmolLM2-135M's in bfloat16: 30 layers, 3 heads, 64 wide."""
    block_size: int = 16
    step_s: float = 0.01
    """A step takes at least this long, as a model's would: what is sent beside it is not waited for."""
    seed: int = 0
    kv_mover: str = "auto"
    """As `WorkerConfig.kv_mover`."""

    def __post_init__(self) -> None:
        for name in self.transports:
            if name not in TRANSPORTS:
                raise ValueError(f"transports: {name!r} is not allowed; allowed: {', '.join(TRANSPORTS)}")
        if not self.transports or not self.sizes_mib:
            raise ValueError("transports and sizes_mib: at least one of each")
        for size in self.sizes_mib:
            if not self.token_bytes / 2**20 <= size <= 4096:
                raise ValueError(f"sizes_mib: {size:g} is not allowed; allowed: one token's KV to 4096")
        if not 1 <= self.repeats <= 10_000 or not 0 <= self.warmups <= 1000:
            raise ValueError(f"repeats: {self.repeats} is not allowed; allowed: 1…10000 (warmups: 0…1000)")
        if self.token_bytes < 32 or self.token_bytes % 16:
            raise ValueError(f"token_bytes: {self.token_bytes} is not allowed; allowed: multiples of 16 from 32 on")

    def tokens_of(self, size_mib: float) -> int:
        """Tokens whose KV has this size, in whole blocks."""
        block_bytes = self.block_size * self.token_bytes
        return max(1, round(size_mib * 2**20 / block_bytes)) * self.block_size

    def repeats_of(self, size_mib: float) -> int:
        """How often a size is measured."""
        return min(self.repeats, max(3, round(self.repeats * 16 / size_mib)))


async def run_handoffs(options: HandoffOptions, on_cell: Callable[[Cell], None] = lambda cell: None) -> list[Cell]:
    """Measures every transport at every size; `on_cell` hears of each as it is done."""
    cells = []
    for transport in options.transports:
        async with AsyncExitStack() as stack:
            prefill, decode = [
                await WorkerProcess.start(_spec(options, role, transport)) for role in ("prefill", "decode")
            ]
            stack.push_async_callback(prefill.close)
            stack.push_async_callback(decode.close)
            copies = MemoryCopies(options.token_bytes, options.block_size, prefill.spec.num_blocks)
            await _warm_up(options, prefill, decode, copies)
            for size_mib in options.sizes_mib:
                cell = await _measure(options, transport, size_mib, prefill, decode, copies)
                cells.append(cell)
                on_cell(cell)
    return cells


def _spec(options: HandoffOptions, role: str, transport: str) -> WorkerSpec:
    most_tokens = max(options.tokens_of(size) for size in options.sizes_mib)
    return WorkerSpec(
        worker_id=role,
        role=role,
        transport=transport.partition("-")[0],
        checksum=transport != "grpc-nosum",
        token_bytes=options.token_bytes,
        num_blocks=most_tokens // options.block_size + 8,
        block_size=options.block_size,
        step_s=options.step_s,
        kv_mover=options.kv_mover,
    )


async def _warm_up(
    options: HandoffOptions, prefill: WorkerProcess, decode: WorkerProcess, copies: MemoryCopies
) -> None:
    """Handoffs that use every block on both sides once, so that no page is the first time's; the two have met then."""
    tokens = options.tokens_of(max(options.sizes_mib))
    for index in range(2):
        await _one(f"warm-{index}", [1 + index] * tokens, prefill, decode, copies)


async def _measure(
    options: HandoffOptions,
    transport: str,
    size_mib: float,
    prefill: WorkerProcess,
    decode: WorkerProcess,
    copies: MemoryCopies,
) -> Cell:
    draw = random.Random(f"{options.seed} {transport} {size_mib}")
    tokens, handoffs = options.tokens_of(size_mib), []
    for index in range(options.warmups + options.repeats_of(size_mib)):
        prompt = [draw.randrange(VOCAB_SIZE) for _ in range(tokens)]
        request_id = f"{transport}-{size_mib:g}-{index}"
        handoff = await _one(request_id, prompt, prefill, decode, copies)
        if index >= options.warmups:
            handoffs.append(handoff)
    return Cell(transport=transport, size_mib=size_mib, handoffs=tuple(handoffs))


async def _one(
    request_id: str, prompt: Sequence[int], prefill: WorkerProcess, decode: WorkerProcess, copies: MemoryCopies
) -> Handoff:
    """One request, from its credit to its second token."""
    sequence = pb.Sequence(
        request_id=request_id,
        prefill_attempt=1,
        decode_attempt=1,
        prompt_token_ids=prompt,
        sampling=sampling_to_proto(SamplingParams(max_tokens=2, temperature=0.0, ignore_eos=True)),
        timeout_s=CALL_S,
        router_id=ROUTER_ID,
    )
    first, second = prefill.first_token(request_id), decode.first_token(request_id)
    reserve = pb.ReserveRequest(
        request_id=request_id, decode_attempt=1, router_id=ROUTER_ID, context_tokens=len(prompt), epoch=decode.epoch
    )
    begin_s = time.monotonic()
    credit = await decode.commands.ask(pb.Command(reserve=reserve))
    reserved_s = time.monotonic()
    await prefill.commands.ask(
        pb.Command(prefill=pb.PrefillRequest(sequence=sequence, handoff=True, epoch=prefill.epoch))
    )
    peer = pb.PrefillPeer(worker_id=prefill.spec.worker_id, epoch=prefill.epoch, kv_address=prefill.kv_address)
    decoding = pb.DecodeRequest(sequence=sequence, credit_id=credit.credit_id, epoch=decode.epoch, peer=peer)
    await decode.commands.ask(pb.Command(decode=decoding))
    await asyncio.wait_for(first, CALL_S)
    replied_s = await asyncio.wait_for(second, CALL_S)
    await _wait_idle(prefill, decode)
    memcpy_s = copies.seconds(-(-len(prompt) // prefill.spec.block_size))
    marks = {"prefill": await prefill.marks(), "decode": await decode.marks()}
    return stages_of(request_id, begin_s, reserved_s, replied_s, marks, memcpy_s)


async def _wait_idle(*workers: WorkerProcess) -> None:
    """Until nothing of the request is left: the confirmation came, the blocks are free."""
    async with asyncio.timeout(CALL_S):
        for worker in workers:
            while True:
                status = await worker.stub.Status(pb.StatusRequest(), timeout=CALL_S)
                if status.streams == status.leases == status.pulls == 0 and not sum(status.puller_states.values()):
                    break
                await asyncio.sleep(0.002)

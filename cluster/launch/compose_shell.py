"""Builds what a worker is made of once its device is there: scheduler, engine thread, shell, both services."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ...decode_worker.service import DecodeService
from ...kvtransfer.ticket import SegmentOffer
from ...kvtransfer.transport import KVTransport
from ...prefill_worker.service import PrefillService
from ..auth import MemberCredentials
from ..clock import MonotonicClock
from ..config import EngineConfig, WorkerConfig
from ..engine.block_pool import BlockPool
from ..engine.decode_parts import PART_ROWS
from ..engine.devices.base import Device
from ..engine.parallel.rank_process import RankProcess
from ..engine.policies import policy_for
from ..engine.prefix_cache import PrefixCache
from ..engine.scheduler import Scheduler
from ..latency.linear import OnlineStepTimeFit
from ..models.reference import ModelFiles
from ..profiler.first_steps import known_steps
from ..proto import tandem_internal_v1_pb2 as pb
from ..rpc import new_epoch
from ..worker.engine_thread import EngineThread
from ..worker.shell import WorkerFacts, WorkerShell


@dataclass(frozen=True, slots=True, kw_only=True)
class KVEnds:
    """How KV reaches a worker and leaves it."""

    transport: KVTransport
    """Through which it pulls."""
    offer: SegmentOffer | None
    """Of its memory, for others to map; None: it cannot be mapped."""
    ranks: bytes
    """For `Hello.ranks`; empty: KV does not go from rank to rank."""


def worker_facts(
    config: WorkerConfig, files: ModelFiles, device: Device, other_ranks: Sequence[RankProcess]
) -> WorkerFacts:
    """What holds for this life of the worker; draws its epoch."""
    return WorkerFacts(
        worker_id=config.worker_id,
        epoch=new_epoch(),
        model=files.name,
        fingerprint=device.fingerprint,
        kv_layout=device.kv.layout.identity(),
        block_size=config.engine.block_size,
        max_model_len=_longest(config.engine, files, device),
        vocab_size=device.vocab_size,
        device=device.name,
        picked=device.picked,
        other_ranks=tuple(pb.RankProcess(pid=rank.pid, host=rank.host) for rank in other_ranks),
    )


def _longest(config: EngineConfig, files: ModelFiles, device: Device) -> int:
    """Context that is promised to clients: one longer than the whole KV memory could never run."""
    return min(config.max_model_len or files.config.max_model_len, device.kv.num_blocks * config.block_size)


def steps_known(config: WorkerConfig, facts: WorkerFacts, device: Device) -> OnlineStepTimeFit:
    """What is known of the device's steps before it serves; a CPU engine takes a moment to find out."""
    return known_steps(
        device,
        config.role,
        max_batched_tokens=config.engine.max_batched_tokens,
        max_model_len=facts.max_model_len,
        block_size=config.engine.block_size,
    )


def assemble(
    config: WorkerConfig,
    files: ModelFiles,
    device: Device,
    facts: WorkerFacts,
    credentials: MemberCredentials,
    ends: KVEnds,
    fit: OnlineStepTimeFit,
) -> tuple[WorkerShell, PrefillService, DecodeService]:
    """The parts that need each other."""
    engine_config, clock, segment = config.engine, MonotonicClock(), device.kv.segment
    generations = None if segment is None else segment.generations
    pool = BlockPool(device.kv.num_blocks, engine_config.block_size, generations)
    scheduler = Scheduler(
        block_pool=pool,
        prefix_cache=PrefixCache(pool, enabled=engine_config.prefix_cache),
        policy=policy_for(config.role, engine_config.batching),
        clock=clock,
        max_batched_tokens=engine_config.max_batched_tokens,
        max_running=engine_config.max_running,
        max_waiting=engine_config.max_waiting,
        max_model_len=facts.max_model_len,
        eos_token_ids=files.config.eos_token_ids,
        max_outstanding_plans=device.plans_ahead,
        looks_ahead=device.looks_ahead,
        decode_parts=1 if device.looks_ahead else device.plans_ahead,
        decode_part_rows=PART_ROWS,
    )
    if segment is not None:
        segment.publish(facts.epoch)
    shell = WorkerShell(config, facts, clock, credentials)
    engine = EngineThread(
        scheduler, device, on_events=shell.events_from_engine, on_failure=shell.failure_from_engine, fit=fit
    )
    prefill = PrefillService(shell, engine, device.kv, pool.generation, ends.offer, ends.ranks)
    decode = DecodeService(shell, engine, device.kv, ends.transport)
    shell.assemble(engine, (prefill, decode))
    return shell, prefill, decode

"""What the leader of a worker and its followers say to each other, over one socket for each follower.

Leader: SETUP (once), CONNECT (all are there: meet), PLAN (compute a step), PING. Follower: HERE (it runs), PROGRESS,
READY (it has its weights), FAILED (what went wrong; it ends), PONG. While they meet, a follower says PUT (its address
under a key) and ASK (for another's), and is told VALUE. KV, both ways: of what travels between it and ranks of other
workers (`kvtransfer.collective.commands`). BLOCKS, both ways: blocks of a rank whose memory
cannot be lent (`link_kv`). A message is `u32 length | u8 kind | payload`; payloads are msgpack, plans those of
`engine.plan_wire`. The end of the socket is the end of the other. Pure.
"""

from __future__ import annotations

import enum
import socket
import struct
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import msgpack

from ...models.config import Architecture, ModelConfig, RopeScaling
from ...models.reference import ModelFiles
from ...types import SamplingParams
from ..narrow_kv import NarrowKV
from ..plan import SampleSpec, StepPlan
from ..plan_wire import encode_plan

MAX_MESSAGE_BYTES = 2**28
_PREFIX = struct.Struct("<IB")
_SAMPLES = SampleSpec(params=SamplingParams(), output_index=0, prompt_token_ids=(), output_token_ids=())
"""All that a follower must know of a row that samples."""


class RankLost(RuntimeError):
    """Another rank of this worker has ended, does not answer, or answers nonsense: the worker cannot go on."""


class Kind(enum.IntEnum):
    """Second field of every message."""

    SETUP = 1
    HERE = 2
    CONNECT = 3
    PROGRESS = 4
    READY = 5
    PLAN = 6
    PING = 7
    PONG = 8
    FAILED = 9
    PUT = 20
    ASK = 21
    VALUE = 22
    KV = 30
    BLOCKS = 31


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuSetup:
    """What a follower that computes on a GPU must know beside: arguments of `devices.cuda.CudaDevice`."""

    device: str
    """As PyTorch on its node names it."""
    quantization: str | None = None
    kv_cache_bytes: int = 0
    """Of all ranks; 0: each measures, and the smallest counts."""
    max_batched_tokens: int = 512
    max_running: int = 64
    max_model_len: int | None = None
    gpu_memory_utilization: float = 0.9
    enforce_eager: bool = False
    narrow_kv: NarrowKV | None = None
    """The leader's, so that no rank reads other scales."""

    def arguments(self) -> dict[str, Any]:
        """By name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """What a follower is to be."""

    files: ModelFiles
    tensor_parallel: int
    pipeline_stages: int
    rank: int
    dtype: str
    """Of weights, and of KV that is not narrow."""
    kernels: str
    block_size: int
    num_blocks: int
    nonce: bytes
    """Of its KV segment; empty: it makes memory of its own."""
    threads: int
    cpus: tuple[int, ...]
    stage_host: str
    """Its address for the ranks of its stage, and for those of its place in other stages."""
    pipeline_host: str
    fingerprint: str
    """Of the model whose files it finds itself; empty: the files are where `files` says."""
    timeout_s: float
    """For the meeting, and for each operation between ranks."""
    gpu: GpuSetup | None = None
    """None: it computes on processors."""


def send(link: socket.socket, kind: Kind, payload: bytes = b"") -> None:
    """Sends one message. OSError where the other has ended or takes nothing for the socket's timeout."""
    link.sendall(_PREFIX.pack(len(payload), kind) + payload)


def receive(link: socket.socket) -> tuple[Kind, bytes]:
    """The next message. EOFError where the other has ended, ValueError for what is none."""
    length, kind = _PREFIX.unpack(_exactly(link, _PREFIX.size))
    if length > MAX_MESSAGE_BYTES:
        raise ValueError(f"a message of {length} bytes is more than {MAX_MESSAGE_BYTES}")
    return Kind(kind), _exactly(link, length)


def encode_put(key: str, value: bytes) -> bytes:
    """The payload of PUT."""
    packed: bytes = msgpack.packb([key, value])
    return packed


def decode_put(data: bytes) -> tuple[str, bytes]:
    """The inverse of `encode_put`. ValueError for anything else."""
    try:
        key, value = msgpack.unpackb(data)
    except (ValueError, TypeError, msgpack.UnpackException) as error:
        raise ValueError(f"put: {error!r}") from error
    if not isinstance(key, str) or not isinstance(value, bytes):
        raise ValueError("put: a text and bytes were due")
    return key, value


def _exactly(link: socket.socket, size: int) -> bytes:
    data = bytearray(size)
    fill(link, memoryview(data))
    return bytes(data)


def fill(link: socket.socket, view: memoryview) -> None:
    """Receives as many bytes as fit. EOFError where the other has ended."""
    while view:
        try:
            count = link.recv_into(view)
        except ConnectionError as error:
            raise EOFError("the other end of the link is gone") from error
        if count == 0:
            raise EOFError("the other end of the link is closed")
        view = view[count:]


def encode_step(plan: StepPlan, block_size: int) -> bytes:
    """A plan as followers need it: no sampling parameters, which are the leader's, and no more of a block table than
    the row's context.
    """
    rows = [
        row._replace(
            block_ids=row.block_ids[: -(-(row.start + len(row.token_ids)) // block_size)],
            sample=None if row.sample is None else _SAMPLES,
        )
        for row in plan.rows
    ]
    return encode_plan(StepPlan(plan.plan_id, tuple(rows)))


def encode_setup(setup: Setup) -> bytes:
    """The inverse of `decode_setup`."""
    plain = {field.name: getattr(setup, field.name) for field in fields(setup) if field.name != "files"}
    files = {
        "name": setup.files.name,
        "kind": setup.files.kind,
        "path": None if setup.files.path is None else str(setup.files.path),
        "config": asdict(setup.files.config),
    }
    gpu = None if setup.gpu is None else asdict(setup.gpu)
    packed: bytes = msgpack.packb({**plain, "files": files, "gpu": gpu})
    return packed


def decode_setup(data: bytes) -> Setup:
    """ValueError for anything but an encoded setup."""
    try:
        values: dict[str, Any] = msgpack.unpackb(data)
        files, gpu = values.pop("files"), values.pop("gpu")
        path = files["path"]
        return Setup(
            **{**values, "cpus": tuple(values["cpus"]), "gpu": None if gpu is None else _gpu(gpu)},
            files=ModelFiles(
                name=files["name"],
                kind=files["kind"],
                path=None if path is None else Path(path),
                config=_config(files["config"]),
            ),
        )
    except (ValueError, TypeError, KeyError, msgpack.UnpackException) as error:
        raise ValueError(f"setup: {error!r}") from error


def _gpu(values: dict[str, Any]) -> GpuSetup:
    narrow = values["narrow_kv"]
    return GpuSetup(**{**values, "narrow_kv": None if narrow is None else NarrowKV(**narrow)})


def _config(values: dict[str, Any]) -> ModelConfig:
    scaling = values["rope_scaling"]
    return ModelConfig(
        **{
            **values,
            "architecture": Architecture(values["architecture"]),
            "rope_scaling": None if scaling is None else RopeScaling(**scaling),
            "eos_token_ids": tuple(values["eos_token_ids"]),
        }
    )

"""What one block of KV looks like in bytes, whole (`KVLayout`) and on each rank of a worker (`KVSplit`). Layouts are
exchanged when workers first meet; a pair that differs in more than the block size is refused then.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, replace
from typing import Any

import msgpack

MAX_EXTENT = 2**16
MAX_BLOCK_SIZE = 1024
MAX_BLOCK_BYTES = 2**40
MAX_SPLIT = 1024
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1, "float8_e4m3": 1, "uint64": 8}


@dataclass(frozen=True, slots=True, kw_only=True)
class KVGroup:
    """Layers that share one shape of KV. One block of a group is `[layer, 2, kv_head, slot, head_dim]` of `dtype`."""

    name: str
    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: str

    def slot_bytes(self) -> int:
        """Bytes of one token in this group: keys and values, all layers."""
        return self.num_layers * 2 * self.num_kv_heads * self.head_dim * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """A contiguous stretch of one block that belongs to one group. Offset and length in bytes, 64-bit."""

    group: str
    offset_bytes: int
    length_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class KVLayout:
    """Block-major layout: a block is one contiguous stretch, the groups one after another inside it."""

    block_size: int
    """Token slots in a block."""
    groups: tuple[KVGroup, ...]
    block_bytes: int = field(init=False, repr=False, compare=False)
    """Of one block over all groups."""

    def __post_init__(self) -> None:
        if not 1 <= self.block_size <= MAX_BLOCK_SIZE:
            raise ValueError(f"block_size: {self.block_size} is not in 1…{MAX_BLOCK_SIZE}")
        if not self.groups:
            raise ValueError("groups: a KV layout needs at least one group of layers")
        for group in self.groups:
            if group.dtype not in DTYPE_BYTES:
                raise ValueError(f"dtype: {group.dtype!r} of group {group.name!r} is not one of {sorted(DTYPE_BYTES)}")
            for name in ("num_layers", "num_kv_heads", "head_dim"):
                if not 1 <= getattr(group, name) <= MAX_EXTENT:
                    raise ValueError(f"{name}: {getattr(group, name)} of group {group.name!r} is not in 1…{MAX_EXTENT}")
        # Once: every block that is written or read asks for it.
        object.__setattr__(self, "block_bytes", sum(self.block_size * group.slot_bytes() for group in self.groups))
        if self.block_bytes > MAX_BLOCK_BYTES:
            raise ValueError(f"groups: a block of {self.block_bytes} bytes is more than {MAX_BLOCK_BYTES}")

    def segments(self) -> tuple[Segment, ...]:
        """The groups' stretches inside one block, in order."""
        segments, offset = [], 0
        for group in self.groups:
            length = self.block_size * group.slot_bytes()
            segments.append(Segment(group=group.name, offset_bytes=offset, length_bytes=length))
            offset += length
        return tuple(segments)

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold `num_tokens` slots."""
        return -(-num_tokens // self.block_size)

    def to_bytes(self) -> bytes:
        """Canonical msgpack form; equal layouts give equal bytes."""
        groups = [[g.name, g.num_layers, g.num_kv_heads, g.head_dim, g.dtype] for g in self.groups]
        packed: bytes = msgpack.packb([1, self.block_size, groups])
        return packed

    @classmethod
    def from_bytes(cls, data: bytes) -> KVLayout:
        """Inverse of `to_bytes`. ValueError names what is wrong; no input makes it do anything else."""
        try:
            fields: Any = msgpack.unpackb(data, max_array_len=4096, max_str_len=4096)
            version, block_size, groups = fields
            if version != 1:
                raise ValueError(f"version {version!r} is not 1")
            parsed = tuple(
                KVGroup(name=str(n), num_layers=int(ls), num_kv_heads=int(h), head_dim=int(d), dtype=str(t))
                for n, ls, h, d, t in groups
            )
            return cls(block_size=int(block_size), groups=parsed)
        except (ValueError, TypeError, OverflowError, msgpack.UnpackException) as error:
            raise ValueError(f"kv_layout: not a KV layout: {error}") from error

    def identity(self) -> bytes:
        """Of what two workers must have in common to hand KV off: everything but the block size (`kvtransfer.reblock`)
        and the ranks (`kvtransfer.reshape`).
        """
        return replace(self, block_size=1).to_bytes()

    def digest(self) -> str:
        """Short hex name of this layout, for logs and comparison."""
        return hashlib.sha256(self.to_bytes()).hexdigest()[:16]


def same_kv(mine: bytes, theirs: bytes) -> bool:
    """Whether two layouts, as `KVLayout.to_bytes` has them, differ in nothing but the block size."""
    if mine == theirs:
        return True
    try:
        return KVLayout.from_bytes(mine).identity() == KVLayout.from_bytes(theirs).identity()
    except ValueError:
        return False


def stage_layers(num_layers: int, pipeline_stages: int, stage: int) -> range:
    """The layers of a pipeline stage: contiguous, as even as they go, the first stages one more."""
    each, more = divmod(num_layers, pipeline_stages)
    first = stage * each + min(stage, more)
    return range(first, first + each + (stage < more))


def rank_heads(num_kv_heads: int, tensor_parallel: int, place: int) -> range:
    """The KV heads that one of `tensor_parallel` ranks holds: those that its query heads read.

    Query heads are shared out evenly and in order. With as many ranks as KV heads, or fewer that divide them, each has
    heads of its own; with more ranks, several hold the same head.
    """
    first = place * num_kv_heads // tensor_parallel
    return range(first, -(-(place + 1) * num_kv_heads // tensor_parallel))


@dataclass(frozen=True, slots=True, kw_only=True)
class KVSplit:
    """How the KV of one worker lies over its ranks. Rank = stage * `tensor_parallel` + place within the stage."""

    layout: KVLayout
    """Of the whole model, as one rank alone would have it."""
    tensor_parallel: int = 1
    pipeline_stages: int = 1

    def __post_init__(self) -> None:
        for name in ("tensor_parallel", "pipeline_stages"):
            if not 1 <= getattr(self, name) <= MAX_SPLIT:
                raise ValueError(f"{name}: {getattr(self, name)} is not in 1…{MAX_SPLIT}")
        most = max(group.num_layers for group in self.layout.groups)
        if self.pipeline_stages > most:
            raise ValueError(f"pipeline_stages: {self.pipeline_stages} is not in 1…{most}, the number of layers")

    @property
    def num_ranks(self) -> int:
        """Of the worker."""
        return self.tensor_parallel * self.pipeline_stages

    def layers(self, group: KVGroup, rank: int) -> range:
        """The layers of `group` that a rank holds; empty where its stage has none."""
        return stage_layers(group.num_layers, self.pipeline_stages, rank // self.tensor_parallel)

    def heads(self, group: KVGroup, rank: int) -> range:
        """The KV heads of `group` that a rank holds."""
        return rank_heads(group.num_kv_heads, self.tensor_parallel, rank % self.tensor_parallel)

    def rank_layout(self, rank: int) -> KVLayout:
        """What a block looks like on one rank: its own layers and heads, groups without any left out."""
        if not 0 <= rank < self.num_ranks:
            raise ValueError(f"rank: {rank} is not in 0…{self.num_ranks - 1}")
        groups = tuple(
            replace(group, num_layers=len(self.layers(group, rank)), num_kv_heads=len(self.heads(group, rank)))
            for group in self.layout.groups
            if len(self.layers(group, rank))
        )
        return replace(self.layout, groups=groups)

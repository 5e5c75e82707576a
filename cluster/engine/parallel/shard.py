"""What one rank of a worker holds of a model. Pure.

After Megatron-LM (Shoeybi et al. 2019, §3): queries, keys, values, gate and up are split by output (a rank has whole
heads), attention's and the MLP's output projections by input, so that a layer needs two sums over its ranks; the
embedding and the output head are split by vocabulary. Where there are more ranks than KV heads, each has one, and
several have the same. Biases after a sum are the first rank's alone. Stages hold contiguous layers; the first the
embedding, the last the output head (with a shared table, both have it).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

from ....kvtransfer.layout import rank_heads, stage_layers
from ...config_schema import ConfigError
from ...models.config import ModelConfig

_BY_QUERY_HEAD, _BY_KV_HEAD, _BY_MLP = ("q",), ("k", "v"), ("gate", "up")
_SUMMED = ("attention_out", "down")
_FIRST_STAGE, _LAST_STAGE = ("positions", "project_in"), ("final_norm", "project_out", "head")


@dataclass(frozen=True, slots=True)
class Part:
    """Rows and columns that a rank has of a tensor; None: all."""

    rows: range | None = None
    columns: range | None = None


WHOLE = Part()


def share(total: int, ranks: int, place: int) -> range:
    """One of `ranks` contiguous shares of 0 … total - 1, as even as they go."""
    return range(total * place // ranks, total * (place + 1) // ranks)


def own_processors(cpus: tuple[int, ...], rank: int, num_ranks: int) -> tuple[int, ...]:
    """The processors of one rank: its share where each gets one, else all."""
    return cpus[rank::num_ranks] if len(cpus) >= num_ranks else cpus


def allowed_tensor_parallel(config: ModelConfig) -> list[int]:
    """Ranks that a layer can be shared among: all have as many query heads, and those read KV heads of their own, or
    one that is the same for all of a rank's.
    """
    heads, kv_heads = config.num_heads, config.num_kv_heads
    counts = range(1, heads + 1)
    return [n for n in counts if heads % n == 0 and (kv_heads % n == 0 or n % kv_heads == 0)]


def check_split(config: ModelConfig, tensor_parallel: int, pipeline_stages: int) -> None:
    """ConfigError naming the field, the number and what the model allows."""
    allowed = allowed_tensor_parallel(config)
    if tensor_parallel not in allowed:
        counts = ", ".join(map(str, allowed))
        model = f"a model of {config.num_heads} heads over {config.num_kv_heads} KV heads"
        raise ConfigError("tensor_parallel", tensor_parallel, f"one of {counts} for {model}")
    if not 1 <= pipeline_stages <= config.num_layers:
        raise ConfigError("pipeline_stages", pipeline_stages, f"1 to the model's {config.num_layers} layers")


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One rank's part of a model. Rank = stage * `tensor_parallel` + place within the stage. ConfigError for a split
    that the model does not allow.
    """

    config: ModelConfig
    """Of the whole model."""
    tensor_parallel: int = 1
    pipeline_stages: int = 1
    rank: int = 0

    def __post_init__(self) -> None:
        check_split(self.config, self.tensor_parallel, self.pipeline_stages)
        if not 0 <= self.rank < self.num_ranks:
            raise ValueError(f"rank: {self.rank} is not in 0…{self.num_ranks - 1}")

    @property
    def num_ranks(self) -> int:
        """Of the worker."""
        return self.tensor_parallel * self.pipeline_stages

    @property
    def stage(self) -> int:
        """Counted from the one that embeds."""
        return self.rank // self.tensor_parallel

    @property
    def place(self) -> int:
        """Within the stage."""
        return self.rank % self.tensor_parallel

    @property
    def is_first(self) -> bool:
        """Of the stage that embeds."""
        return self.stage == 0

    @property
    def is_last(self) -> bool:
        """Of the stage that makes logits."""
        return self.stage == self.pipeline_stages - 1

    @cached_property
    def layers(self) -> range:
        """Of the model, that this rank computes."""
        return stage_layers(self.config.num_layers, self.pipeline_stages, self.stage)

    @cached_property
    def vocabulary(self) -> range:
        """Token ids whose rows of the embedding and the output head this rank has."""
        return share(self.config.vocab_size, self.tensor_parallel, self.place)

    @cached_property
    def local(self) -> ModelConfig:
        """The model as this rank's layers see it: its own layers, heads and MLP columns."""
        c = self.config
        return replace(
            c,
            num_layers=len(self.layers),
            num_heads=c.num_heads // self.tensor_parallel,
            num_kv_heads=len(rank_heads(c.num_kv_heads, self.tensor_parallel, self.place)),
            intermediate_size=len(share(c.intermediate_size, self.tensor_parallel, self.place)),
        )

    def part(self, name: str) -> Part | None:
        """What this rank has of a tensor, by canonical name (`weight_source`); None: nothing."""
        *prefix, base, kind = name.split(".")
        if prefix:
            return self._layer_part(base, kind) if int(prefix[1]) in self.layers else None
        if base == "embed":
            shared = self.is_last and self.config.tie_word_embeddings
            return Part(rows=self.vocabulary) if self.is_first or shared else None
        if (base in _FIRST_STAGE and not self.is_first) or (base in _LAST_STAGE and not self.is_last):
            return None
        return Part(rows=self.vocabulary) if base == "head" else WHOLE

    def _layer_part(self, base: str, kind: str) -> Part | None:
        c, ranks, place = self.config, self.tensor_parallel, self.place
        queries = _elements(share(c.num_heads, ranks, place), c.head_dim)
        if base in _BY_QUERY_HEAD:
            return Part(rows=queries)
        if base in _BY_KV_HEAD:
            return Part(rows=_elements(rank_heads(c.num_kv_heads, ranks, place), c.head_dim))
        if base in _BY_MLP:
            return Part(rows=share(c.intermediate_size, ranks, place))
        if base in _SUMMED:
            if kind == "bias":
                return WHOLE if place == 0 else None
            return Part(columns=queries if base == "attention_out" else share(c.intermediate_size, ranks, place))
        return WHOLE


def _elements(heads: range, head_dim: int) -> range:
    return range(heads.start * head_dim, heads.stop * head_dim)

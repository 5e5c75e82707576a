"""What each rank holds of a model: everything is held, by whom it should be, and nothing twice that need not be."""

from __future__ import annotations

from collections import Counter
from itertools import product

import numpy as np
import pytest
from rank_steps import LLAMA, MODELS, OPT
from tandem.cluster.config import ConfigError
from tandem.cluster.engine.parallel.shard import Part, Shard, allowed_tensor_parallel, own_processors
from tandem.cluster.engine.weight_source import expected_shapes
from tandem.cluster.models.config import ModelConfig
from tandem.cluster.models.registry import CONFIGS

REPLICATED = ("norm", "positions", "project_in", "project_out")


def shards(config: ModelConfig, tensor: int, stages: int) -> list[Shard]:
    return [
        Shard(config=config, tensor_parallel=tensor, pipeline_stages=stages, rank=rank)
        for rank in range(tensor * stages)
    ]


def times_held(config: ModelConfig, name: str, shape: tuple[int, ...], ranks: list[Shard]) -> np.ndarray:
    """How many ranks have each element of a tensor."""
    count = np.zeros(shape, np.int64)
    for part in (rank.part(name) for rank in ranks):
        if part is not None:
            rows = slice(None) if part.rows is None else slice(part.rows.start, part.rows.stop)
            columns = () if part.columns is None else (slice(part.columns.start, part.columns.stop),)
            count[(rows, *columns)] += 1
    return count


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(("tensor", "stages"), [(1, 1), (2, 1), (1, 2), (2, 2), (4, 2)])
def test_every_element_is_held_as_often_as_it_must_be(model: str, tensor: int, stages: int) -> None:
    config = MODELS[model]
    ranks = shards(config, tensor, stages)
    for name, shape in expected_shapes(config).items():
        base = name.split(".")[-2]
        expected = 1
        if base.endswith("norm") or base in REPLICATED:
            expected = tensor
        elif base in ("k", "v"):
            expected = max(1, tensor // config.num_kv_heads)
        elif base == "embed" and config.tie_word_embeddings and stages > 1:
            expected = 2  # the last stage has it as its output head
        assert set(np.unique(times_held(config, name, shape, ranks))) == {expected}, name


def test_a_rank_has_whole_heads_and_what_they_read() -> None:
    rank = Shard(config=LLAMA, tensor_parallel=4, rank=3)  # 4 query heads over 2 KV heads, of 16
    assert rank.part("layers.0.q.weight") == Part(rows=range(48, 64))
    assert rank.part("layers.0.k.weight") == rank.part("layers.0.v.weight") == Part(rows=range(16, 32))
    assert rank.part("layers.0.attention_out.weight") == Part(columns=range(48, 64))
    assert rank.part("layers.0.down.weight") == Part(columns=range(120, 160))
    assert (rank.local.num_heads, rank.local.num_kv_heads, rank.local.intermediate_size) == (1, 1, 40)
    assert rank.part("embed.weight") == Part(rows=range(384, 512))


def test_biases_behind_a_sum_are_added_once() -> None:
    added = Counter(rank.place for rank in shards(OPT, 4, 1) if rank.part("layers.1.down.bias") is not None)
    assert added == {0: 1}


def test_stages_hold_their_layers_and_ends() -> None:
    first, last = shards(CONFIGS["opt-125m"], 1, 2)
    assert (list(first.layers), list(last.layers)) == (list(range(6)), list(range(6, 12)))
    assert first.part("layers.6.q.weight") is None
    assert last.part("positions.weight") is None
    assert first.part("final_norm.weight") is None
    assert first.part("embed.weight") == last.part("embed.weight") is not None  # the table is the output head


@pytest.mark.parametrize(
    ("model", "allowed"),
    [("smollm2-135m", [1, 3, 9]), ("tiny-llama", [1, 2, 4]), ("llama-3.1-8b", [1, 2, 4, 8, 16, 32])],
)
def test_what_the_heads_allow(model: str, allowed: list[int]) -> None:
    assert allowed_tensor_parallel(CONFIGS[model]) == allowed


def test_what_the_model_does_not_allow_is_named() -> None:
    with pytest.raises(ConfigError, match=r"tensor_parallel: 2 .*one of 1, 3, 9 for .* 9 heads over 3 KV heads"):
        Shard(config=CONFIGS["smollm2-135m"], tensor_parallel=2)
    with pytest.raises(ConfigError, match=r"pipeline_stages: 3 .*1 to the model's 2 layers"):
        Shard(config=LLAMA, pipeline_stages=3)
    with pytest.raises(ValueError, match=r"rank: 2 is not in 0…1"):
        Shard(config=LLAMA, pipeline_stages=2, rank=2)


def test_processors_are_shared_out_where_there_are_enough() -> None:
    for ranks, cpus in product((2, 3), ((0, 1, 2, 3, 4),)):
        owned = [own_processors(cpus, rank, ranks) for rank in range(ranks)]
        assert sorted(cpu for own in owned for cpu in own) == list(cpus)
    assert own_processors((7,), 1, 2) == (7,)

"""Each rank reads its own part of the files, and nothing else."""

from __future__ import annotations

from pathlib import Path

import gguf as ggml
import numpy as np
import pytest
import torch
from llama_names import hf_name
from rank_steps import MODELS
from safetensors.torch import save_file
from tandem.cluster.engine.gguf_weights import GgufWeights
from tandem.cluster.engine.hf_weights import DummyWeights, HfWeights
from tandem.cluster.engine.parallel.shard import Shard
from tandem.cluster.engine.parallel.weights import ShardedWeights
from tandem.cluster.engine.weight_source import WeightSource, expected_shapes
from tandem.cluster.models.config import ModelConfig

CONFIG = MODELS["llama-untied"]


class Counting(DummyWeights):
    """Counts the elements that are read."""

    elements = 0

    def read(self, name: str, rows: slice | None = None) -> torch.Tensor:
        tensor = super().read(name, rows)
        self.elements += tensor.numel()
        return tensor

    def read_columns(self, name: str, columns: slice) -> torch.Tensor:
        tensor = super().read(name)[:, columns]
        self.elements += tensor.numel()
        return tensor


def hf_weights(folder: Path) -> WeightSource:
    source = DummyWeights(CONFIG)
    tensors = {hf_name(name): source.read(name).clone() for name in expected_shapes(CONFIG)}
    save_file(tensors, folder / "model.safetensors")
    return HfWeights(folder, CONFIG)


def gguf_weights(path: Path, quantized: bool) -> WeightSource:
    """Of one layer: the MLP's output (whose columns are split) and the queries (whose rows are, and permuted)."""
    writer = ggml.GGUFWriter(path, "llama")
    source = DummyWeights(CONFIG)
    for base, stored in (("down", "ffn_down"), ("q", "attn_q")):
        values = source.read(f"layers.0.{base}.weight").numpy()
        if quantized:
            kind = ggml.GGMLQuantizationType.Q8_0
            writer.add_tensor(f"blk.0.{stored}.weight", ggml.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(f"blk.0.{stored}.weight", values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return GgufWeights(path, CONFIG)


def assert_parts_of(source: WeightSource, config: ModelConfig, names: list[str], tensor: int, stages: int) -> None:
    for rank in range(tensor * stages):
        shard = Shard(config=config, tensor_parallel=tensor, pipeline_stages=stages, rank=rank)
        sharded = ShardedWeights(source, shard)
        for name in names:
            part = shard.part(name)
            assert (name in sharded.shapes()) == (part is not None)
            if part is None:
                continue
            whole = source.read(name)
            rows = slice(None) if part.rows is None else slice(part.rows.start, part.rows.stop)
            expected = whole[rows]
            if part.columns is not None:
                expected = expected[:, part.columns.start : part.columns.stop]
            assert torch.equal(sharded.read(name), expected), name
            assert sharded.shapes()[name] == tuple(expected.shape)
            if expected.ndim > 1:
                assert torch.equal(sharded.read(name, slice(3, 7)), expected[3:7])


@pytest.mark.parametrize(("tensor", "stages"), [(2, 1), (4, 2)])
def test_safetensors(tensor: int, stages: int, tmp_path: Path) -> None:
    assert_parts_of(hf_weights(tmp_path), CONFIG, list(expected_shapes(CONFIG)), tensor, stages)


@pytest.mark.parametrize("quantized", [False, True])
def test_gguf(quantized: bool, tmp_path: Path) -> None:
    """Four ranks: 40 columns each, which are not whole blocks of 32."""
    source = gguf_weights(tmp_path / "m.gguf", quantized)
    whole = source.read("layers.0.down.weight")
    for place in range(4):
        shard = Shard(config=CONFIG, tensor_parallel=4, rank=place)
        sharded = ShardedWeights(source, shard)
        assert torch.equal(sharded.read("layers.0.down.weight"), whole[:, place * 40 : place * 40 + 40])
        queries = source.read("layers.0.q.weight")[place * 16 : place * 16 + 16]
        assert torch.equal(sharded.read("layers.0.q.weight"), queries)


def test_dummies_are_the_same_however_they_are_read() -> None:
    assert_parts_of(DummyWeights(CONFIG), CONFIG, list(expected_shapes(CONFIG)), 2, 2)


def test_a_rank_reads_its_share() -> None:
    total = sum(int(np.prod(shape)) for shape in expected_shapes(CONFIG).values())
    read = []
    for rank in range(4):
        source = Counting(CONFIG)
        sharded = ShardedWeights(source, Shard(config=CONFIG, tensor_parallel=2, pipeline_stages=2, rank=rank))
        for name in sharded.shapes():
            sharded.read(name)
        read.append(source.elements)
    assert total <= sum(read) <= 1.02 * total  # norms are everybody's
    assert max(read) <= 0.3 * total

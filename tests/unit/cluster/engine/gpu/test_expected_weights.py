"""What a rank's weights are said to take of its GPU before they are read, against what they take."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from tandem.cluster.engine.gpu.weights import DeviceDummyWeights, build_on, expected_bytes
from tandem.cluster.engine.model import Model
from tandem.cluster.engine.parallel.shard import Shard
from tandem.cluster.models.config import ModelConfig
from tandem.cluster.models.registry import CONFIGS

LLAMA = dataclasses.replace(
    CONFIGS["tiny-llama"], num_layers=3, vocab_size=301, intermediate_size=192, tie_word_embeddings=False
)
TIED = dataclasses.replace(LLAMA, tie_word_embeddings=True)
OPT = CONFIGS["tiny-opt"]
PARTS = ("_weight", "_bias", "_scales")
NORMS = ("attention_norm", "mlp_norm", "q_norm", "k_norm")


def bytes_of(model: Model) -> int:
    """Of all tensors, a shared one once."""
    tables = [table.weight for table in (model.embed, model.positions) if table is not None]
    products = [getattr(linear, name, None) for linear in model.linears().values() for name in PARTS]
    layers = [model.final_norm, *(getattr(layer, name) for layer in model.layers for name in NORMS)]
    norms = [tensor for norm in layers if norm is not None for tensor in (norm.weight, norm.bias)]
    tensors = [tensor for tensor in (*tables, *products, *norms) if tensor is not None]
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in tensors}.values())


@pytest.mark.parametrize(
    ("config", "dtype", "quantization"),
    [
        (LLAMA, "float32", None),
        (LLAMA, "bfloat16", "w8a8"),
        (LLAMA, "bfloat16", "w4a16"),
        (TIED, "bfloat16", None),
        (TIED, "bfloat16", "w8a8"),
        (OPT, "bfloat16", None),
        (OPT, "float32", "w8a8"),
    ],
)
@pytest.mark.parametrize(("tensor", "stages"), [(1, 1), (2, 1), (1, 2)])
def test_it_is_what_they_take(
    config: ModelConfig, dtype: str, quantization: str | None, tensor: int, stages: int
) -> None:
    cpu = torch.device("cpu")
    for rank in range(tensor * stages):
        shard = Shard(config=config, tensor_parallel=tensor, pipeline_stages=stages, rank=rank)
        source = DeviceDummyWeights(config, cpu, torch.float32)
        model = build_on(cpu, config, source, dtype, quantization, shard=shard)
        assert expected_bytes(shard, dtype, quantization) == bytes_of(model)

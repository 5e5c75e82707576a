"""Products that the ranks of a stage compute together, each with its own part of the weights."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from tandem.cluster.engine.gpu.linears import DeviceLinear
from tandem.cluster.engine.gpu.shared_linears import SummedDeviceLinear, VocabularyDeviceHead
from tandem.cluster.engine.gpu.weights import build_on
from tandem.cluster.engine.hf_weights import DummyWeights
from tandem.cluster.engine.model import Model
from tandem.cluster.engine.parallel.ranks import Alone
from tandem.cluster.engine.parallel.shard import Shard
from tandem.cluster.models.errors import ModelError
from tandem.cluster.models.registry import CONFIGS

CONFIG = dataclasses.replace(CONFIGS["tiny-llama"], num_layers=1, vocab_size=31)
RANKS = 2


class Others(Alone):
    """Ranks whose parts of every sum and gather were computed before."""

    tensor_parallel = RANKS

    def __init__(self, *parts: torch.Tensor) -> None:
        self._parts = parts

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        return x + sum(self._parts)

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x, *self._parts], dim=-1)


def parts_of(where: str, quantization: str | None) -> list[Model]:
    device, source = torch.device(where), DummyWeights(CONFIG)
    shards = [Shard(config=CONFIG, tensor_parallel=RANKS, rank=rank) for rank in range(RANKS)]
    return [build_on(device, CONFIG, source, "bfloat16", quantization, shard=shard) for shard in shards]


@pytest.mark.parametrize(("quantization", "tolerance"), [(None, 0.01), ("w8a8", 0.02)])
def test_a_sum_of_parts_is_the_whole_product(where: str, quantization: str | None, tolerance: float) -> None:
    """int8 products have scales of their own on each rank; what is summed is not scaled any more."""
    whole = build_on(torch.device(where), CONFIG, DummyWeights(CONFIG), "bfloat16").layers[0].down
    first, second = (part.layers[0].down for part in parts_of(where, quantization))
    assert isinstance(first, DeviceLinear)
    assert isinstance(second, DeviceLinear)
    x = torch.randn(5, whole.in_features, generator=torch.Generator().manual_seed(0)).to(where, torch.bfloat16)
    mine, theirs = x.split([first.in_features, second.in_features], dim=1)
    expected = whole(x).float()
    summed = SummedDeviceLinear(first, Others(second(theirs.contiguous())))
    assert summed.takes_int8 is (quantization is not None)
    found = summed.of(mine.contiguous()).float()
    assert ((found - expected).norm() / expected.norm()).item() < tolerance


def test_logits_of_all_ids_are_gathered(where: str) -> None:
    """Of 31 ids one rank has 15, the other 16."""
    whole = build_on(torch.device(where), CONFIG, DummyWeights(CONFIG), "bfloat16").head
    first, second = (part.head for part in parts_of(where, None))
    assert isinstance(whole, DeviceLinear)
    assert isinstance(first, DeviceLinear)
    assert isinstance(second, DeviceLinear)
    x = torch.randn(3, whole.in_features, generator=torch.Generator().manual_seed(0)).to(where, torch.bfloat16)
    head = VocabularyDeviceHead(first, 31, Others(second.logits(x)))
    torch.testing.assert_close(head.logits(x), whole.logits(x))


def test_a_group_of_4_bit_weights_does_not_span_ranks(where: str) -> None:
    config = dataclasses.replace(CONFIG, intermediate_size=176)
    shard = Shard(config=config, tensor_parallel=RANKS, rank=0)
    with pytest.raises(ModelError, match="quantization: 'w4a16' is not allowed for a model whose products have 88 inp"):
        build_on(torch.device(where), config, DummyWeights(config), "bfloat16", "w4a16", shard=shard)

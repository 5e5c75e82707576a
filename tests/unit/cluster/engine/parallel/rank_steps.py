"""Steps and models that tests of several ranks have in common."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from tandem.cluster.engine.devices.kv_memory import HostKVStore, kv_layout
from tandem.cluster.engine.parallel.kv import RankedKVStore
from tandem.cluster.engine.plan import SampleSpec, StepPlan, StepRow
from tandem.cluster.engine.runner import TorchForward
from tandem.cluster.models.config import ModelConfig
from tandem.cluster.models.reference import ModelFiles
from tandem.cluster.models.registry import CONFIGS
from tandem.cluster.types import SamplingParams
from tandem.kvtransfer.layout import KVSplit

BLOCK_SIZE = 16
NUM_BLOCKS = 24
TOLERANCE = 1e-5
"""Of the largest logit, fp32: ranks sum a layer's products in another order than one rank does."""
LLAMA = CONFIGS["tiny-llama"]
OPT = CONFIGS["tiny-opt"]
MODELS = {
    "llama": LLAMA,
    "llama-untied": replace(LLAMA, tie_word_embeddings=False, num_layers=5, vocab_size=509),
    "llama-biases": replace(LLAMA, qkv_bias=True, attention_out_bias=True, mlp_bias=True, intermediate_size=161),
    "llama-window": replace(LLAMA, sliding_window=40),
    "qwen3": replace(LLAMA, qk_norm=True, num_heads=8, head_dim=16, num_layers=4),
    "opt": OPT,
    "opt-projected": replace(OPT, embed_dim=32, norm_before=False, num_layers=3),
}


def dummy(config: ModelConfig) -> ModelFiles:
    return ModelFiles(name="dummy", kind="dummy", path=None, config=config)


def sample() -> SampleSpec:
    return SampleSpec(SamplingParams(temperature=0.0), 0, (), ())


def steps() -> list[StepPlan]:
    """A long prompt in two chunks beside a short one, then both decode, then one alone. The first samples nothing."""
    ids = np.random.default_rng(1).integers(0, 500, 300).tolist()
    long, short = list(range(12)), [20, 15, 17]
    return [
        StepPlan(0, (StepRow("a", 0, ids[:70], long, None), StepRow("b", 0, ids[200:220], short, None))),
        StepPlan(1, (StepRow("b", 20, ids[220:223], short, sample()), StepRow("a", 70, ids[70:171], long, sample()))),
        StepPlan(2, (StepRow("b", 23, ids[5:6], short, sample()), StepRow("a", 171, ids[8:9], long, sample()))),
        StepPlan(3, (StepRow("b", 24, ids[9:10], short, sample()),)),
    ]


def of_one_rank(config: ModelConfig) -> list[np.ndarray]:
    """The logits of `steps`, computed by one rank."""
    kv = HostKVStore(kv_layout(config, "float32", BLOCK_SIZE), NUM_BLOCKS)
    forward = TorchForward(dummy(config), "float32", "torch", kv.array)
    return [forward.run(plan) for plan in steps()]


def ranked_kv(config: ModelConfig, tensor: int, stages: int) -> RankedKVStore:
    layout = kv_layout(config, "float32", BLOCK_SIZE)
    return RankedKVStore(KVSplit(layout=layout, tensor_parallel=tensor, pipeline_stages=stages), NUM_BLOCKS)


def assert_close(found: list[np.ndarray], expected: list[np.ndarray]) -> None:
    assert [logits.shape for logits in found] == [logits.shape for logits in expected]
    for ours, theirs in zip(found, expected, strict=True):
        if theirs.size:
            assert np.abs(ours - theirs).max() <= TOLERANCE * np.abs(theirs).max()

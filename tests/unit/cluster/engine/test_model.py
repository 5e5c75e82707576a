"""The decoder against transformers, on random tiny models of every architecture, through our own loader.

fp32, relative error <= 1e-4 of the largest logit, whole, in chunks, after a cached prefix, and in ragged batches.
"""

import dataclasses
from pathlib import Path

import pytest
import torch
import transformers
from tandem.cluster.engine.model import Model
from tandem.cluster.engine.plan import SampleSpec, StepPlan, StepRow
from tandem.cluster.engine.plan_check import check_plan
from tandem.cluster.engine.runner import Runner
from tandem.cluster.engine.weights import load_model
from tandem.cluster.models.hf_config import load_hf_config
from tandem.cluster.models.reference import ModelFiles
from tandem.cluster.types import SamplingParams
from tandem.kernels.dispatch import operations

BLOCK_SIZE = 4
TOLERANCE = 1e-4
VOCAB = 97
LLAMA = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "attention_dropout": 0.0,
}
OPT = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "ffn_dim": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "word_embed_proj_dim": 48,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
CONFIGS = {
    "llama-gqa": lambda: transformers.LlamaConfig(**LLAMA),
    "llama-tied": lambda: transformers.LlamaConfig(**LLAMA, tie_word_embeddings=True),
    "llama-biases": lambda: transformers.LlamaConfig(**LLAMA, attention_bias=True, mlp_bias=True),
    "llama-head-dim": lambda: transformers.LlamaConfig(**LLAMA, head_dim=16),
    "llama-rope-llama3": lambda: transformers.LlamaConfig(**LLAMA, rope_parameters=LLAMA3_ROPE),
    "llama-rope-linear": lambda: transformers.LlamaConfig(
        **LLAMA, rope_parameters={"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
    ),
    "mistral-window": lambda: transformers.MistralConfig(**LLAMA, sliding_window=9),
    "qwen2": lambda: transformers.Qwen2Config(**LLAMA),
    "qwen3": lambda: transformers.Qwen3Config(**LLAMA, head_dim=16),
    "opt": lambda: transformers.OPTConfig(**OPT),
    "opt-post-norm-projected": lambda: transformers.OPTConfig(
        **{**OPT, "word_embed_proj_dim": 24}, do_layer_norm_before=False
    ),
}


@pytest.fixture(scope="module", params=list(CONFIGS))
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    """(transformers model, our model) with the same random weights."""
    torch.manual_seed(0)
    config = CONFIGS[request.param]()
    oracle = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, parameter in oracle.named_parameters():  # biases and norms start at 0 and 1: make them count
            scale = 0.3 if parameter.dim() > 1 else 0.2
            parameter.copy_(torch.randn_like(parameter) * scale + ("norm" in name and name.endswith("weight")))
    folder = tmp_path_factory.mktemp(request.param)
    oracle.save_pretrained(folder)
    return oracle, load_model(hf_files(folder), "float32")


def hf_files(folder: Path) -> ModelFiles:
    return ModelFiles(name=folder.name, kind="hf", path=folder, config=load_hf_config(folder))


def prompt(length: int, seed: int = 0) -> list[int]:
    return torch.randint(0, VOCAB, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


class Steps:
    """Drives a `Runner` over its own KV memory; sequences get shuffled, disjoint block tables."""

    def __init__(self, model: Model, dtype: torch.dtype = torch.float32, num_blocks: int = 120) -> None:
        c = model.config
        shape = (num_blocks, c.num_layers, 2, c.num_kv_heads, BLOCK_SIZE, c.head_dim)
        self.runner = Runner(model, torch.full(shape, float("nan"), dtype=dtype))
        self._free = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(1)).tolist()

    def table(self, tokens: int) -> list[int]:
        return [self._free.pop() for _ in range(-(-tokens // BLOCK_SIZE))]

    def run(self, *rows: tuple[list[int], int, list[int], bool]) -> torch.Tensor:
        """Rows of (tokens, start, table, sample)."""
        spec = SampleSpec(SamplingParams(), 0, [], [])
        plan = StepPlan(
            0, tuple(StepRow(str(i), at, ids, table, spec if s else None) for i, (ids, at, table, s) in enumerate(rows))
        )
        check_plan(plan, self.runner.model.config, self.runner.num_blocks, BLOCK_SIZE)
        return self.runner.run(plan)


def oracle_logits(oracle: torch.nn.Module, tokens: list[int]) -> torch.Tensor:
    """[T, V]"""
    with torch.no_grad():
        return oracle(torch.tensor([tokens])).logits[0]


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert actual.shape == expected.shape
    error = (actual - expected).abs().max() / expected.abs().max()
    assert error <= TOLERANCE, f"relative error {error:.2e}"


def test_whole_prompts_of_every_length(pair) -> None:
    oracle, model = pair
    tokens = prompt(41)
    expected = oracle_logits(oracle, tokens)
    for length in (1, 2, 3, 4, 5, 9, 10, 16, 41):
        steps = Steps(model)
        logits = steps.run((tokens[:length], 0, steps.table(length), True))
        assert_close(logits, expected[length - 1 : length])


@pytest.mark.parametrize("chunk", [1, 3, 8, 40])
def test_chunks(pair, chunk: int) -> None:
    """Chunks that end inside, at and across blocks; KV of earlier chunks is a prefix that is there already."""
    oracle, model = pair
    tokens = prompt(41)
    expected = oracle_logits(oracle, tokens)
    steps = Steps(model)
    table = steps.table(len(tokens))
    for start in range(0, len(tokens), chunk):
        piece = tokens[start : start + chunk]
        logits = steps.run((piece, start, table, True))
        assert_close(logits, expected[start + len(piece) - 1 : start + len(piece)])


def test_chunks_without_samples_give_no_logits(pair) -> None:
    oracle, model = pair
    tokens = prompt(17)
    steps = Steps(model)
    table = steps.table(17)
    assert steps.run((tokens[:10], 0, table, False)).shape == (0, VOCAB)
    assert_close(steps.run((tokens[10:], 10, table, True)), oracle_logits(oracle, tokens)[16:])


def test_ragged_batch(pair) -> None:
    """Decode rows of unlike context, a prefill from a cached prefix, a whole prompt, a chunk that does not sample."""
    oracle, model = pair
    prompts = [prompt(n, seed=n) for n in (33, 6, 13, 30, 22, 12)]
    done = [32, 5, 12, 16, 0, 0]  # KV that exists before the step
    steps = Steps(model)
    tables = [steps.table(len(p)) for p in prompts]
    for tokens, start, table in zip(prompts, done, tables, strict=True):
        if start:
            steps.run((tokens[:start], 0, table, False))
    rows = [(p[s:], s, t, i != 5) for i, (p, s, t) in enumerate(zip(prompts, done, tables, strict=True))]
    logits = steps.run(*rows)
    expected = torch.stack([oracle_logits(oracle, p)[-1] for p in prompts[:5]])
    assert_close(logits, expected)
    after = steps.run((prompts[0][:1], 33, [*tables[0]], True), (prompt(1), 12, [*tables[5], *steps.table(4)], True))
    expected = [
        oracle_logits(oracle, prompts[0] + prompts[0][:1])[-1],
        oracle_logits(oracle, prompts[5] + prompt(1))[-1],
    ]
    assert_close(after, torch.stack(expected))


def test_a_shared_prefix_is_read_not_written(pair) -> None:
    oracle, model = pair
    shared, tails = prompt(16), [prompt(5, seed=1), prompt(7, seed=2)]
    steps = Steps(model)
    prefix = steps.table(16)
    steps.run((shared, 0, prefix, False))
    kept = steps.runner.kv[prefix].clone()
    logits = steps.run(*[(tail, 16, [*prefix, *steps.table(len(tail))], True) for tail in tails])
    assert_close(logits, torch.stack([oracle_logits(oracle, shared + tail)[-1] for tail in tails]))
    assert torch.equal(steps.runner.kv[prefix], kept)


def test_reference_operations_give_the_same(pair) -> None:
    _, model = pair
    tokens = prompt(11)
    fast, plain = Steps(model), Steps(dataclasses.replace(model, ops=operations("reference")))
    expected = plain.run((tokens, 0, plain.table(11), True))
    assert_close(fast.run((tokens, 0, fast.table(11), True)), expected)


def test_decode_batch_equals_single_rows(pair) -> None:
    """Continuous batching changes nothing beyond rounding."""
    _, model = pair
    steps = Steps(model)
    prompts = [prompt(n, seed=n) for n in (5, 9, 16, 27)]
    tables = [steps.table(len(p)) for p in prompts]
    for tokens, table in zip(prompts, tables, strict=True):
        steps.run((tokens[:-1], 0, table, False))
    rows = [(p[-1:], len(p) - 1, t, True) for p, t in zip(prompts, tables, strict=True)]
    together = steps.run(*rows)
    apart = torch.cat([steps.run(row) for row in rows])
    assert_close(together, apart)


def test_bfloat16_stays_near_float32(pair, tmp_path: Path) -> None:
    """16-bit weights and bfloat16 KV: teacher-forced logits within 5 % of the largest."""
    oracle, _ = pair
    oracle.save_pretrained(tmp_path)
    model = load_model(hf_files(tmp_path), "bfloat16")
    tokens = prompt(30)
    steps = Steps(model, torch.bfloat16)
    table = steps.table(30)
    logits = [steps.run((tokens[:12], 0, table, True))]
    logits += [steps.run((tokens[i : i + 1], i, table, True)) for i in range(12, 30)]
    expected = oracle_logits(oracle, tokens)[11:]
    error = (torch.cat(logits) - expected).abs().max() / expected.abs().max()
    assert 0 < error <= 0.05


def test_malformed_rows_are_refused(pair) -> None:
    _, model = pair
    steps = Steps(model)
    table = steps.table(8)
    for row, message in [
        (([], 0, table, True), "are empty"),
        (([1], -1, table, True), "are empty or not in"),
        (([1], 128, table * 40, True), "not in 0…127"),
        (([1], 8, table, True), "2 blocks of 4 do not hold 9 tokens"),
        (([VOCAB], 0, table, True), f"not all in 0…{VOCAB - 1}"),
        (([-1], 0, table, True), "token_ids"),
        (([1], 0, [120], True), "block_ids"),
    ]:
        with pytest.raises(ValueError, match=message):
            steps.run(row)


def test_observers_see_every_linear(pair) -> None:
    _, model = pair
    seen: dict[str, int] = {}
    for name, linear in model.linears().items():
        linear.observer = lambda x, name=name: seen.update({name: x.shape[0]})
    steps = Steps(model)
    steps.run((prompt(6), 0, steps.table(6), True))
    for linear in model.linears().values():
        linear.observer = None
    assert seen.keys() == model.linears().keys()
    assert seen["layers.0.down"] == 6
    assert seen["layers.2.down"] == seen["head"] == 1  # the last layer goes on for the sampled token alone

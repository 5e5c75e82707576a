"""SmolLM2-135M-Instruct itself: our decoder on its GGUF file against transformers on the same file.

transformers reads the file with its own code (names, un-permutation, dequantization by `gguf`).
"""

import gzip
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tandem.cluster.engine.compiled import CompiledForward
from tandem.cluster.engine.devices.kv_memory import HostKVStore, kv_layout
from tandem.cluster.engine.fingerprint import fingerprint
from tandem.cluster.engine.forward import Forward
from tandem.cluster.engine.plan import SampleSpec, StepPlan, StepRow
from tandem.cluster.engine.runner import TorchForward
from tandem.cluster.models.reference import ModelFiles
from tandem.cluster.types import SamplingParams
from tandem.cluster.workload.prompts import PROMPTS
from tandem.router.tokenizer import load_tokenizer

pytestmark = pytest.mark.timeout(900)  # transformers takes minutes to load the model where others want the processor
BLOCK_SIZE = 16
COUNT, NEW_TOKENS, CHUNK = 20, 32, 48
MAX_PROMPT_TOKENS = 120
TOLERANCE = 1e-4
"""Of fp32 logits, relative to the largest of the row."""
TIE = 2 * TOLERANCE
"""Two logits nearer than this (relative to the largest) may change places by rounding."""


def texts(data: Path) -> list[str]:
    """Real prompts, the three sources in turn; those of the package where the data is not beside the repository."""
    if not data.is_dir():
        return list(PROMPTS)

    def read(name: str) -> list[dict[str, Any]]:
        with gzip.open(data / name, "rt", encoding="utf-8") as lines:
            return [json.loads(line) for line in itertools.islice(lines, 40)]

    sources = (
        [row["turns"][0] for row in read("mt_bench_question.jsonl.gz")],
        [row["question"] for row in read("gsm8k_test.jsonl.gz")],
        [row["prompt"] for row in read("humaneval.jsonl.gz")],
    )
    return [text for group in zip(*sources, strict=True) for text in group]


@pytest.fixture(scope="module")
def prompts(smollm2: ModelFiles, repository: Path) -> list[list[int]]:
    tokenizer = load_tokenizer(smollm2)
    chats = (
        tokenizer.encode(f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n", add_special=False)
        for text in texts(repository.parent / "shared" / "data" / "prompts")
    )
    chosen = list(itertools.islice((ids for ids in chats if len(ids) <= MAX_PROMPT_TOKENS), COUNT))
    assert len(chosen) == COUNT
    return chosen


def spec() -> SampleSpec:
    return SampleSpec(SamplingParams(temperature=0.0), 0, [], [])


def load(files: ModelFiles, kernels: str, dtype: str, store: HostKVStore, quantization: str | None = None) -> Forward:
    if kernels == "compiled":
        name = fingerprint(files, dtype, quantization)
        return CompiledForward(files, quantization or dtype, store.array, fingerprint=name)
    return TorchForward(files, dtype, kernels, store.array)


def decode(
    files: ModelFiles,
    prompts: list[list[int]],
    kernels: str,
    dtype: str,
    forced: torch.Tensor | None = None,
    quantization: str | None = None,
) -> torch.Tensor:
    """Logits [COUNT, NEW_TOKENS, V] of each new token: prefill in chunks, then all prompts as one decode batch.

    The next token is the likeliest one, or what `forced` [COUNT, NEW_TOKENS] says.
    """
    needed = [-(-(len(p) + NEW_TOKENS) // BLOCK_SIZE) for p in prompts]
    store = HostKVStore(kv_layout(files.config, dtype, BLOCK_SIZE), sum(needed))
    forward = load(files, kernels, dtype, store, quantization)
    shuffled = torch.randperm(sum(needed), generator=torch.Generator().manual_seed(0)).tolist()
    tables = [[shuffled.pop() for _ in range(count)] for count in needed]
    logits = torch.empty(len(prompts), NEW_TOKENS, files.config.vocab_size)
    for i, (tokens, table) in enumerate(zip(prompts, tables, strict=True)):
        for start in range(0, len(tokens), CHUNK):
            piece = tokens[start : start + CHUNK]
            last = start + CHUNK >= len(tokens)
            out = forward.run(StepPlan(0, (StepRow("p", start, piece, table, spec() if last else None),)))
        logits[i, 0] = torch.from_numpy(out[0])
    for step in range(NEW_TOKENS - 1):
        tokens = logits[:, step].argmax(-1) if forced is None else forced[:, step]
        rows = [StepRow(str(i), len(p) + step, [int(tokens[i])], tables[i], spec()) for i, p in enumerate(prompts)]
        logits[:, step + 1] = torch.from_numpy(forward.run(StepPlan(0, tuple(rows))))
    forward.close()
    return logits


@pytest.fixture(scope="module")
def exact(smollm2: ModelFiles, prompts: list[list[int]]) -> torch.Tensor:
    """Our float32 logits of the greedy continuations."""
    return decode(smollm2, prompts, "compiled", "float32")


def test_logits_and_greedy_tokens_equal_transformers(
    oracle: torch.nn.Module, prompts: list[list[int]], exact: torch.Tensor
) -> None:
    """Given our tokens so far, transformers' likeliest next token is ours at every one of 640 places, so that its own
    greedy continuations are the same; where it is not, the two logits must tie within rounding.
    """
    tokens = exact.argmax(-1)
    ties = 0
    for i, prompt in enumerate(prompts):
        context = torch.tensor([prompt + tokens[i, :-1].tolist()])
        with torch.no_grad():
            expected = oracle(context).logits[0, len(prompt) - 1 :]
        largest = expected.abs().amax(-1)
        error = ((exact[i] - expected).abs().amax(-1) / largest).max()
        assert error <= TOLERANCE, f"prompt {i}: relative error {error:.2e}"
        for step in (expected.argmax(-1) != tokens[i]).nonzero().flatten().tolist():
            gap = (expected[step].max() - expected[step, tokens[i, step]]) / largest[step]
            assert gap <= TIE, f"prompt {i}, token {step}: no tie, relative gap {gap:.2e}"
            ties += 1
    assert ties <= 2, "so many ties are not rounding"


def test_continuations_are_sensible(smollm2: ModelFiles, prompts: list[list[int]], exact: torch.Tensor) -> None:
    text = load_tokenizer(smollm2).decode(exact[0].argmax(-1).tolist())
    assert len(text.split()) > 10
    assert len({tuple(row) for row in exact.argmax(-1).tolist()}) == COUNT


def test_torch_computes_the_same(smollm2: ModelFiles, prompts: list[list[int]], exact: torch.Tensor) -> None:
    logits = decode(smollm2, prompts, "torch", "float32", exact.argmax(-1))
    error = (logits - exact).abs().amax(-1) / exact.abs().amax(-1)
    assert error.max() <= TOLERANCE


@pytest.mark.parametrize(
    ("kernels", "quantization", "tolerance", "agreeing"),
    [("compiled", None, 0.03, 0.97), ("torch", None, 0.03, 0.97), ("compiled", "w8a8", 0.3, 0.85)],
)
def test_narrow_weights_are_near_float32(
    smollm2: ModelFiles,
    prompts: list[list[int]],
    exact: torch.Tensor,
    kernels: str,
    quantization: str | None,
    tolerance: float,
    agreeing: float,
) -> None:
    """Teacher-forced logits with narrow weights and bfloat16 KV: error relative to the largest of the row, and how many
    likeliest tokens agree.
    """
    forced = exact.argmax(-1)
    logits = decode(smollm2, prompts, kernels, "bfloat16", forced, quantization)
    error = (logits - exact).abs().amax(-1) / exact.abs().amax(-1)
    agreement = (logits.argmax(-1) == forced).float().mean()
    assert error.max() <= tolerance, f"relative error {error.max():.3f}, agreement {agreement:.3f}"
    assert agreement >= agreeing, f"relative error {error.max():.3f}, agreement {agreement:.3f}"
    assert error.max() > TOLERANCE, "this is float32 twice"

"""What KV in int8 and e4m3 costs a model: its next-token distributions on real text, with KV rounded as narrow memory
rounds it, against those with plain KV.

    .venv/bin/python tests/load/narrow_kv.py                 # SmolLM2-135M, minutes
    .venv/bin/python tests/load/narrow_kv.py --model FOLDER --scales kv_scales.json --texts 48

Computed on processors by torch: each layer's new keys (after rotary) and values are rounded before they are written, so
that attention reads nothing else, and each text is one step. Scales are those of `tandem calibrate`, made first unless
named: on text that the model writes itself, so that none of these texts was seen. `scale 1`: fp8 without scales. Texts
are problems with answers (gsm8k, HumanEval) cut to the same length. Prints, with standard errors over texts: perplexity
against plain KV's, KL divergence a token from the plain distribution (nats), how often the likeliest token is the same,
and how many numbers of a million lay beyond the largest that the type has. `float32`: KV that nothing rounds, which
says what is noise.
"""
# ruff: noqa: N803

from __future__ import annotations

import argparse
import dataclasses
import gzip
import itertools
import json
import math
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from tandem.cluster.cli import run
from tandem.cluster.engine.calibrate import narrowed
from tandem.cluster.engine.devices.kv_memory import kv_layout
from tandem.cluster.engine.kv_scales import LARGEST_STORED, KVScales
from tandem.cluster.engine.model import Model
from tandem.cluster.engine.plan import SampleSpec, StepPlan, StepRow
from tandem.cluster.engine.runner import Runner
from tandem.cluster.engine.weights import DTYPES, load_model
from tandem.cluster.models.reference import ModelFiles, resolve_model
from tandem.cluster.types import SamplingParams
from tandem.kernels.dispatch import operations
from tandem.router.tokenizer import load_tokenizer

BLOCK_SIZE = 16
DATA = Path(__file__).parents[3] / "shared" / "data" / "prompts"


class Rounded:
    """`Operations.kv_write` that rounds first. Layers come in order, again and again."""

    def __init__(self, model: Model, dtype: str, scales_L2K: np.ndarray) -> None:
        """`dtype`: as `LARGEST_STORED` has it, or `float32`."""
        self._write = model.ops.kv_write
        self._dtype, self._scales = dtype, scales_L2K
        self._layers = itertools.cycle(range(len(scales_L2K)))
        self.numbers = self.beyond = 0

    def __call__(self, layer: torch.Tensor, new_T2KD: torch.Tensor, *where: torch.Tensor) -> None:
        values = new_T2KD.float().numpy()
        self.numbers += values.size
        if self._dtype != "float32":
            scales = self._scales[next(self._layers)][None, :, :, None]
            self.beyond += int((np.abs(values) > scales * np.float32(LARGEST_STORED[self._dtype])).sum())
            values = narrowed(values, scales, self._dtype)
        self._write(layer, torch.from_numpy(values), *where)


class Texts:
    """A model's logits of all tokens of a text."""

    def __init__(self, files: ModelFiles, dtype: str, tokens: int) -> None:
        self.model = load_model(files, dtype)
        self.plain = self.model.ops = operations("torch")
        (group,) = kv_layout(files.config, dtype, BLOCK_SIZE).groups
        shape = (group.num_layers, 2, group.num_kv_heads, BLOCK_SIZE, group.head_dim)
        self._blocks = range(-(-tokens // BLOCK_SIZE))
        # float32 memory: what was rounded must not be rounded again; plain KV is rounded by `dtype` as ever
        self._kv = torch.zeros((len(self._blocks), *shape), dtype=torch.float32)
        self._dtype = DTYPES[dtype]

    @torch.inference_mode()
    def logits(self, ids: list[int], rounded: Rounded | None) -> torch.Tensor:
        """[T, V] log-probabilities of what follows each token."""
        kv = self._kv if rounded is not None else self._kv.to(self._dtype)
        write = self.plain.kv_write if rounded is None else rounded
        self.model.ops = dataclasses.replace(self.plain, kv_write=write)
        runner = Runner(self.model, kv)
        spec = SampleSpec(SamplingParams(), 0, (), ())
        batch, _ = runner._flatten(StepPlan(0, (StepRow("text", 0, ids, self._blocks, spec),)))
        batch = dataclasses.replace(batch, sampled_R=None, sampled_attention=batch.attention)
        return torch.log_softmax(self.model.forward(batch, kv), dim=-1)


def pieces(files: ModelFiles, count: int, tokens: int) -> list[list[int]]:
    """Real text of the two sources in turn, each piece as many problems as it takes."""
    tokenizer = load_tokenizer(files)

    def source(name: str, question: str, answer: str) -> Iterator[list[int]]:
        with gzip.open(DATA / name, "rt", encoding="utf-8") as lines:
            rows = (json.loads(line) for line in lines)
            while True:
                piece: list[int] = []
                while len(piece) < tokens:
                    row = next(rows)
                    piece += tokenizer.encode(f"{row[question]}\n{row[answer]}\n\n", add_special=not piece)
                yield piece[:tokens]

    gsm8k = source("gsm8k_test.jsonl.gz", "question", "answer")
    code = source("humaneval.jsonl.gz", "prompt", "canonical_solution")
    both = itertools.chain.from_iterable(zip(gsm8k, code, strict=False))
    return list(itertools.islice(both, count))


@dataclasses.dataclass(slots=True)
class Cost:
    """Of one kind of KV: a mean for each text."""

    losses: list[float] = dataclasses.field(default_factory=list)
    divergences: list[float] = dataclasses.field(default_factory=list)
    same: list[float] = dataclasses.field(default_factory=list)

    def add(self, plain: torch.Tensor, found: torch.Tensor, ids: list[int]) -> None:
        """Log-probabilities [T, V] with plain KV and with this."""
        self.losses.append(-found[:-1].gather(1, torch.tensor(ids[1:])[:, None]).mean().item())
        self.divergences.append((plain.exp() * (plain - found)).sum(-1).mean().item())
        self.same.append((plain.argmax(-1) == found.argmax(-1)).float().mean().item())

    def line(self, plain: Cost) -> str:
        """Means and standard errors over texts."""
        more = [math.expm1(own - base) * 100 for own, base in zip(self.losses, plain.losses, strict=True)]
        shown = (
            f"{math.exp(statistics.fmean(self.losses)):8.3f}",
            _mean(more, "+.2f", " %"),
            _mean([kl * 1e3 for kl in self.divergences], ".2f", "e-3"),
            _mean([share * 100 for share in self.same], ".1f", " %"),
        )
        return "  ".join(f"{text:>18}" for text in shown)


def _mean(values: list[float], form: str, unit: str) -> str:
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return f"{statistics.fmean(values):{form}} ({error:{form.lstrip('+')}}){unit}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="bfloat16")
    parser.add_argument("--scales", type=Path, help="of `tandem calibrate`; default: made now")
    parser.add_argument("--texts", type=int, default=24)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    files = resolve_model(options.model)
    with tempfile.TemporaryDirectory() as folder:
        path = options.scales or Path(folder) / "kv_scales.json"
        if options.scales is None and run(["calibrate", options.model, "--dtype", options.dtype, "--out", str(path)]):
            raise SystemExit(1)
        scales = KVScales.load(path, files.config)
    texts = Texts(files, options.dtype, options.tokens)
    ones = np.ones_like(scales.largest)
    kinds = {
        "int8": Rounded(texts.model, "int8", scales.scales("int8")),
        "fp8": Rounded(texts.model, "float8_e4m3", scales.scales("float8_e4m3")),
        "fp8, scale 1": Rounded(texts.model, "float8_e4m3", ones),
        "float32": Rounded(texts.model, "float32", ones),
    }
    plain, costs = Cost(), {name: Cost() for name in kinds}
    for ids in pieces(files, options.texts, options.tokens):
        expected = texts.logits(ids, None)
        plain.add(expected, expected, ids)
        for name, rounded in kinds.items():
            costs[name].add(expected, texts.logits(ids, rounded), ids)
    print(f"{len(plain.losses)} texts of {options.tokens} tokens; plain KV ({options.dtype}): perplexity ", end="")
    print(f"{math.exp(statistics.fmean(plain.losses)):.3f}")
    print(f"{'KV':14}" + "  ".join(f"{head:>18}" for head in ("perplexity", "more", "KL", "same token", "beyond, ppm")))
    for name, rounded in kinds.items():
        print(f"{name:14}{costs[name].line(plain)}  {rounded.beyond / rounded.numbers * 1e6:>18.2f}")


if __name__ == "__main__":
    main()

"""Tokens from logits and the verification of drafts, against torch with a sort and FlashInfer. Vocabulary of 128,256;
rows of logits are drawn as a language model's are: a few hundred likely tokens. Each row needs one pass at least. Told
beside it: the share of a decode step of an 8B model that reads its weights as fast as a copy reads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import flashinfer_rival
import torch
from measure import LATE, Case, library
from tandem.kernels.gpu.logprobs import logprobs
from tandem.kernels.gpu.penalties import penalize, restore
from tandem.kernels.gpu.sampling import probabilities, sample
from tandem.kernels.gpu.speculative import verify
from tandem.kernels.gpu_plans.draws import Penalties, Wants

SIZE = 128_256
ROWS = (1, 32, 128)
DRAFTED = 4
CONTEXT = 2000
STEP_BYTES = 15_009_316_864
"""Weights of Llama-3.1-8B in bf16 that a decode step reads."""


def cases(device: torch.device) -> Iterator[Callable[[], list[Case]]]:
    """One list a batch and way of sampling."""
    for rows in ROWS:
        logits = torch.randn(rows, SIZE, device=device)
        logits += 12 * torch.rand(rows, SIZE, device=device) ** 400
        for name, cuts in (
            ("greedy", {"temperature": 0.0}),
            ("temperature", {"temperature": 1.0}),
            ("top-p 0.95", {"temperature": 1.0, "top_p": 0.95}),
            ("top-k 50, top-p 0.95", {"temperature": 1.0, "top_k": 50, "top_p": 0.95}),
        ):
            yield partial(_sampled, logits, name, cuts)
        yield partial(_all_in_one, logits)
        yield partial(_logprobs, logits)
        yield partial(_penalized, logits)
    yield partial(_verified, device)


def _wants(rows: int, cuts: dict[str, float], device: torch.device) -> Wants:
    return Wants.of(
        temperature=[cuts["temperature"]] * rows,
        top_k=[int(cuts.get("top_k", 0))] * rows,
        min_p=[cuts.get("min_p", 0.0)] * rows,
        top_p=[cuts.get("top_p", 1.0)] * rows,
        seed=range(rows),
        index=[7] * rows,
        device=device,
    )


def _sorted_in_torch(logits: torch.Tensor, cuts: dict[str, float]) -> torch.Tensor:
    """The usual way: sort, cut, draw."""
    if cuts["temperature"] == 0:
        return logits.argmax(1)
    if len(cuts) == 1:
        return torch.multinomial(logits.softmax(1), 1)
    ordered, ids = logits.sort(1, descending=True)
    if "top_k" in cuts:
        ordered[:, int(cuts["top_k"]) :] = float("-inf")
    weights = ordered.softmax(1)
    weights[weights.cumsum(1) - weights >= cuts["top_p"]] = 0
    return ids.gather(1, torch.multinomial(weights, 1))


def _sampled(logits: torch.Tensor, name: str, cuts: dict[str, float]) -> list[Case]:
    rows = logits.shape[0]
    wants = _wants(rows, cuts, logits.device)
    _check(logits, wants, cuts)
    what = f"sample, {rows} rows, {name}"
    found = [
        _case(what, "tandem", lambda: sample(logits, wants, cuts="top_p" in cuts), logits),
        _case(what, "torch", lambda: _sorted_in_torch(logits, cuts), logits),
    ]
    if cuts["temperature"] > 0 and flashinfer_rival.is_here():
        theirs = library(partial(flashinfer_rival.sampled, logits, cuts))
        note = "and softmax" if "top_p" in cuts else ""
        found.append(_case(what, "FlashInfer", theirs, logits, note=note, late=LATE))
    return found


def _case(what: str, who: str, run: Callable[[], object], logits: torch.Tensor, **more: Any) -> Case:
    return Case(what=what, who=who, run=run, moved_bytes=logits.nbytes, beside_bytes=STEP_BYTES, **more)


def _all_in_one(logits: torch.Tensor) -> list[Case]:
    """All that a step may be asked for, of every row: penalties, a draw with every cut, the way back, logprobs."""
    rows, device = logits.shape[0], logits.device
    asked, scratch = _asked(rows, device)[0], logits.clone()
    cuts = {"temperature": 0.8, "top_k": 50, "top_p": 0.95, "min_p": 0.02}
    wants, which = _wants(rows, cuts, device), torch.arange(rows, dtype=torch.int32, device=device)
    none = torch.zeros_like(which)

    def run() -> None:
        penalize(scratch, asked)
        sample(scratch, wants)
        restore(scratch, asked)
        logprobs(scratch, none, which, none, 0)

    run()
    penalized = logits.clone()
    penalize(penalized, asked)
    _check(penalized, wants, cuts)
    return [_case(f"penalties, draw and logprobs, {rows} rows", "tandem", run, logits)]


def _check(logits: torch.Tensor, wants: Wants, cuts: dict[str, float]) -> None:
    """What is drawn is among what the sort keeps, and weighs as much."""
    kept = probabilities(logits, wants)
    tokens = sample(logits, wants).long()
    assert bool((kept.gather(1, tokens[:, None]) > 0).all())
    torch.testing.assert_close(kept.sum(1), torch.ones_like(kept[:, 0]), rtol=1e-4, atol=1e-4)
    if "top_k" in cuts:
        assert bool(((kept > 0).sum(1) <= cuts["top_k"]).all())


def _logprobs(logits: torch.Tensor) -> list[Case]:
    """Of every row, with no likeliest tokens beside (each is another pass)."""
    rows = torch.arange(logits.shape[0], dtype=torch.int32, device=logits.device)
    none = torch.zeros_like(rows)
    found = logprobs(logits, none, rows, none, 0).normalizers_Q
    torch.testing.assert_close(found.float(), torch.logsumexp(logits, 1), rtol=1e-4, atol=1e-4)
    what = f"normalizers, {len(rows)} rows"
    run = lambda: logprobs(logits, none, rows, none, 0)  # noqa: E731
    return [
        Case(what=what, who="tandem", run=run, moved_bytes=logits.nbytes),
        Case(what=what, who="torch", run=lambda: torch.logsumexp(logits, 1), moved_bytes=logits.nbytes),
    ]


def _asked(rows: int, device: torch.device) -> tuple[Penalties, torch.Tensor, torch.Tensor]:
    """Every row penalizes a context of 2,000 distinct tokens; and which [R, C], by how much beside their factor."""
    ids = torch.argsort(torch.rand(rows, SIZE, device=device), 1)[:, :CONTEXT].int()
    spans = torch.arange(rows, dtype=torch.int32, device=device)[:, None] * CONTEXT
    spans = torch.cat((spans, spans, spans + CONTEXT), 1)
    values = torch.rand(rows, CONTEXT, device=device)
    asked = Penalties(
        torch.arange(rows, dtype=torch.int32, device=device),
        spans.contiguous(),
        torch.full((rows,), 1.2, device=device),
        ids.flatten(),
        values.flatten(),
        torch.empty(rows * CONTEXT, device=device),
    )
    return asked, ids, values


def _penalized(logits: torch.Tensor) -> list[Case]:
    """And the way back, so that every repetition finds the same. Moved is what the check of a row reads."""
    rows = logits.shape[0]
    asked, ids, values = _asked(rows, logits.device)
    wide = ids.long()

    def in_torch(x: torch.Tensor) -> torch.Tensor:
        there = x.gather(1, wide)
        x.scatter_(1, wide, torch.where(there > 0, there / 1.2, there * 1.2) - values)
        return there

    scratch, expected = logits.clone(), logits.clone()
    penalize(scratch, asked)
    in_torch(expected)
    torch.testing.assert_close(scratch, expected, rtol=1e-5, atol=1e-5)
    scratch.copy_(logits)

    def run() -> None:
        penalize(scratch, asked)
        restore(scratch, asked)

    theirs = lambda: scratch.scatter_(1, wide, in_torch(scratch))  # noqa: E731
    what = f"penalties and back, {rows} rows, {CONTEXT} tokens each"
    return [
        Case(what=what, who="tandem", run=run, moved_bytes=logits.nbytes),
        Case(what=what, who="torch", run=theirs, moved_bytes=logits.nbytes, note="no check"),
    ]


def _verified(device: torch.device) -> list[Case]:
    rows = 32
    target = torch.rand(rows, DRAFTED + 1, SIZE, device=device) ** 40
    target /= target.sum(-1, keepdim=True)
    draft = target[:, :-1].contiguous()
    drafted = torch.multinomial(draft.flatten(0, 1), 1).view(rows, DRAFTED).int()
    wants = _wants(rows, {"temperature": 1.0}, device)
    lengths = torch.full((rows,), DRAFTED, dtype=torch.int32, device=device)
    run = lambda: verify(target, draft, drafted, lengths, wants.seed, wants.choice, wants.index)  # noqa: E731
    assert run()[1].tolist() == [DRAFTED + 1] * rows
    what, moved = f"verification, {rows} rows, {DRAFTED} drafted", rows * SIZE * 4
    found = [Case(what=what, who="tandem", run=run, moved_bytes=moved, note="one row of each is read")]
    if flashinfer_rival.is_here():

        def theirs() -> Callable[[], torch.Tensor]:
            made = flashinfer_rival.verified(draft, drafted, target)
            assert torch.equal(made()[:, :DRAFTED], drafted)
            return made

        found.append(Case(what=what, who="FlashInfer", run=library(theirs), moved_bytes=moved, late=LATE))
    return found

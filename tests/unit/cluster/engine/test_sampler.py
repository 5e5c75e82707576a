"""The sampler against a slow reference made of transformers' processors, by statistics, and row by row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from tandem.cluster.engine.plan import SampleSpec
from tandem.cluster.engine.sampler import SampleFailure, Sampler
from tandem.cluster.types import SampledToken, SamplingParams
from tandem.kernels.philox import Purpose, uniform
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

V = 300
PROMPT, OUTPUT = (5, 17, 17, 80, 200), (3, 17, 250, 3, 3)


def spec(
    index: int = 0, *, banned: tuple[int, ...] = (), output: Sequence[int] = OUTPUT, **fields: object
) -> SampleSpec:
    return SampleSpec(SamplingParams(**fields), index, PROMPT, output, banned)  # type: ignore[arg-type]


def logits(rows: int, seed: int = 0, size: int = V) -> torch.Tensor:
    return torch.randn((rows, size), generator=torch.Generator().manual_seed(seed)) * 3


def sample(rows: torch.Tensor, specs: Sequence[SampleSpec]) -> list[SampledToken | SampleFailure]:
    return Sampler().sample(rows.numpy(), specs)


def tokens(results: Sequence[SampledToken | SampleFailure]) -> list[int]:
    assert not [r for r in results if isinstance(r, SampleFailure)]
    return [r.token_id for r in results if isinstance(r, SampledToken)]


def processed(row: torch.Tensor, wanted: SampleSpec) -> torch.Tensor:
    """What the sampler's docstring promises, step by step, in transformers' own code where it has one: [V] float32."""
    params = wanted.params
    scores = row.clone()[None]
    for token, bias in params.logit_bias:
        scores[0, token] += bias
    scores[0, list(wanted.banned_token_ids)] = -torch.inf
    context = torch.tensor([[*wanted.prompt_token_ids, *wanted.output_token_ids]])
    if params.repetition_penalty != 1.0:
        scores = RepetitionPenaltyLogitsProcessor(params.repetition_penalty)(context, scores)
    for token in set(wanted.output_token_ids):
        count = list(wanted.output_token_ids).count(token)
        scores[0, token] -= params.presence_penalty + params.frequency_penalty * count
    if params.temperature < 1e-5:
        return scores[0]
    warpers = LogitsProcessorList([TemperatureLogitsWarper(params.temperature)])
    if params.top_k:
        warpers.append(TopKLogitsWarper(params.top_k))
    if params.min_p:
        warpers.append(MinPLogitsWarper(params.min_p))
    if params.top_p < 1.0:
        warpers.append(TopPLogitsWarper(params.top_p))
    return warpers(context, scores)[0]


def reference(row: torch.Tensor, wanted: SampleSpec) -> int:
    scores = processed(row, wanted)
    params = wanted.params
    if params.temperature < 1e-5:
        return int(scores.argmax())
    cumulative = scores.double().softmax(0).cumsum(0)
    u = float(uniform(params.seed, params.choice, wanted.output_index, Purpose.SAMPLE)[0])
    return int(torch.searchsorted(cumulative, torch.tensor([u * cumulative[-1]]), right=True)[0])


CASES: dict[str, dict[str, object]] = {
    "greedy": {"temperature": 0.0},
    "nearly greedy": {"temperature": 9e-6},
    "plain": {},
    "cold": {"temperature": 0.2},
    "very cold": {"temperature": 2e-5},
    "hot": {"temperature": 5.0},
    "top_k": {"top_k": 12},
    "top_k 1": {"top_k": 1},
    "top_p": {"top_p": 0.8},
    "tiny top_p": {"top_p": 1e-6},
    "min_p": {"min_p": 0.1},
    "all three": {"top_k": 40, "min_p": 0.02, "top_p": 0.9, "temperature": 1.7},
    "repetition": {"repetition_penalty": 1.8},
    "encouraged repetition": {"repetition_penalty": 0.4},
    "presence": {"presence_penalty": 2.0},
    "frequency": {"frequency_penalty": -1.5},
    "bias": {"logit_bias": ((17, 6.0), (3, -6.0), (299, 5.0))},
    "greedy with penalties": {"temperature": 0.0, "repetition_penalty": 1.5, "frequency_penalty": 0.7},
    "everything": {
        "temperature": 0.8,
        "top_k": 60,
        "top_p": 0.95,
        "min_p": 0.01,
        "repetition_penalty": 1.3,
        "presence_penalty": 0.5,
        "frequency_penalty": 0.5,
        "logit_bias": ((17, 3.0), (250, 3.0)),
    },
}


@pytest.mark.parametrize("name", CASES)
def test_tokens_are_the_references(name: str) -> None:
    rows = logits(40, seed=len(name))
    specs = [
        spec(i, seed=100 + i, choice=i % 3, banned=(i, 299 - i) if i % 2 else (), **CASES[name]) for i in range(40)
    ]
    found = tokens(sample(rows, specs))
    assert found == [reference(row, wanted) for row, wanted in zip(rows, specs, strict=True)]


def test_a_row_does_not_depend_on_its_batch() -> None:
    """The same rows alone, in order, in reverse, and in one batch of every kind."""
    rows = logits(len(CASES), seed=7, size=1000)
    specs = [spec(i, seed=i, top_logprobs=2, **fields) for i, fields in enumerate(CASES.values())]
    together = sample(rows, specs)
    alone = [sample(rows[i : i + 1], [specs[i]])[0] for i in range(len(specs))]
    reverse = sample(rows.flip(0), specs[::-1])[::-1]
    assert together == alone == reverse


def test_the_logits_are_not_changed() -> None:
    rows = logits(len(CASES))
    before = rows.clone()
    sample(rows, [spec(i, banned=(1,), **fields) for i, fields in enumerate(CASES.values())])
    assert torch.equal(rows, before)


def test_same_seed_same_tokens_and_each_coordinate_matters() -> None:
    rows = logits(1, size=2000).expand(64, -1) * 0.1

    def drawn(seed: int, choice: int) -> list[int]:
        return tokens(sample(rows, [spec(i, seed=seed, choice=choice) for i in range(64)]))

    assert drawn(1, 0) == drawn(1, 0)
    assert len({tuple(drawn(1, 0)), tuple(drawn(2, 0)), tuple(drawn(1, 1)), tuple(drawn(1 + 2**32, 0))}) == 4
    assert len(set(drawn(1, 0))) > 40


@pytest.mark.parametrize("name", ["plain", "cold", "hot", "top_k", "top_p", "min_p", "all three", "everything"])
def test_distribution_by_chi_square(name: str) -> None:
    """6,000 draws of consecutive output indices against the reference's probabilities, at the 0.999 quantile."""
    n, row = 6_000, logits(1, seed=11)
    specs = [spec(i, seed=2024, **CASES[name]) for i in range(n)]
    counts = np.zeros(V)
    for start in range(0, n, 2000):
        part = specs[start : start + 2000]
        counts += np.bincount(tokens(sample(row.expand(len(part), -1), part)), minlength=V)
    expected = processed(row[0], specs[0]).double().softmax(0).numpy() * n
    assert counts[expected == 0].sum() == 0
    common = expected >= 5
    observed = np.append(counts[common], counts[~common].sum())
    predicted = np.append(expected[common], expected[~common].sum())
    observed, predicted = observed[predicted > 0], predicted[predicted > 0]
    statistic, freedom = ((observed - predicted) ** 2 / predicted).sum(), len(predicted) - 1
    # Wilson and Hilferty's approximation of the chi-square quantile, at z = 3.09.
    limit = freedom * (1 - 2 / (9 * freedom) + 3.09 * np.sqrt(2 / (9 * freedom))) ** 3
    assert statistic < limit


def test_greedy_takes_the_lowest_id_on_ties() -> None:
    row = torch.zeros((1, V))
    row[0, [40, 7, 299]] = 2.5
    assert tokens(sample(row, [spec(temperature=0.0)])) == [7]
    assert tokens(sample(row, [spec(temperature=0.0, banned=(7,))])) == [40]


def test_logprobs_are_of_the_raw_distribution() -> None:
    rows = logits(len(CASES), seed=3)
    specs = [spec(i, top_logprobs=20, **fields) for i, fields in enumerate(CASES.values())]
    expected = rows.double().log_softmax(1)
    for r, result in enumerate(sample(rows, specs)):
        assert isinstance(result, SampledToken)
        assert result.logprob == pytest.approx(float(expected[r, result.token_id]), abs=1e-5)
        values, ids = expected[r].topk(20)
        assert [token for token, _ in result.top] == ids.tolist()
        assert [logprob for _, logprob in result.top] == pytest.approx(values.tolist(), abs=1e-5)


def test_asking_for_logprobs_does_not_change_the_token() -> None:
    rows = logits(len(CASES), seed=5)
    plain = [spec(i, seed=9, **fields) for i, fields in enumerate(CASES.values())]
    asking = [s._replace(params=replace(s.params, top_logprobs=i % 3)) for i, s in enumerate(plain)]
    without, with_logprobs = sample(rows, plain), sample(rows, asking)
    assert tokens(without) == tokens(with_logprobs)
    for i, (bare, result) in enumerate(zip(without, with_logprobs, strict=True)):
        assert isinstance(bare, SampledToken)
        assert isinstance(result, SampledToken)
        assert (bare.logprob, bare.top) == (None, ())
        assert result.logprob is not None
        assert len(result.top) == i % 3


def test_top_logprobs_ties_go_by_lower_id_and_skip_impossible_tokens() -> None:
    row = torch.full((1, V), -torch.inf)
    row[0, [9, 4, 200]] = torch.tensor([1.0, 1.0, 2.0])
    [result] = sample(row, [spec(temperature=0.0, top_logprobs=5)])
    assert isinstance(result, SampledToken)
    assert [token for token, _ in result.top] == [200, 4, 9]


def test_logit_bias_of_100_forces_and_of_minus_100_bans() -> None:
    rows = logits(1).expand(200, -1)
    forced = tokens(sample(rows, [spec(i, logit_bias=((42, 100.0),)) for i in range(200)]))
    assert set(forced) == {42}
    likely = tokens(sample(rows, [spec(i) for i in range(200)]))
    bias = tuple((token, -100.0) for token in set(likely))
    others = tokens(sample(rows, [spec(i, logit_bias=bias) for i in range(200)]))
    assert not set(others) & set(likely)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_banned_tokens_never_come_whatever_their_bias(temperature: float) -> None:
    rows = logits(1).expand(100, -1)
    banned = tuple(range(0, V, 2))
    specs = [spec(i, temperature=temperature, logit_bias=((2, 100.0),), banned=(*banned, 10**6)) for i in range(100)]
    assert all(token % 2 for token in tokens(sample(rows, specs)))


def test_presence_and_frequency_penalties_leave_the_prompt_alone() -> None:
    row = torch.zeros((1, V))
    row[0, 80], row[0, 3] = 5.0, 6.0  # 80 is in the prompt only, 3 in the output
    assert tokens(sample(row, [spec(temperature=0.0)])) == [3]
    for fields in ({"presence_penalty": 2.0}, {"frequency_penalty": 0.5}):
        assert tokens(sample(row, [spec(temperature=0.0, **fields)])) == [80]
    assert tokens(sample(row, [spec(temperature=0.0, repetition_penalty=2.0, output=())])) == [3]


def test_context_ids_that_the_vocabulary_lacks_are_passed_over() -> None:
    row = logits(1)
    fields = {"temperature": 0.0, "repetition_penalty": 1.5, "presence_penalty": 1.0}
    assert tokens(sample(row, [spec(output=(*OUTPUT, V + 3), **fields)])) == tokens(sample(row, [spec(**fields)]))


def test_rows_that_cannot_be_sampled_fail_alone() -> None:
    rows = logits(9, seed=8)
    rows[1, 5] = torch.nan
    rows[2, 5] = torch.nan
    rows[3] = -torch.inf
    rows[4, 6] = torch.inf
    specs = [
        spec(0),
        spec(1, temperature=0.0),
        spec(2, top_p=0.9),
        spec(3, temperature=0.0),
        spec(4),
        spec(5, banned=tuple(range(V))),
        spec(6, logit_bias=((V, 1.0),)),
        spec(7, temperature=0.0),
        spec(8, top_logprobs=1),
    ]
    results = sample(rows, specs)
    reasons = [r.reason if isinstance(r, SampleFailure) else "" for r in results]
    words = ["", "NaN", "NaN", "-inf", "+inf", "-inf", f"logit_bias: token id {V}", "", ""]
    assert [bool(reason) for reason in reasons] == [bool(word) for word in words]
    assert all(word in reason for word, reason in zip(words, reasons, strict=True))
    for r in (0, 7, 8):
        assert sample(rows[r : r + 1], [specs[r]]) == [results[r]]


@pytest.mark.parametrize("params", [{}, {"temperature": 0.0}, {"repetition_penalty": 1.2}, {"top_logprobs": 2}])
def test_a_ban_does_not_hide_what_is_not_a_number(params: dict[str, Any]) -> None:
    rows = logits(2)
    rows[0, 5] = float("nan")
    failed, fine = sample(rows, [spec(0, banned=(5,), **params), spec(1, banned=(5,), **params)])
    assert isinstance(failed, SampleFailure)
    assert "NaN" in failed.reason
    assert isinstance(fine, SampledToken)


def test_strided_rows_are_taken() -> None:
    wide = logits(6, size=2 * V)[::2, :V]
    warm = [spec(i, seed=i) for i in range(3)]
    assert sample(wide, warm) == sample(wide.contiguous(), warm)


def test_wrong_shapes_are_refused_and_an_empty_batch_is_empty() -> None:
    assert sample(torch.zeros((0, V)), []) == []
    for bad in (torch.zeros(V), torch.zeros((2, V)), torch.zeros((1, 0))):
        with pytest.raises(ValueError, match="logits: shape"):
            sample(bad, [spec()])


def test_rows_drawn_by_compiled_code_are_the_same() -> None:
    """With every cut, also behind penalties; what it refuses is named as numpy's path names it."""
    from tandem.kernels.compiled.sampling import RowSampler

    rows = logits(120).numpy()
    fields = [{}, {"temperature": 0.7}, {"repetition_penalty": 1.3}, {"top_p": 0.8}, {"top_k": 9}, {"min_p": 0.1}]
    specs = [spec(i, seed=i, **fields[i % len(fields)]) for i in range(120)]
    assert Sampler(RowSampler(V)).sample(rows, specs) == Sampler().sample(rows, specs)
    rows[5], rows[6], rows[7, 9] = np.nan, -np.inf, np.inf
    assert Sampler(RowSampler(V)).sample(rows, specs) == Sampler().sample(rows, specs)


def test_logprobs_by_compiled_code_are_numpys() -> None:
    from tandem.kernels.compiled.sampling import RowSampler

    rows = logits(6).numpy()
    rows[2, 3] = np.inf
    specs = [spec(i, seed=i, temperature=i % 2, top_logprobs=None if i == 1 else i) for i in range(6)]
    for found, expected in zip(Sampler(RowSampler(V)).sample(rows, specs), Sampler().sample(rows, specs), strict=True):
        if isinstance(expected, SampleFailure):
            assert found == expected
            continue
        assert isinstance(found, SampledToken)
        assert found.token_id == expected.token_id
        assert found.logprob == pytest.approx(expected.logprob, abs=1e-5)
        assert [i for i, _ in found.top] == [i for i, _ in expected.top]

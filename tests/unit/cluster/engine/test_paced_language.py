"""The paced device's make-believe model: a rolling hash in the KV, and tokens that are a function of it."""

from __future__ import annotations

import numpy as np
import pytest
from tandem.cluster.engine.devices.paced_language import MULTIPLIER, ROOT, PacedLanguage, chain, expected_tokens
from tandem.cluster.types import SamplingParams

VOCAB = 1000
PROMPT = [7, 3, 999, 0, 0, 12, 5, 8, 1]
PINNED_GREEDY = (125, 506, 216, 660, 812, 339)
PINNED_SEEDED = (57, 479, 438, 995, 788, 702)


def test_tokens_are_pinned_across_platforms() -> None:
    assert expected_tokens(PROMPT, 6, vocab_size=VOCAB) == PINNED_GREEDY
    params = SamplingParams(temperature=1.0, seed=2**63 + 5, choice=1)
    assert expected_tokens(PROMPT, 6, params, vocab_size=VOCAB) == PINNED_SEEDED


def test_seed_choice_and_index_matter_only_above_temperature_zero() -> None:
    def tokens(**fields: object) -> tuple[int, ...]:
        return expected_tokens(PROMPT, 8, SamplingParams(**fields), vocab_size=VOCAB)  # type: ignore[arg-type]

    assert tokens(temperature=0.0, seed=1) == tokens(temperature=0.0, seed=2, choice=3)
    assert tokens(seed=1) == tokens(seed=1)
    assert len({tokens(seed=1), tokens(seed=2), tokens(seed=1, choice=1), tokens(temperature=0.0)}) == 4


def test_every_token_of_the_context_matters() -> None:
    usual = expected_tokens(PROMPT, 1, vocab_size=2**31)
    for position in range(len(PROMPT)):
        changed = [*PROMPT]
        changed[position] += 1
        assert expected_tokens(changed, 1, vocab_size=2**31) != usual
    assert expected_tokens([0, *PROMPT], 1, vocab_size=2**31) != usual


def test_keys_are_the_rolling_hash_of_the_values() -> None:
    """Against the recurrence in plain integers."""
    values = np.random.default_rng(0).integers(0, 2**64, 300, dtype=np.uint64)
    for count in (0, 1, 2, 3, 128, 129, 300):
        key, expected = int(ROOT), []
        for value in values[:count].tolist():
            key = (key * int(MULTIPLIER) + value) % 2**64
            expected.append(key)
        assert chain(ROOT, values[:count]).tolist() == expected


def test_end_of_sequence_never_comes_unless_configured() -> None:
    tokens = expected_tokens([1], 200, vocab_size=4, eos_token_ids=(2, 3))
    assert len(tokens) == 200
    assert set(tokens) == {0, 1}


def test_end_of_sequence_comes_with_its_probability_and_not_before_min_tokens() -> None:
    lengths = []
    for seed in range(60):
        params = SamplingParams(seed=seed, min_tokens=3)
        tokens = expected_tokens([1], 50, params, vocab_size=VOCAB, eos_token_ids=(2,), eos_probability=0.2)
        assert 2 not in tokens[:-1]
        assert len(tokens) == 50 or tokens[-1] == 2
        lengths.append(len(tokens))
    assert min(lengths) >= 4
    assert 5 < np.mean(lengths) < 12
    ignored = SamplingParams(seed=1, ignore_eos=True)
    tokens = expected_tokens([1], 50, ignored, vocab_size=VOCAB, eos_token_ids=(2,), eos_probability=0.2)
    assert len(tokens) == 50
    assert 2 in tokens


def test_stop_tokens_end_a_generation_and_respect_min_tokens() -> None:
    free = expected_tokens(PROMPT, 8, vocab_size=VOCAB)
    stopped = SamplingParams(temperature=0.0, stop_token_ids=(free[2],))
    assert expected_tokens(PROMPT, 8, stopped, vocab_size=VOCAB) == free[:3]
    later = SamplingParams(temperature=0.0, stop_token_ids=(free[2],), min_tokens=4)
    tokens = expected_tokens(PROMPT, 8, later, vocab_size=VOCAB)
    assert len(tokens) >= 5
    assert free[2] not in tokens[:4]


def test_a_total_ban_is_an_error() -> None:
    params = SamplingParams(temperature=0.0, min_tokens=1, stop_token_ids=(0, 1))
    with pytest.raises(ValueError, match="no token"):
        expected_tokens([1], 1, params, vocab_size=2)


def test_bad_vocabularies_are_refused() -> None:
    for size in (0, 2**32 + 1):
        with pytest.raises(ValueError, match="vocab_size"):
            PacedLanguage(vocab_size=size)

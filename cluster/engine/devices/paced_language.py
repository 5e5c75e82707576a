"""The make-believe model of the paced device: what stands in a KV slot, and which token follows a context. Pure.

A slot holds two 64-bit words per token, so that every mistake in moving KV shows:

    value[p] = mix(token[p], p)                       which token was computed at which position
    key[p]   = A · key[p-1] + value[p]  (mod 2**64)   a rolling hash of the whole prefix; key[-1] = ROOT

The next token is a function of the last key, and, where the temperature is not 0, of the Philox uniform of (seed,
choice, output index): so it depends on every token of the context, and a correct system of any shape gives
`expected_tokens`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ....kernels.philox import Purpose, uniform_batch
from ...types import SampledToken, SamplingParams
from ..plan import SampleSpec

U64 = np.dtype("<u8")
ROOT = np.uint64(0x6A09E667F3BCC908)
MULTIPLIER = np.uint64(0xD1342543DE82EF95)
_INVERSE = np.uint64(pow(0xD1342543DE82EF95, -1, 2**64))
_SALT = np.uint64(0x9E3779B97F4A7C15)
_DRAW = np.uint64(0xBB67AE8584CAA73B)
_STOP = np.uint64(0x3C6EF372FE94F82B)
_LOGPROB = np.uint64(0xA54FF53A5F1D36F1)
_GREEDY_TEMPERATURE = 1e-5


def mix64(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64's finalizer (Steele et al. 2014): a bijection of 64-bit words in which every input bit matters."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def slot_values(token_ids: NDArray[np.uint64], positions: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The value words of tokens at positions, both [T] and below 2**32; never 0, so an unwritten slot cannot pass."""
    return mix64(((token_ids << np.uint64(32)) | positions) + _SALT)


def chain(previous: np.uint64, values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The key words [T] that follow the key `previous` when `values` [T] are appended.

    The recurrence has the closed form A**(i+1) · (previous + Σ values[j] · A**-(j+1)), which vectorizes.
    """
    count = values.shape[0]
    powers, inverses = _powers(1 << max(count - 1, 0).bit_length())
    sums = np.cumsum(values * inverses[:count], dtype=U64)
    return (sums + previous) * powers[:count]


@functools.lru_cache(maxsize=32)
def _powers(count: int) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    """A**1…A**count and A**-1…A**-count."""
    return np.cumprod(np.full(count, MULTIPLIER), dtype=U64), np.cumprod(np.full(count, _INVERSE), dtype=U64)


@dataclass(frozen=True, slots=True, kw_only=True)
class PacedLanguage:
    """Which tokens the paced device draws.

    End-of-sequence tokens come only with probability `eos_probability` per token (then the first of `eos_token_ids`),
    so by default a generation ends by its max_tokens.
    """

    vocab_size: int
    eos_token_ids: tuple[int, ...] = ()
    eos_probability: float = 0.0

    def __post_init__(self) -> None:
        if not 1 <= self.vocab_size <= 2**32:
            raise ValueError(f"vocab_size: {self.vocab_size} is not in 1…2**32")
        if not 0.0 <= self.eos_probability <= 1.0:
            raise ValueError(f"eos_probability: {self.eos_probability} is not in 0…1")
        if self.eos_probability > 0.0 and not self.eos_token_ids:
            raise ValueError("eos_token_ids: none is given, but eos_probability is above 0")
        if any(not 0 <= token < self.vocab_size for token in self.eos_token_ids):
            raise ValueError(f"eos_token_ids: {self.eos_token_ids} are not all in 0…{self.vocab_size - 1}")

    def draw(self, keys: NDArray[np.uint64], specs: Sequence[SampleSpec]) -> list[SampledToken | None]:
        """The token that follows each of R contexts: `keys` [R] are the keys of their last positions.

        Bans, seeds and requests for logprobs are honored (logprobs are made up, but deterministic); penalties,
        truncation and logit_bias have nothing to act on. None where bans leave no token.
        """
        state = mix64(keys ^ _DRAW)
        warm = [r for r, spec in enumerate(specs) if spec.params.temperature >= _GREEDY_TEMPERATURE]
        if warm:
            drawn = [specs[r] for r in warm]
            seeds = [spec.params.seed for spec in drawn]
            choices = [spec.params.choice for spec in drawn]
            uniforms = uniform_batch(seeds, choices, [spec.output_index for spec in drawn], Purpose.SAMPLE)[:, 0]
            state[warm] = mix64(state[warm] ^ (uniforms * 2.0**53).astype(U64))
        tokens = (state % np.uint64(self.vocab_size)).tolist()
        stops = (mix64(state ^ _STOP) >> np.uint64(11)) * 2.0**-53 < self.eos_probability
        return [
            self._finish(int(token), bool(stop), int(word), spec)
            for token, stop, word, spec in zip(tokens, stops, state, specs, strict=True)
        ]

    def _finish(self, token: int, stop: bool, word: int, spec: SampleSpec) -> SampledToken | None:
        if stop and self.eos_token_ids[0] not in spec.banned_token_ids:
            token = self.eos_token_ids[0]
        elif self.eos_token_ids or spec.banned_token_ids:
            avoided = {*self.eos_token_ids, *spec.banned_token_ids}
            if len(avoided) >= self.vocab_size and avoided.issuperset(range(self.vocab_size)):
                return None
            while token in avoided:
                token = (token + 1) % self.vocab_size
        top = spec.params.top_logprobs
        if top is None:
            return SampledToken(token)
        logprob = -(((word ^ int(_LOGPROB)) >> 11) * 2.0**-53)
        count = min(top, self.vocab_size)
        return SampledToken(
            token, logprob, tuple(((token + i) % self.vocab_size, logprob - 0.5 * i) for i in range(count))
        )


def expected_tokens(
    prompt_token_ids: Sequence[int],
    n: int,
    params: SamplingParams | None = None,
    *,
    vocab_size: int,
    eos_token_ids: tuple[int, ...] = (),
    eos_probability: float = 0.0,
    output_token_ids: Sequence[int] = (),
) -> tuple[int, ...]:
    """What a correct system on paced devices returns: at most `n` tokens after `output_token_ids`, for tests.

    Ends early after an end-of-sequence token (unless `params.ignore_eos`) or one of `params.stop_token_ids`, which is
    the last token returned; neither comes before `params.min_tokens`. `params` None: greedy.
    """
    params = SamplingParams(temperature=0.0, max_tokens=n) if params is None else params
    language = PacedLanguage(vocab_size=vocab_size, eos_token_ids=eos_token_ids, eos_probability=eos_probability)
    stops = (() if params.ignore_eos else eos_token_ids) + params.stop_token_ids
    prompt, output = tuple(prompt_token_ids), list(output_token_ids)
    context = np.array([*prompt, *output], dtype=U64)
    key = chain(ROOT, slot_values(context, np.arange(context.shape[0], dtype=U64)))[-1:]
    drawn: list[int] = []
    while len(drawn) < n and not (drawn and drawn[-1] in stops):
        banned = stops if len(output) < params.min_tokens else ()
        [token] = language.draw(key, [SampleSpec(params, len(output), prompt, tuple(output), banned)])
        if token is None:
            raise ValueError("params: bans leave no token to draw")
        drawn.append(token.token_id)
        value = slot_values(np.array([token.token_id], dtype=U64), np.array([len(prompt) + len(output)], dtype=U64))
        key = key * MULTIPLIER + value
        output.append(token.token_id)
    return tuple(drawn)

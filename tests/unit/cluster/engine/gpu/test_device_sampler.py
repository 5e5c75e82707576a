"""The device's draws are the processor's: the same tokens, logprobs and failures for the same rows."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tandem.cluster.engine.gpu.contexts import Contexts
from tandem.cluster.engine.gpu.sampling import DeviceSampler
from tandem.cluster.engine.plan import SampleSpec
from tandem.cluster.engine.sampler import SampleFailure, Sampler
from tandem.cluster.types import SampledToken, SamplingParams
from tandem.kernels.dispatch import gpu_operations

V, TILE = 300, 64
PROMPT = (5, 17, 17, 80, 200, 299, 400)
Row = tuple[str, SampleSpec]


def row(seq_id: str, outputs: Sequence[int] = (), banned: tuple[int, ...] = (), **params: object) -> Row:
    return seq_id, SampleSpec(SamplingParams(**params), len(outputs), PROMPT, outputs, banned)  # type: ignore[arg-type]


class Rig:
    """A sampler with the memory that its device would give it."""

    def __init__(self, where: str, kernels: str = "triton", max_rows: int = 16) -> None:
        self.device = torch.device(where)
        self.sampler = DeviceSampler(V, max_rows, self.device, gpu_operations(kernels), tile=TILE)
        self.columns = torch.zeros(self.sampler.input_bytes, dtype=torch.uint8, device=self.device)
        self.sampler.bind(self.columns)

    def sample(self, logits: NDArray[np.float32], rows: Sequence[Row]) -> list[SampledToken | SampleFailure]:
        buffer = np.full(self.sampler.input_bytes, 255, dtype=np.uint8)
        draws = self.sampler.pack(rows, buffer)
        self.columns.copy_(torch.from_numpy(buffer))
        with np.errstate(invalid="ignore"):
            tokens = self.sampler.draw(draws, torch.from_numpy(logits.copy()).to(self.device))
        self.settle()
        drawn = self.sampler.read(draws)
        for token, given in zip(drawn, tokens.tolist(), strict=True):
            assert not isinstance(token, SampledToken) or token.token_id == given
        return drawn

    def settle(self) -> None:
        """`read` wants the device to be done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def compare(found: Sequence[SampledToken | SampleFailure], expected: Sequence[SampledToken | SampleFailure]) -> None:
    """Equal, logprobs within the rounding of a normalizer."""
    for one, other in zip(found, expected, strict=True):
        if isinstance(other, SampleFailure) or isinstance(one, SampleFailure):
            assert one == other
            continue
        assert one.token_id == other.token_id
        assert (one.logprob is None) == (other.logprob is None)
        assert one.logprob == pytest.approx(other.logprob, abs=1e-6)
        assert [token for token, _ in one.top] == [token for token, _ in other.top]
        assert [value for _, value in one.top] == pytest.approx([value for _, value in other.top], abs=1e-6)


def logits(rows: int, seed: int = 0) -> NDArray[np.float32]:
    return (np.random.default_rng(seed).standard_normal((rows, V)) * 3).astype(np.float32)


OUTPUT = (3, 17, 250, 3, 3, 300)
ROWS = [
    row("greedy", temperature=0.0),
    row("almost", temperature=9.999e-6, top_k=3, seed=1),
    row("drawn", seed=2**64 - 1, choice=3, top_logprobs=0),
    row("cut", seed=7, temperature=0.7, top_k=40, min_p=0.01, top_p=0.9, top_logprobs=5),
    row("likely", seed=11, temperature=3.0, min_p=0.9),
    row("biased", temperature=0.0, logit_bias=((9, 50.0), (299, -100.0)), top_logprobs=2),
    row("banned", OUTPUT, (9, 3, 10**6), temperature=0.0, logit_bias=((9, 100.0),)),
    row("repeats", OUTPUT, temperature=0.0, repetition_penalty=1.7, top_logprobs=3),
    row("costs", OUTPUT, seed=5, presence_penalty=0.3, frequency_penalty=-1.1),
    row("all", OUTPUT, (17,), seed=6, repetition_penalty=0.8, presence_penalty=2.0, frequency_penalty=1.9,
        logit_bias=((3, 4.0), (250, -3.5)), top_k=20, top_logprobs=4),
    row("outside", logit_bias=((V, 1.0),), temperature=0.0),
]  # fmt: skip


def test_every_kind_of_row_is_the_processors(where: str, kernels: str) -> None:
    z = logits(len(ROWS))
    compare(Rig(where, kernels).sample(z, ROWS), Sampler().sample(z, [spec for _, spec in ROWS]))


def test_failures_are_the_processors_and_stay_in_their_rows(where: str, kernels: str) -> None:
    rows = [row(str(r), OUTPUT, (4,), temperature=r % 2, frequency_penalty=0.5, top_logprobs=1) for r in range(6)]
    rows += [row("plain", top_logprobs=1), row("outside", logit_bias=((V, 1.0),)), row("fine", temperature=0.0)]
    z = logits(len(rows))
    z[0, 4], z[1, 299], z[2, 4], z[3] = np.nan, np.nan, np.inf, -np.inf
    z[4] = -np.inf
    z[4, 4] = 1.0  # what is banned is all there is
    z[6, 0], z[7, 0] = np.inf, np.nan
    with np.errstate(invalid="ignore"):
        expected = Sampler().sample(z, [spec for _, spec in rows])
    found = Rig(where, kernels).sample(z, rows)
    assert [type(token) for token in expected] == [SampleFailure] * 5 + [SampledToken] + [SampleFailure] * 2 + [
        SampledToken
    ]
    compare(found, expected)


def test_penalties_follow_a_sequence(where: str) -> None:
    """Step after step with the scheduler's own list, another sequence coming between, and one that starts over."""
    rig, outputs, expected = Rig(where), [], []
    wants = {"repetition_penalty": 1.3, "presence_penalty": 0.7, "frequency_penalty": 0.4, "temperature": 0.0}
    z = np.round(logits(1, 4) / 3).astype(np.float32)  # close calls, so that a penalty decides
    for step in range(6):
        rows = [row("a", outputs, **wants)] + [row("b", (1, 2), **wants)] * (step % 2)
        both = np.repeat(z, len(rows), axis=0)
        found = rig.sample(both, rows)
        compare(found, Sampler().sample(both, [spec for _, spec in rows]))
        assert isinstance(found[0], SampledToken)
        outputs.append(found[0].token_id)
        expected.append(found[0].token_id)
    assert len(set(expected)) > 1
    again = [row("a", [7], **wants)]
    compare(rig.sample(z, again), Sampler().sample(z, [spec for _, spec in again]))


def test_steps_may_overlap_up_to_a_depth(where: str) -> None:
    rig = Rig(where)
    buffer = np.zeros(rig.sampler.input_bytes, dtype=np.uint8)
    z = torch.from_numpy(logits(2)).to(rig.device)
    packed = []
    for seed in (1, 2):
        draws = rig.sampler.pack([row("a", seed=seed, top_logprobs=2), row("b", seed=seed, top_k=2)], buffer)
        rig.columns.copy_(torch.from_numpy(buffer))
        rig.sampler.draw(draws, z)
        packed.append(draws)
    with pytest.raises(AssertionError, match="an older step"):
        rig.sampler.pack([row("a")], buffer)
    rig.settle()
    for seed, draws in zip((1, 2), packed, strict=True):
        specs = [row("a", seed=seed, top_logprobs=2)[1], row("b", seed=seed, top_k=2)[1]]
        compare(rig.sampler.read(draws), Sampler().sample(z.cpu().numpy(), specs))


def test_contexts_are_bounded_and_count_what_is_new() -> None:
    contexts = Contexts(V, 2)
    outputs = [3, 3]
    seq_id, spec = row("a", outputs, frequency_penalty=0.5, repetition_penalty=2.0)
    first = contexts.of(seq_id, spec)
    assert sorted(first.ids.tolist()) == [3, 5, 17, 80, 200, 299]
    assert first.penalties[first.ids.tolist().index(3)] == 1.0
    outputs += [3, 8, 10**6]
    again = contexts.of(seq_id, spec)
    assert again is first
    told = dict(zip(again.ids.tolist(), again.penalties.tolist(), strict=True))
    assert told == {5: 0, 17: 0, 80: 0, 200: 0, 299: 0, 3: 1.5, 8: 0.5}
    outputs[:] = [3, 8]  # another history under the same name
    anew = contexts.of(seq_id, spec)
    assert anew is not first
    for other in "bc":
        contexts.of(*row(other, presence_penalty=1.0))
    assert contexts.of(seq_id, spec) is not anew  # pushed out


def test_a_context_grows_beyond_its_room() -> None:
    outputs = list(range(V))
    context = Contexts(V, 1).of(*row("a", outputs, presence_penalty=0.25))
    assert context.ids.tolist() == outputs
    assert set(context.penalties.tolist()) == {0.25}

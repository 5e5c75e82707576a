"""What benchmarks hold our kernels against is asked for the same thing: a stand-in for FlashInfer, which does plainly
what its documentation says, must find the same numbers.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[3] / "gpu"))

import bench_rows
import bench_sampling
import flashinfer_rival
from measure import Case, LeftOutError
from tandem.kernels.gpu_plans.draws import Penalties

TOKENS = 18


def _rotated(x: torch.Tensor, positions: torch.Tensor, size: int, table: torch.Tensor) -> torch.Tensor:
    cos, sin = table[positions.long()].chunk(2, 1)
    heads = x.view(len(x), -1, size).float()
    a, b = heads.chunk(2, 2)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat((a * cos - b * sin, b * cos + a * sin), 2).reshape(x.shape).to(x.dtype)


def _rotate_inplace(positions: Any, q: Any, k: Any, size: int, table: Any) -> None:
    q.copy_(_rotated(q, positions, size, table))
    k.copy_(_rotated(k, positions, size, table))


def _append(k: Any, v: Any, rows: Any, positions: Any, layer: Any, pages: Any, firsts: Any, last: Any, how: Any):
    assert how == "HND"
    held = (firsts[1:] - firsts[:-1] - 1) * layer.shape[3] + last
    for token, (row, position) in enumerate(zip(rows.tolist(), positions.tolist(), strict=True)):
        assert position < held[row]
        page, slot = divmod(position, layer.shape[3])
        block = int(pages[firsts[row] + page])
        layer[block, 0, :, slot], layer[block, 1, :, slot] = k[token], v[token]


def _verify(draft: torch.Tensor, drafted: torch.Tensor, target: torch.Tensor, **drawn: torch.Tensor) -> tuple[Any, ...]:
    """Where the two agree all is accepted, then one more is drawn."""
    assert torch.equal(draft, target[:, :-1])
    return torch.cat((drafted, target[:, -1:].argmax(-1).int()), 1), None, None


@pytest.fixture
def _flashinfer(monkeypatch: pytest.MonkeyPatch) -> None:
    both = lambda positions, q, k, size, table: tuple(_rotated(x, positions, size, table) for x in (q, k))  # noqa: E731
    modules = {
        "": {
            "apply_rope_with_cos_sin_cache": both,
            "apply_rope_with_cos_sin_cache_inplace": _rotate_inplace,
            "append_paged_kv_cache": _append,
        },
        "sampling": {"chain_speculative_sampling": _verify},
    }
    monkeypatch.setattr(flashinfer_rival, "is_here", lambda: True)
    monkeypatch.setattr(flashinfer_rival, "_flashinfer", lambda name="": SimpleNamespace(**modules[name]))


def _theirs(cases: list[Case]) -> Iterator[Case]:
    return (case for case in cases if case.who == "FlashInfer")


@pytest.mark.usefixtures("_flashinfer")
def test_flashinfer_is_asked_for_what_our_kernels_compute(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_rows, "HEADS", 4)
    monkeypatch.setattr(bench_rows, "KV_HEADS", 2)
    monkeypatch.setattr(bench_sampling, "SIZE", 50)
    cases = [*bench_rows._kv_write(TOKENS, device), *bench_rows._rotary(TOKENS, device)]
    cases += bench_sampling._verified(device)
    found = list(_theirs(cases))
    assert [case.what.partition(",")[0] for case in found] == ["rotary + KV write", "rotary of q and k", "verification"]
    for case in found:
        case.run()  # raises LeftOutError where it finds something else


@pytest.mark.parametrize(
    "make", [bench_rows._norm, bench_rows._activation, bench_rows._quantize, bench_rows._layer_norm]
)
def test_what_torch_compiles_is_measured_at_the_last_size(
    make: Callable[[int, torch.device], list[Case]], device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of what it has no kernel for."""
    for name, size in (("WIDTH", 64), ("MLP", 64), ("TOKENS", (1, 2, TOKENS))):
        monkeypatch.setattr(bench_rows, name, size)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(bench_rows, "compiled", lambda run: run)
    for tokens, count in ((2, 0), (TOKENS, 1)):
        assert [case.who for case in make(tokens, device)].count("torch, compiled") == count


@pytest.mark.usefixtures("_flashinfer")
def test_a_rival_that_computes_something_else_is_left_out(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_rows, "HEADS", 4)
    monkeypatch.setattr(bench_rows, "KV_HEADS", 2)
    library = flashinfer_rival._flashinfer()
    library.append_paged_kv_cache = lambda *given: None
    monkeypatch.setattr(flashinfer_rival, "_flashinfer", lambda name="": library)
    (case,) = _theirs(bench_rows._kv_write(TOKENS, device))
    with pytest.raises(LeftOutError, match="not close"):
        case.run()


@pytest.mark.parametrize("make", [bench_sampling._all_in_one, bench_sampling._penalized])
def test_every_repetition_penalizes_the_logits_that_were_checked(
    make: Callable[[torch.Tensor], list[Case]], device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_sampling, "SIZE", 60)
    monkeypatch.setattr(bench_sampling, "CONTEXT", 7)
    logits, penalized = torch.randn(3, 60, device=device), list[torch.Tensor]()
    penalize = bench_sampling.penalize

    def watched(x: torch.Tensor, asked: Penalties) -> None:
        penalize(x, asked)
        penalized.append(x.clone())

    monkeypatch.setattr(bench_sampling, "penalize", watched)
    for case in 2 * make(logits):
        case.run()
    assert len(penalized) >= 3
    assert all(torch.equal(once, penalized[0]) for once in penalized)

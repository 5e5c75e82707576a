"""A compiled model's start: what is packed once is used again, what does not fit is packed anew, and nobody waits."""

from __future__ import annotations

import threading
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tandem.cluster.engine import compiled, compiled_weights
from tandem.cluster.engine.compiled import CompiledForward, decoder_shape
from tandem.cluster.engine.plan import SampleSpec, StepPlan, StepRow
from tandem.cluster.engine.weight_cache import WeightCache
from tandem.cluster.models.reference import ModelFiles, resolve_model
from tandem.cluster.types import SamplingParams

BLOCK_SIZE = 4


@pytest.fixture(scope="module")
def files() -> ModelFiles:
    return resolve_model("dummy:tiny-llama")


@pytest.fixture
def packed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of packed weights, where the smallest model is kept."""
    monkeypatch.setenv("TANDEM_CACHE", str(tmp_path))
    monkeypatch.setattr(compiled, "_CACHED_FROM_BYTES", 0)
    return tmp_path / "packed"


@pytest.fixture
def packings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """One entry for each time that a model is packed."""
    done: list[str] = []
    pack = compiled_weights.pack

    def counted(files: ModelFiles, shape: Any, kind: str, progress: Any) -> Any:
        done.append(kind)
        return pack(files, shape, kind, progress)

    monkeypatch.setattr(compiled_weights, "pack", counted)
    return done


def start(files: ModelFiles, kind: str = "float32", fingerprint: str = "f") -> CompiledForward:
    s = decoder_shape(files.config)
    kv = np.zeros((4, s.num_layers, 2, s.num_kv_heads, BLOCK_SIZE, s.head_dim), np.float32)
    return CompiledForward(files, kind, kv, fingerprint=fingerprint)


def logits(forward: CompiledForward) -> np.ndarray[Any, Any]:
    spec = SampleSpec(SamplingParams(temperature=0.0), 0, [], [])
    return forward.run(StepPlan(0, (StepRow("s", 0, [1, 2, 3], [0], spec),)))


@pytest.mark.parametrize("kind", ["float32", "w8a8"])
def test_the_second_start_packs_nothing(files: ModelFiles, packed: Path, packings: list[str], kind: str) -> None:
    first = logits(start(files, kind))
    assert packings == [kind]
    assert len(list(packed.glob("*.weights"))) == 1
    np.testing.assert_array_equal(logits(start(files, kind)), first)
    assert packings == [kind]
    start(files, kind, fingerprint="other")
    assert len(packings) == 2


def test_a_file_of_another_packing_is_packed_anew(
    files: ModelFiles, packed: Path, packings: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    """Sound by its digest, and yet not what these kernels read."""
    first = logits(start(files))
    (path,) = packed.glob("*.weights")
    cache = WeightCache(packed)
    arrays = dict(cache.load(path.stem) or {})
    arrays["layers.0.qkv.data"] = arrays["layers.0.qkv.data"][:-64].copy()
    assert cache.save(path.stem, arrays)
    np.testing.assert_array_equal(logits(start(files)), first)
    assert len(packings) == 2
    assert "packed anew" in caplog.text
    start(files)
    assert len(packings) == 2


def test_a_damaged_file_is_packed_anew(files: ModelFiles, packed: Path, packings: list[str]) -> None:
    first = logits(start(files))
    (path,) = packed.glob("*.weights")
    content = bytearray(path.read_bytes())
    content[-5000] ^= 1
    path.write_bytes(content)
    np.testing.assert_array_equal(logits(start(files)), first)
    assert len(packings) == 2


def test_a_full_disk_is_no_reason_not_to_start(
    files: ModelFiles, packed: Path, packings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, *_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tandem.cluster.engine.weight_cache._write", full)
    np.testing.assert_array_equal(logits(start(files)), logits(start(files)))
    assert len(packings) == 2
    assert list(packed.iterdir()) == []


def test_of_two_starts_at_once_one_packs(files: ModelFiles, packed: Path, packings: list[str]) -> None:
    forwards: list[CompiledForward] = []
    threads = [threading.Thread(target=lambda: forwards.append(start(files))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert len(forwards) == 2
    assert packings == ["float32"]


def test_a_start_with_everything_there_takes_no_lock(
    files: ModelFiles, packed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    locks: list[Path] = []
    alone = compiled.alone

    def seen(lock: Path, *options: Any) -> AbstractContextManager[None]:
        locks.append(lock)
        return alone(lock, *options)

    monkeypatch.setattr(compiled, "alone", seen)
    monkeypatch.setattr("tandem.kernels.compiled.code_cache.alone", seen)
    start(files)
    assert locks
    locks.clear()
    start(files)
    assert locks == []

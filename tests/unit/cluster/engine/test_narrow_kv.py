"""Which scales of narrow KV a rank has, where they come from, and that KV by other scales has another name."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path

import numpy as np
import pytest
from tandem.cluster.config import EngineConfig
from tandem.cluster.engine.fingerprint import fingerprint
from tandem.cluster.engine.gpu.narrow import narrow_kv
from tandem.cluster.engine.kv_scales import KVScales
from tandem.cluster.engine.narrow_kv import NarrowKV
from tandem.cluster.engine.parallel.shard import Shard
from tandem.cluster.models.reference import ModelFiles
from tandem.cluster.models.registry import CONFIGS

MODEL = dataclasses.replace(CONFIGS["tiny-llama"], num_layers=5, num_heads=8, num_kv_heads=4)
FILES = ModelFiles(name="tiny", kind="dummy", path=None, config=MODEL)
LARGEST = np.arange(1, 41, dtype=np.float32).reshape(5, 2, 4)


def test_ranks_have_the_scales_of_their_own_layers_and_heads() -> None:
    narrow = NarrowKV.by("int8", LARGEST)
    assert np.array_equal(narrow.part(Shard(config=MODEL)), LARGEST)
    for rank, (layers, head) in enumerate([(range(3), 0), (range(3), 2), (range(3, 5), 0), (range(3, 5), 2)]):
        part = narrow.part(Shard(config=MODEL, tensor_parallel=2, pipeline_stages=2, rank=rank))
        assert np.array_equal(part, LARGEST[layers.start : layers.stop, :, head : head + 2])
    shared = [narrow.part(Shard(config=MODEL, tensor_parallel=8, rank=rank)) for rank in (4, 5)]
    for part in shared:  # two ranks that hold the same head
        assert np.array_equal(part, LARGEST[:, :, 2:3])


def test_scales_of_another_model_are_refused() -> None:
    with pytest.raises(ValueError, match="kv_scales: 32 scales, allowed: 5 x 2 x 4"):
        NarrowKV.by("int8", LARGEST[:4]).part(Shard(config=MODEL))


def test_kv_that_is_held_otherwise_has_another_fingerprint() -> None:
    other = LARGEST.copy()
    other[4, 1, 3] *= 1.0001
    held = (
        None,
        NarrowKV.by("int8", LARGEST),
        NarrowKV.by("float8_e4m3", LARGEST),
        NarrowKV.by("int8", other),
    )
    names = [fingerprint(FILES, "bfloat16", None, each) for each in held]
    assert len(set(names)) == len(held)
    assert names[0] == fingerprint(FILES, "bfloat16")
    assert names[1] == fingerprint(FILES, "bfloat16", None, NarrowKV.by("int8", LARGEST.copy()))


def test_scales_are_the_files(tmp_path: Path) -> None:
    path = tmp_path / "scales.json"
    KVScales(largest=LARGEST).save(path)
    for option, dtype, most in (("int8", "int8", 127), ("fp8", "float8_e4m3", 448)):
        config = EngineConfig(device="cuda", kv_cache_dtype=option, kv_scales=str(path))
        assert narrow_kv(config, FILES) == NarrowKV.by(dtype, LARGEST / np.float32(most))
    assert narrow_kv(EngineConfig(device="cuda"), FILES) is None
    smaller = dataclasses.replace(FILES, config=dataclasses.replace(MODEL, num_kv_heads=2))
    with pytest.raises(ValueError, match=r"kv_scales: .*layer 0: keys is .*allowed: a list of 2 numbers"):
        narrow_kv(config, smaller)


def test_without_a_file_scales_are_the_checkpoints_or_one(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config = EngineConfig(device="cuda", kv_cache_dtype="fp8")
    with caplog.at_level(logging.INFO):
        assert narrow_kv(config, FILES) == NarrowKV.by("float8_e4m3", np.ones_like(LARGEST))
        monkeypatch.setattr("tandem.cluster.engine.gpu.narrow.checkpoint_scales", lambda f: KVScales(largest=LARGEST))
        assert narrow_kv(config, FILES) == NarrowKV.by("float8_e4m3", LARGEST / np.float32(448))
    ones, own = [record.getMessage() for record in caplog.records]
    assert ones.startswith("kv_cache_dtype fp8: the checkpoint has no scales; every one is 1")
    assert own == "kv_cache_dtype fp8: by the checkpoint's own scales"

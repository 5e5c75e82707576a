"""`tandem calibrate` on SmolLM2-135M itself."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tandem.cluster.cli import run
from tandem.cluster.engine.kv_scales import KVScales
from tandem.cluster.models.reference import ModelFiles
from tandem.cluster.workload.prompts import PROMPTS


def test_what_the_model_writes_is_as_large_as_real_prompts(smollm2: ModelFiles, tmp_path: Path) -> None:
    prompts, output = tmp_path / "prompts.txt", tmp_path / "scales.json"
    prompts.write_text("\n".join(" ".join(prompt.split()) for prompt in PROMPTS), encoding="utf-8")

    def largest(*options: str) -> NDArray[np.float32]:
        assert run(["calibrate", str(smollm2.path), "--tokens", "160", "--output", str(output), *options]) == 0
        return KVScales.load(output, smollm2.config).largest

    ratios = largest("--prompts", str(prompts)) / largest()
    assert ratios.shape == (30, 2, 3)
    assert 0.7 < np.median(ratios) < 1.4
    assert ratios.min() > 0.3
    assert ratios.max() < 3

"""What is said where an optional part (Ray, torch) is not installed: one line that names the extra."""

from __future__ import annotations

import sys

import pytest
from tandem.cluster import cli
from tandem.cluster.config import ConfigError, EngineConfig
from tandem.cluster.launch.compose import build_device
from tandem.cluster.models.reference import resolve_model


def test_serve_without_ray(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    assert cli.run(["serve", "--device", "paced", "--model", "dummy:tiny-llama"]) == 1
    assert capsys.readouterr().err == "tandem: Ray is not installed; pip install 'tandem-serve[cluster]'\n"


def test_the_cpu_device_without_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    files = resolve_model("dummy:tiny-llama")
    assert build_device(EngineConfig(model="dummy:tiny-llama", device="paced"), files, None).name == "paced"
    with pytest.raises(ConfigError, match=r"engine\.device: 'cpu' .*pip install 'tandem-serve\[engine\]'"):
        build_device(EngineConfig(model="dummy:tiny-llama"), files, None)

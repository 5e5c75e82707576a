"""`tandem calibrate`: the file, what it says, what it refuses, Ctrl-C."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from tandem.cluster.cli import run
from tandem.cluster.config import EngineConfig
from tandem.cluster.engine import calibrate
from tandem.cluster.engine.devices.cpu import CpuDevice
from tandem.cluster.engine.kv_scales import KVScales
from tandem.cluster.models.registry import CONFIGS
from tandem.kernels import dispatch

TINY = ["calibrate", "dummy:tiny-llama", "--kernels", "torch", "--tokens", "40"]


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_the_scales_are_saved_and_the_configuration_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(TINY) == 0
    scales = KVScales.load(Path("kv_scales.json"), CONFIGS["tiny-llama"])
    assert (scales.largest > 0).all()
    assert scales.model == "dummy:tiny-llama"
    assert "40 tokens that the model wrote itself" in scales.made_by
    told = capsys.readouterr().out
    assert "2 layers, 2 KV heads" in told
    *_, where, dtype, path = told.splitlines()
    assert "device: cuda" in where
    engine = yaml.safe_load(f"engine:\n{dtype}\n{path}")["engine"]
    assert engine["kv_cache_dtype"] in ("int8", "fp8")
    assert Path(engine["kv_scales"]) == Path("kv_scales.json").absolute()
    EngineConfig(model="dummy:tiny-llama", device="cuda", **engine)


def test_the_same_command_gives_the_same_bytes() -> None:
    assert run([*TINY, "--out", "a.json"]) == 0
    assert run([*TINY, "--output", "b.json"]) == 0
    assert run([*TINY, "--out", "c.json", "--seed", "1"]) == 0
    assert Path("a.json").read_bytes() == Path("b.json").read_bytes() != Path("c.json").read_bytes()


def test_prompts_are_text_or_json_lines() -> None:
    Path("a.txt").write_text("Hello there\n\nand here\n", encoding="utf-8")
    Path("a.jsonl").write_text(json.dumps({"prompt": "Hello there"}) + '\n"and here"\n', encoding="utf-8")
    for name in ("a.txt", "a.jsonl"):
        assert run([*TINY, "--prompts", name, "--out", f"{name}.json"]) == 0
    found = [KVScales.load(Path(f"{name}.json"), CONFIGS["tiny-llama"]) for name in ("a.txt", "a.jsonl")]
    assert found[0].digest() == found[1].digest()
    assert found[0].made_by == found[1].made_by.replace(".jsonl", ".txt")


@pytest.mark.parametrize(("tokens", "warned"), [("511", True), ("512", False)])
def test_few_tokens_are_warned_of(tokens: str, warned: bool, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*TINY, "--tokens", tokens]) == 0
    assert ("WARNING     fewer than 512 tokens" in capsys.readouterr().out) == warned


def test_a_file_that_is_replaced_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    for done in ("saved       kv_scales.json", "replaced    kv_scales.json"):
        assert run(TINY) == 0
        assert done in capsys.readouterr().out.splitlines()


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["dummy:none"], "model 'none' is not known"),
        (["--tokens", "0"], "--tokens: 0 is not allowed; allowed: 1 to 1048576"),
        (["--tokens", "many"], "--tokens: 'many' is not allowed; allowed: an integer"),
        (["--seed", "-1"], "--seed: -1 is not allowed; allowed: 0 to"),
        (["--device", "paced"], "--device: 'paced' is not allowed; allowed: cpu or cuda: the paced device computes"),
        (["--device", "cuda"], "--device: 'cuda' is not allowed; allowed: cpu: no GPU: the system has no device of"),
        (["--device", "gpu"], "--device: 'gpu' is not allowed; allowed: one of cpu, cuda, paced"),
        (["--dtype", "int8"], "--dtype: 'int8' is not allowed; allowed: one of bfloat16, float32"),
        (["--out", "nowhere/a.json"], "--out: 'nowhere/a.json' is not allowed; allowed: a file in a folder that exist"),
        (["--prompts", "nowhere.txt"], "--prompts: 'nowhere.txt' cannot be read"),
        (["--prompts", "empty.txt"], "--prompts: no token in them; allowed: texts with at least one"),
        (["--prompts", "bad.jsonl"], "--prompts: bad.jsonl:1 is not JSON"),
    ],
)
def test_wrong_input_is_named(
    options: list[str], named: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("empty.txt").write_text("\n", encoding="utf-8")
    Path("bad.jsonl").write_text("{\n", encoding="utf-8")
    command = ["calibrate", *options] if options[0].startswith("dummy") else [*TINY, *options]
    monkeypatch.setattr("sys.argv", ["tandem", *command])
    monkeypatch.setattr(dispatch, "has_gpu_driver", lambda: False)
    assert run(command) == 2
    assert named in capsys.readouterr().err
    assert not Path("kv_scales.json").exists()


def test_ctrl_c_leaves_no_file_and_no_device(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    closed = []

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    def close(device: CpuDevice) -> None:
        closed.append(device)
        real(device)

    real = CpuDevice.close
    monkeypatch.setattr(CpuDevice, "close", close)
    monkeypatch.setattr(calibrate, "measure", interrupted)
    assert run(TINY) == 130
    assert not capsys.readouterr().err
    assert len(closed) == 1
    assert not Path("kv_scales.json").exists()

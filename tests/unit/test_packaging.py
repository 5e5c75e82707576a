"""A wheel built from the tree installs elsewhere, is complete, and carries nothing that is not the package."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

PACKAGE_FOLDERS = ("cluster", "decode_worker", "kernels", "kvtransfer", "prefill_worker", "router")
BUILD_FILES = ("__init__.py", "pyproject.toml", "README.md", "LICENSE")


def packages_in_tree(root: Path) -> set[str]:
    """Every folder with Python files, by dotted name; each must have an `__init__.py`."""
    folders = {path.parent for name in PACKAGE_FOLDERS for path in (root / name).rglob("*.py")}
    folders |= {root / name for name in PACKAGE_FOLDERS}
    assert [folder for folder in folders if not (folder / "__init__.py").is_file()] == []
    return {"tandem"} | {".".join(("tandem", *folder.relative_to(root).parts)) for folder in folders}


@pytest.fixture(scope="session")
def project(repository: Path) -> dict:
    return tomllib.loads((repository / "pyproject.toml").read_text())


def run(command: list[str], cwd: Path) -> str:
    """The output of a command that must succeed. Nothing of the checkout is on its path."""
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME")}
    result = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert result.returncode == 0, f"{command} failed:\n{result.stdout}\n{result.stderr}"
    return result.stdout


@pytest.fixture(scope="session")
def wheel(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy, so that nothing is left in the checkout and nothing old gets in."""
    source = tmp_path_factory.mktemp("source")
    for name in BUILD_FILES:
        shutil.copy(repository / name, source / name)
    for name in (*PACKAGE_FOLDERS, "tests", ".ci", "deploy"):
        if (repository / name).is_dir():
            shutil.copytree(repository / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    target = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "."]
    run([*command, "--wheel-dir", str(target)], source)
    (built,) = target.glob("*.whl")
    return built


def test_the_list_of_packages_is_the_tree(repository: Path, project: dict) -> None:
    assert sorted(project["tool"]["setuptools"]["packages"]) == sorted(packages_in_tree(repository))


def test_the_wheel_holds_the_package_and_nothing_else(repository: Path, wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"tandem"}
    held = {name.removeprefix("tandem/") for name in names if name.startswith("tandem/")}
    expected = {"__init__.py"} | {
        str(path.relative_to(repository))
        for folder in PACKAGE_FOLDERS
        for path in (repository / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert expected - held == set(), "not in the wheel: add them to package-data in pyproject.toml"
    assert held - expected == set()
    assert any(name.endswith("dist-info/licenses/LICENSE") for name in names)


def test_the_wheel_installs_and_runs_elsewhere(wheel: Path, project: dict, tmp_path: Path) -> None:
    """Into a fresh environment that sees our third-party packages but not the checkout."""
    environment = tmp_path / "venv"
    venv.create(environment, with_pip=False, symlinks=True)
    python = environment / "bin" / "python"
    site = Path(run([str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], tmp_path).strip())
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", "--no-index"]
    run([*install, str(wheel)], tmp_path)
    # A plain path: .pth files of that folder (our editable install is one) are not read.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    program = """
import importlib, json, sys, tandem
for package in json.loads(sys.argv[1]):
    importlib.import_module(package)
print(tandem.__file__, tandem.__version__)
"""
    arguments = [str(python), "-c", program, json.dumps(project["tool"]["setuptools"]["packages"])]
    where, version = run(arguments, tmp_path).split()
    assert Path(where).is_relative_to(environment)
    assert re.fullmatch(r"\d+\.\d+\.\d+", version)
    assert "serve" in run([str(environment / "bin" / "tandem"), "--help"], tmp_path)


def test_make_finds_the_bound_of_torch(repository: Path, project: dict) -> None:
    """The Makefile reads it with sed, to look for a wheel on disk first."""
    line = next(line for line in (repository / "Makefile").read_text().splitlines() if line.startswith("TORCH :="))
    script = re.search(r"sed -n '(.*)' pyproject\.toml", line)
    assert script is not None
    found = run(["sed", "-n", script[1], "pyproject.toml"], repository).split()
    assert found == [entry for entry in project["project"]["optional-dependencies"]["engine"] if "torch" in entry]


def test_planner_and_router_install_without_torch(project: dict) -> None:
    base = " ".join(project["project"]["dependencies"])
    assert not re.search(r"\b(torch|ray|transformers|openai|vllm)\b", base)
    assert not re.search(
        r"\b(transformers|openai|vllm|pytest)\b", str(project["project"]["optional-dependencies"]["all"])
    )


def test_make_refuses_another_python(repository: Path, tmp_path: Path) -> None:
    """Before anything is made, and with the way out."""
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(repository / name, tmp_path / name)
    old = tmp_path / "old-python"
    old.write_text('#!/bin/sh\n[ "$1" = --version ] && echo "Python 3.9.2" && exit 0\nexit 1\n')
    old.chmod(0o755)
    command = ["make", "demo", f"PYTHON={old}"]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MAKE")}
    result = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert result.returncode != 0
    assert "Tandem needs Python 3.11, 3.12 or 3.13" in result.stderr
    assert "Python 3.9.2" in result.stderr
    assert "make demo PYTHON=" in result.stderr
    assert not (tmp_path / ".venv").exists()

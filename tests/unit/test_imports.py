"""The direction of imports: every module is named where it is checked, and what is pure loads neither torch nor Ray."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

PACKAGES = ("cluster", "decode_worker", "kernels", "kvtransfer", "prefill_worker", "router")
HEAVY = ("torch", "ray")

MAY_LOAD_HEAVY = (
    "kernels",
    "cluster.bench",
    "cluster.launch",
    "cluster.profiler.transfers",
    "cluster.worker",
    "prefill_worker",
    "decode_worker",
    "cluster.engine.compiled",
    "cluster.engine.compiled_weights",
    "cluster.engine.devices.cpu",
    "cluster.engine.devices.cuda",
    "cluster.engine.devices.cuda_ranks",
    "cluster.engine.gguf_weights",
    "cluster.engine.gpu",
    "cluster.engine.hf_weights",
    "cluster.engine.kv_ranks",
    "cluster.engine.model",
    "cluster.engine.parallel.follower",
    "cluster.engine.parallel.layers",
    "cluster.engine.parallel.leader",
    "cluster.engine.parallel.rank",
    "cluster.engine.parallel.ranks",
    "cluster.engine.parallel.stage",
    "cluster.engine.parallel.weights",
    "kvtransfer.collective.groups",
    "kvtransfer.collective.memory",
    "kvtransfer.collective.rank",
    "cluster.engine.runner",
    "cluster.engine.weight_source",
    "cluster.engine.weights",
)
"""Everything else is pure. A new module that needs torch is added here, on purpose."""
LOADS_HEAVY_LATE = re.compile(r"cluster\.(cli|cli_\w+|demo)")
"""The command line starts clusters, but only inside its functions: `tandem --help` waits for neither torch nor Ray."""


def modules(root: Path) -> list[str]:
    """Every module of the package as the tree has it, without the leading `tandem.`."""
    found = []
    for package in PACKAGES:
        for path in sorted((root / package).rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            found.append(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
    return found


def within(module: str, prefixes: tuple[str, ...]) -> bool:
    return any(module == prefix or module.startswith(prefix + ".") for prefix in prefixes)


def pure_modules(root: Path) -> list[str]:
    return [module for module in modules(root) if not within(module, MAY_LOAD_HEAVY)]


@pytest.fixture(scope="session")
def project(repository: Path) -> dict:
    return tomllib.loads((repository / "pyproject.toml").read_text())


def contract(project: dict, name: str) -> dict:
    return next(entry for entry in project["tool"]["importlinter"]["contracts"] if entry["id"] == name)


def named_in(entries: list[str]) -> set[str]:
    return set(re.findall(r"tandem\.([\w.]+)", " ".join(entries)))


def run(program: str, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *options, "-c", program], capture_output=True, text=True, timeout=240, check=False
    )


def test_every_module_is_in_the_layers(project: dict, repository: Path) -> None:
    named = named_in(contract(project, "layers")["layers"])
    rooms = {
        ".".join(module.split(".")[:2]) if module.startswith("cluster.") else module.split(".")[0]
        for module in modules(repository)
    } - {"cluster"}
    assert rooms - named == set(), "add these to the layers contract in pyproject.toml"
    assert named - rooms == set(), "these are in the layers contract, but not in the tree"


def test_every_pure_module_is_in_the_contract(project: dict, repository: Path) -> None:
    named = tuple(named_in(contract(project, "no-torch-no-ray")["source_modules"]))
    rooms = (
        "cluster",
        "cluster.engine",
        "cluster.engine.devices",
        "cluster.engine.parallel",
        "cluster.profiler",
    )  # only docstrings; named, they would mean all inside
    here = [module for module in pure_modules(repository) if not LOADS_HEAVY_LATE.fullmatch(module)]
    outside = [module for module in here if module not in rooms and not within(module, named)]
    assert outside == [], "add these to the no-torch-no-ray contract in pyproject.toml, or to MAY_LOAD_HEAVY"
    assert set(named) <= set(pure_modules(repository)), "in the no-torch-no-ray contract, but not in the tree"


def test_pure_modules_load_neither_torch_nor_ray(repository: Path) -> None:
    program = f"""
import importlib, sys
for module in {pure_modules(repository)!r}:
    importlib.import_module("tandem." + module)
    heavy = [name for name in {HEAVY!r} if name in sys.modules]
    if heavy:
        sys.exit(f"tandem.{{module}} loads {{heavy}}")
"""
    result = run(program)
    assert result.returncode == 0, result.stderr


def test_only_gpu_kernels_and_quantized_products_load_triton(repository: Path) -> None:
    needs = ("kernels.gpu", "cluster.engine.gpu.quantized_linears")
    program = f"""
import importlib, sys
sys.modules["triton"] = None
for module in {[module for module in modules(repository) if not within(module, needs)]!r}:
    importlib.import_module("tandem." + module)
"""
    result = run(program)
    assert result.returncode == 0, result.stderr


def test_the_package_itself_loads_nothing() -> None:
    result = run("import sys, tandem; print(sorted(name for name in sys.modules if name.startswith('tandem')))")
    assert result.stdout.strip() == "['tandem']", result.stderr


def test_every_module_can_be_imported(repository: Path) -> None:
    program = f"""
import importlib
for module in {modules(repository)!r}:
    importlib.import_module("tandem." + module)
"""
    result = run(program)
    assert result.returncode == 0, result.stderr


def test_imports_inside_the_package_are_relative(repository: Path) -> None:
    """So that the package works under whatever its folder is called, and in a wheel."""
    pattern = re.compile(rf"^\s*(?:from|import)\s+(?:tandem\b|(?:{'|'.join(PACKAGES)})[\s.])", re.MULTILINE)
    offenders = [
        str(path.relative_to(repository))
        for package in PACKAGES
        for path in (repository / package).rglob("*.py")
        if pattern.search(path.read_text())
    ]
    assert offenders == []

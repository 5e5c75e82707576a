"""What `tandem doctor` makes of the facts that it gathered of this machine: each check is a pure function from facts to
findings. Those of a running cluster are `cluster.cli_doctor_live`'s.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from packaging.specifiers import SpecifierSet

RAY_WITH_TOKENS = ">=2.52"
FILES = 4096
SPACE_BYTES = 2**30


class Level(enum.StrEnum):
    """How bad a finding is."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True, slots=True)
class Finding:
    """One line: what was looked at, what was found, and what to do about it."""

    level: Level
    about: str
    text: str
    do: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Package:
    """A package that pyproject.toml bounds."""

    name: str
    allowed: str
    installed: str | None
    extra: str = ""
    """The extra that brings it; empty: needed always."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Port:
    """One of the router's ports on this machine."""

    name: str
    number: int
    holder: str
    """`free`, `ours` (a cluster of this user) or `taken`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What there is without a cluster."""

    python: str
    python_allowed: str
    packages: Sequence[Package]
    cores: int
    cpu_flags: frozenset[str]
    memory_bytes: int
    """Available; 0: unknown."""
    ray_auth: str
    """What the environment says Ray should ask of its callers; empty: what `tandem serve` says."""
    open_files: int
    cache: str
    cache_writable: bool
    cache_free_bytes: int
    ports: Sequence[Port]
    kernels: str
    """Who would compute a model on this processor (`kernels.dispatch`); empty: nobody, torch and numba are missing."""
    kernels_reason: str
    gpu: str
    """Who would compute on a GPU, and why; or what the GPU that is here lacks, or that none is here."""
    gpu_hint: str
    """What to do about it; empty: nothing."""
    model: str
    model_error: str | None
    model_here: bool


def check_machine(machine: Machine) -> list[Finding]:
    """Everything that can be said without a cluster."""
    return [
        _python(machine),
        *_packages(machine.packages),
        *_ray(machine),
        _cpu(machine),
        _kernels(machine),
        _gpu(machine),
        _limits(machine),
        _cache(machine),
        _model(machine),
        *(_port(port) for port in machine.ports),
    ]


def _python(machine: Machine) -> Finding:
    text = f"{machine.python}; allowed: {machine.python_allowed}"
    if machine.python in SpecifierSet(machine.python_allowed):
        return Finding(Level.OK, "python", text)
    return Finding(Level.FAIL, "python", text, "make the environment with another Python")


def _packages(packages: Iterable[Package]) -> list[Finding]:
    bad = []
    good = 0
    for package in packages:
        name, allowed = package.name, package.allowed
        install = f"pip install 'tandem-serve[{package.extra}]'" if package.extra else "pip install tandem-serve"
        if package.installed is None:
            level = Level.WARN if package.extra else Level.FAIL
            bad.append(Finding(level, "package", f"{name} is not installed; allowed: {allowed}", install))
        elif not SpecifierSet(allowed).contains(package.installed, prereleases=True):
            bad.append(Finding(Level.FAIL, "package", f"{name} {package.installed}; allowed: {allowed}", install))
        else:
            good += 1
    return [Finding(Level.OK, "packages", f"{good} installed, within their bounds"), *bad]


def _ray(machine: Machine) -> list[Finding]:
    """Whoever may call Ray can run code: does a Ray that is started here ask for a token?"""
    version = next((package.installed for package in machine.packages if package.name == "ray"), None)
    if version is None:
        return []
    if not SpecifierSet(RAY_WITH_TOKENS).contains(version, prereleases=True):
        text = f"{version} knows no tokens: whoever reaches its ports can run code"
        return [Finding(Level.WARN, "ray", text, f"pip install 'ray{RAY_WITH_TOKENS}'")]
    if machine.ray_auth not in ("", "token"):
        text = f"RAY_AUTH_MODE is {machine.ray_auth}: whoever reaches its ports can run code"
        return [Finding(Level.WARN, "ray", text, "unset it, or RAY_AUTH_MODE=token")]
    return [Finding(Level.OK, "ray", f"{version}; one that is started here wants a token")]


def _cpu(machine: Machine) -> Finding:
    wanted = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8")
    has = [flag for flag in wanted if flag in machine.cpu_flags]
    gib = f", {machine.memory_bytes / 2**30:.1f} GiB free" if machine.memory_bytes else ""
    text = f"{machine.cores} processors{gib}; {', '.join(has) or 'no vector instructions known'}"
    return Finding(Level.OK, "processor", text)


def _kernels(machine: Machine) -> Finding:
    if not machine.kernels:
        return Finding(Level.WARN, "kernels", machine.kernels_reason, "pip install 'tandem-serve[engine]'")
    text = f"{machine.kernels}: {machine.kernels_reason}"
    if machine.kernels == "compiled":
        return Finding(Level.OK, "kernels", text)
    return Finding(Level.WARN, "kernels", text, "several times slower than compiled ones")


def _gpu(machine: Machine) -> Finding:
    return Finding(Level.WARN if machine.gpu_hint else Level.OK, "gpu", machine.gpu, machine.gpu_hint)


def _limits(machine: Machine) -> Finding:
    text = f"{machine.open_files} open files allowed"
    if machine.open_files < FILES:
        return Finding(Level.WARN, "limits", text, f"each stream takes one: ulimit -n {FILES}")
    return Finding(Level.OK, "limits", text)


def _cache(machine: Machine) -> Finding:
    text = f"{machine.cache}, {machine.cache_free_bytes / 2**30:.1f} GiB free"
    if not machine.cache_writable:
        return Finding(Level.FAIL, "cache", f"{text}, cannot be written", "TANDEM_CACHE names another folder")
    if machine.cache_free_bytes < SPACE_BYTES:
        return Finding(Level.WARN, "cache", text, "a fetched model may not fit; TANDEM_CACHE names another folder")
    return Finding(Level.OK, "cache", text)


def _model(machine: Machine) -> Finding:
    if machine.model_error is not None:
        return Finding(Level.FAIL, "model", machine.model_error, "name another one with --model, or fetch it again")
    where = "its files are here and their headers make sense" if machine.model_here else "fetched when first served"
    return Finding(Level.OK, "model", f"{machine.model}: {where}")


def _port(port: Port) -> Finding:
    text = f"{port.name} {port.number}: "
    if port.holder == "taken":
        return Finding(Level.WARN, "port", f"{text}another process has it", f"serve with another --{port.name}")
    return Finding(Level.OK, "port", text + ("free" if port.holder == "free" else "this user's running cluster"))

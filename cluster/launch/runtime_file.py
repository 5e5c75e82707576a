"""Where a running cluster can be found by its operator's other commands: one small file, for its owner's eyes only.

`tandem serve` writes it when the cluster is ready and removes it when the cluster stops; it names the addresses and
holds the secret that the members share, so that `tandem restart` and `tandem doctor` may call them. A file whose
process is gone says nothing any more: `find` passes over it, and the next `write` removes it.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ..config import SecurityConfig, from_dict, is_loopback, to_dict
from ..models.fetch import default_cache_dir

_SUFFIX = ".json"


@dataclass(frozen=True, slots=True, kw_only=True)
class RunningCluster:
    """What the file says. Addresses are host:port."""

    http: str
    grpc: str
    registry: str
    registries: tuple[str, ...] = ()
    """Of all router processes, where there are several."""
    host: str = ""
    """What the router's ports are bound to, which may be more than the address under which they are dialed."""
    tls: bool = False
    """Whether clients speak TLS, on HTTP and on gRPC."""
    api_key: str | None = field(default=None, repr=False)
    """The operator's own; None: clients need none."""
    security: SecurityConfig = field(default_factory=SecurityConfig)
    """With the secret itself, not where it came from; for `cluster.auth.MemberCredentials.load`."""
    pid: int = field(default_factory=os.getpid)
    started_ticks: int = field(default_factory=lambda: _started_ticks(os.getpid()))
    """When the process began, in the kernel's own count: a number that the next owner of the pid does not have."""
    node: str = field(default_factory=socket.gethostname)
    since_unix_s: float = field(default_factory=time.time)

    @property
    def url(self) -> str:
        """The router's HTTP address as clients write it."""
        return f"{'https' if self.tls else 'http'}://{self.http}"

    @property
    def alive(self) -> bool:
        """Whether the process that wrote the file still runs, on this machine."""
        return self.node == socket.gethostname() and _started_ticks(self.pid) == self.started_ticks

    def serves(self, url: str) -> bool:
        """Whether `url` (http://host:port) leads to this cluster's router; loopback names are all the same."""
        mine, asked = urlsplit(f"//{self.http}"), urlsplit(url)
        try:
            ports = mine.port, asked.port or {"https": 443}.get(asked.scheme, 80)
        except ValueError:
            return False
        hosts = mine.hostname or "", asked.hostname or ""
        return ports[0] == ports[1] and (hosts[0] == hosts[1] or is_loopback(hosts[1]))


def folder() -> Path:
    """`tandem` in XDG_RUNTIME_DIR; where there is none, `run` in TANDEM_CACHE (`~/.cache/tandem`)."""
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    return Path(runtime) / "tandem" if runtime else default_cache_dir() / "run"


def write(cluster: RunningCluster) -> Path:
    """Writes the file (0600, in a folder of 0700) and removes those of clusters that are gone. Raises OSError."""
    home = folder()
    home.mkdir(parents=True, exist_ok=True, mode=0o700)
    if home.stat().st_uid != os.getuid():
        raise PermissionError(f"{home} belongs to another user")
    home.chmod(0o700)
    sweep()
    path = home / f"{cluster.pid}-{cluster.registry.rpartition(':')[2]}{_SUFFIX}"
    scratch = path.with_suffix(".new")
    scratch.unlink(missing_ok=True)
    with open(os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
        json.dump(to_dict(cluster), file)
    scratch.replace(path)
    return path


def remove(path: Path) -> None:
    """Removes what `write` wrote; idempotent."""
    with contextlib.suppress(OSError):
        path.unlink(missing_ok=True)


def sweep() -> None:
    """Removes the files of this machine whose process is gone."""
    for path, cluster in _files():
        if cluster.node == socket.gethostname() and not cluster.alive:
            remove(path)


def running() -> tuple[RunningCluster, ...]:
    """Clusters of this user on this machine, the newest first."""
    found = [cluster for _, cluster in _files() if cluster.alive]
    return tuple(sorted(found, key=lambda cluster: cluster.since_unix_s, reverse=True))


def find(url: str | None = None) -> RunningCluster | None:
    """The running cluster whose router answers at `url` (http://host:port), or the newest; None where none is known."""
    return next((cluster for cluster in running() if url is None or cluster.serves(url)), None)


def _files() -> list[tuple[Path, RunningCluster]]:
    found = []
    with contextlib.suppress(OSError):
        for path in sorted(folder().glob(f"*{_SUFFIX}")):
            cluster = _read(path)
            if cluster is not None:
                found.append((path, cluster))
    return found


def _read(path: Path) -> RunningCluster | None:
    """None for a file that another user could have written or that is none of ours."""
    try:
        with path.open(encoding="utf-8") as file:
            about = os.fstat(file.fileno())
            if about.st_uid != os.getuid() or about.st_mode & 0o022:
                return None
            values: Any = json.load(file)
        return from_dict(RunningCluster, values) if isinstance(values, Mapping) else None
    except (OSError, ValueError, TypeError):
        return None


def _started_ticks(pid: int) -> int:
    """Start time of a process, from proc_pid_stat(5); 0 where it is gone, -1 where there is no /proc and it runs."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    except (OSError, IndexError, ValueError):
        pass
    if Path("/proc/self/stat").exists():
        return 0
    try:
        os.kill(pid, 0)
    except OSError:
        return 0
    return -1

"""A Ray of our own on this machine: small, quiet, without telemetry, and gone without a trace afterwards.

Ray puts the driver's folder on every worker's `sys.path`; in this repository that would let `router` and `kernels`
shadow other packages, so Ray is started from its own temporary folder. That folder is short (a Unix socket's path holds
107 bytes) and removed in the end.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import math
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NoReturn

from . import reaper
from .reaper import inside_of, reap

NAMESPACE = "tandem"
_BASE = Path("/tmp") if Path("/tmp").is_dir() else Path(tempfile.gettempdir())
_PREFIX = "tandem-"

_DAEMONS = ("gcs_server", "raylet")
_OUTLIVE = "RAY_gcs_rpc_server_reconnect_timeout_s"
"""After so long without gcs_server, Ray's own, whoever is connected to it ends itself: members, raylet and driver."""
_PENDING_POLL_S = 0.02
_LISTENS_S = 10.0

_LOOPBACK = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
_ENVIRONMENT = {
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # leave CUDA_VISIBLE_DEVICES alone; silences a warning
    "RAY_DEDUP_LOGS_SKIP_REGEX": "worker died or was killed",  # the manager says so, in one line
    _LOOPBACK: "0",  # what makes Ray, on any system, listen on loopback only
    "RAY_AUTH_MODE": "token",  # Ray's own default where it knows tokens; said here so that it cannot change unseen
    "RAY_enable_worker_prestart": "0",
    "RAY_prestart_worker_first_driver": "0",
    "RAY_memory_monitor_refresh_ms": "0",  # a worker's memory is bounded by its config, not by Ray's guess
    "RAY_worker_niceness": "0",  # members are the data plane: nothing on the machine goes before them
}


class LocalRay:
    """Starts a one-node Ray; `stop` ends it and removes what it left. Not reentrant: Ray has one driver per process."""

    def __init__(
        self, num_cpus: int, object_store_bytes: int, *, outlive_s: float = 60.0, verbose: bool = False
    ) -> None:
        """`outlive_s`: how long all that is connected goes on without Ray's head (gcs_server); read once a process."""
        self._outlive_s = outlive_s
        self._num_cpus = num_cpus
        self._object_store_bytes = object_store_bytes
        self._verbose = verbose
        self._folder: Path | None = None
        self._reaper: subprocess.Popen[bytes] | None = None
        self._daemons: dict[int, str] = {}

    @property
    def lost(self) -> str:
        """The daemon without which Ray manages nothing any more and that is gone; empty where none is, or no /proc to
        tell. Members go on without it for a while, and can be called.
        """
        return " and ".join(sorted(name for pid, name in self._daemons.items() if not _child_lives(pid)))

    def start(self) -> None:
        """Blocks until Ray is up: some seconds. Raises RuntimeError and OSError as Ray does; then nothing is left."""
        os.environ.setdefault(_OUTLIVE, str(math.ceil(self._outlive_s)))
        prepare_environment(local=True)
        import ray

        _sweep()
        self._folder = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-", dir=_BASE))
        try:
            self._reaper = subprocess.Popen(
                [sys.executable, "-I", "-S", reaper.__file__, str(self._folder)],
                stdin=subprocess.PIPE,
                start_new_session=True,
                cwd="/",
            )
            with _unreached_by_group_signals(), _own_signals(), _inside(self._folder):
                ray.init(
                    address="local",
                    num_cpus=self._num_cpus,
                    object_store_memory=self._object_store_bytes,
                    include_dashboard=False,
                    namespace=NAMESPACE,
                    log_to_driver=self._verbose,
                    logging_level=logging.ERROR,
                    _temp_dir=str(self._folder),
                    _node_ip_address="127.0.0.1",
                )
            children = {pid: _name(pid) for pid in inside_of(self._folder) if _child_lives(pid)}
            self._daemons = {pid: name for pid, name in children.items() if name in _DAEMONS}
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Idempotent; blocks until Ray's processes are gone. Asks nothing of a Ray that died: it would wait for
        its head, up to `outlive_s`. The client stays behind then; see `end_process`.
        """
        import ray

        with _own_signals():
            if self.lost:
                _leave_client_behind()
            else:
                with _ended_when_told(self._daemon_pids()):
                    ray.shutdown()
        self._daemons = {}
        if self._folder is not None:
            reap(self._folder)
            self._folder = None
        if self._reaper is not None:
            assert self._reaper.stdin is not None
            self._reaper.stdin.close()
            self._reaper.wait()
            self._reaper = None

    def _daemon_pids(self) -> list[int]:
        if self._folder is None:
            return []
        children = [pid for pid in inside_of(self._folder) if _child_lives(pid)]
        # Where the group's SIGTERM is pending already, Ray's own cannot be told from it: those take their second.
        return [pid for pid in children if not _is_pending(pid, signal.SIGTERM)]


def remedy(error: str, *, load: float | None = None, processors: int | None = None) -> str:
    """What to do about a Ray that did not come up in time, which Ray itself does not say; empty: the error is another.
    `load`, `processors`: None: this machine's.
    """
    if "timed out" not in error.lower():
        return ""
    if load is None:
        load = os.getloadavg()[0]
    processors = processors or os.cpu_count() or 1
    busy = f"the machine is busy (load {load:.0f} on {processors} processors): start again when less runs"
    calm = (
        f"the machine is not busy (load {load:.0f} on {processors} processors): look for room in {_BASE} and in memory"
    )
    own = "or have it join a Ray that runs (`ray start --head`, then --address)"
    return f"; {busy if load > processors else calm}, {own}"


def join_ray(address: str, *, verbose: bool = False) -> None:
    """Connects this process to the Ray cluster at `address`. Raises ConnectionError, RuntimeError as Ray does."""
    prepare_environment(local=False)
    _check_listens(address)
    import ray

    with _own_signals(), _inside(Path(tempfile.gettempdir())):
        ray.init(address=address, namespace=NAMESPACE, log_to_driver=verbose, logging_level=logging.ERROR)


def _check_listens(address: str) -> None:
    """Ray would look for a minute, and remark on it, where nobody listens."""
    host, _, port = address.rpartition(":")
    if host and "//" not in host and port.isdecimal():
        try:
            socket.create_connection((host.strip("[]"), int(port)), _LISTENS_S).close()
        except OSError as error:
            raise ConnectionError(f"nobody listens there ({error.strerror or error})") from None


def prepare_environment(*, local: bool) -> None:
    """Sets what Ray reads from the environment, most of it while it is imported; the user's own settings win.
    RuntimeError where it is too late for a local one to stay on loopback.

    A local Ray asks for a token by itself; the one here, drawn once a process as the driver keeps the first it reads,
    saves it from writing one to the user's home.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if not local:
        return
    if "RAY_AUTH_TOKEN_PATH" not in os.environ:
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    if "ray" in sys.modules:  # read already: half of the rest would be worse than none of it
        if os.environ.get(_LOOPBACK) != "0":
            raise RuntimeError(
                f"this program imported ray before it started a cluster, so that Ray would listen beyond loopback; "
                f"start the cluster first, or set {_LOOPBACK}=0 before ray is imported"
            )
        return
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def _sweep() -> None:
    """Removes the folders of this user's drivers that were killed before they could."""
    for folder in _BASE.glob(f"{_PREFIX}*-*"):
        pid = folder.name.removeprefix(_PREFIX).partition("-")[0]
        with contextlib.suppress(OSError):
            if pid.isdigit() and not _alive(int(pid)) and folder.stat().st_uid == os.getuid():
                shutil.rmtree(folder, ignore_errors=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


_client_left_behind = threading.Event()


def end_process(code: int) -> NoReturn:
    """Ends the process with that exit code, as `sys.exit` does; at once where the client of a Ray that died was left
    behind. An interpreter that winds up would first wait for it (ray.shutdown at exit, up to `outlive_s`) and without
    that crash in it (its threads outlive what they use): there everything is flushed, and no exit handler runs.
    """
    if _client_left_behind.is_set():
        _end_now(code)
    sys.exit(code)


def _leave_client_behind() -> None:
    if not _client_left_behind.is_set():
        _client_left_behind.set()
        atexit.register(_end_now, 1)  # for programs that do not end by `end_process`


def _end_now(code: int) -> NoReturn:
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # closed, or nobody reads it
            stream.flush()
    os._exit(code)


def _name(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/comm").read_text().strip()
    return ""


def _child_lives(pid: int) -> bool:
    """Whether that child of this process runs: not gone, no zombie, and not another process under its number."""
    try:
        state, parent = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:2]
    except OSError:
        return False
    return state not in "ZX" and int(parent) == os.getpid()


@contextlib.contextmanager
def _ended_when_told(pids: Sequence[int]) -> Iterator[None]:
    """Ends each process as soon as Ray has sent it the SIGTERM it blocks; Ray would wait a second for each."""
    done = threading.Event()

    def watch() -> None:
        while not done.wait(_PENDING_POLL_S):
            for pid in pids:
                if _child_lives(pid) and _is_pending(pid, signal.SIGTERM):
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)

    thread = threading.Thread(target=watch, name="ray-ender", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _is_pending(pid: int, number: int) -> bool:
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("ShdPnd:"):
                return bool(int(line.split()[1], 16) >> (number - 1) & 1)
    return False


@contextlib.contextmanager
def _inside(folder: Path) -> Iterator[None]:
    before = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


@contextlib.contextmanager
def _own_signals() -> Iterator[None]:
    """Gives SIGINT and SIGTERM back to whoever runs the cluster: Ray sets its own handlers on the way."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


@contextlib.contextmanager
def _unreached_by_group_signals() -> Iterator[None]:
    """Processes started inside, and theirs, never get SIGTERM and SIGHUP: they inherit the mask that blocks them.

    `timeout`, systemd and a closing terminal signal every process of the group. Ray's daemons and the members must
    outlive that, or nothing is left to drain with: the driver alone decides. They end by SIGKILL, as when it dies.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGHUP))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)

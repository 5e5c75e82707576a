"""Who may come in at the router's two doors: a set of API keys, from the configuration and from a file that is read
again when it changes, so that a key can be given and taken while the router runs.

A key that is asked about is compared with every key there is, digest with digest, without stopping early: how long the
answer takes says nothing about the keys. The file is looked at (one stat) at most once in `LOOK_S`, when somebody
comes; one that cannot be read, or holds no key, lets nobody in.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ..cluster.auth import warn_if_shared
from ..cluster.clock import Clock, MonotonicClock
from ..cluster.config import ConfigError, RouterConfig

_log = logging.getLogger(__name__)

LOOK_S = 1.0
MIN_KEY_CHARS = 16
"""Shorter ones can be guessed; they are warned of, not refused."""
MAX_KEYS = 1000
MAX_FILE_BYTES = 2**20


@dataclass(frozen=True, slots=True)
class _Seen:
    """What tells one version of the file from another."""

    inode: int
    size_bytes: int
    modified_ns: int
    changed_ns: int


class ApiKeys:
    """The keys that count now. Used from the router's event loop; a look at a file that changed reads it there, which
    takes about a millisecond at most.
    """

    def __init__(self, keys: Iterable[str] = (), path: Path | None = None, clock: Clock | None = None) -> None:
        """Raises ConfigError where the file cannot be read now."""
        self._fixed = tuple(_digest(key) for key in keys)
        self._path = path
        self._clock = clock or MonotonicClock()
        self._filed: tuple[bytes, ...] = ()
        self._seen: _Seen | None = None
        self._why_not = ""
        self._looked_s = self._clock.now_s()
        if path is not None:
            warn_if_shared(path, "api_keys_file")
            try:
                self._read(path)
            except (OSError, UnicodeDecodeError) as error:
                raise ConfigError("api_keys_file", str(path), f"a readable file ({_reason(error)})") from None

    @classmethod
    def from_config(cls, config: RouterConfig) -> ApiKeys:
        """Those that the configuration names. Raises ConfigError. Blocks: reads a file."""
        for key in config.api_keys:
            if len(key) < MIN_KEY_CHARS:
                _log.warning("api_key: a key is shorter than %d characters and can be guessed", MIN_KEY_CHARS)
        path = None if config.api_keys_file is None else Path(config.api_keys_file).expanduser()
        return cls(config.api_keys, path)

    @property
    def wanted(self) -> bool:
        """Whether clients must present a key at all; it does not change while the router runs."""
        return bool(self._fixed) or self._path is not None

    @property
    def counts(self) -> dict[str, int | None]:
        """How many keys are in force now: those of the configuration, and those of the file (None: there is none)."""
        self._look()
        return {"configured": len(self._fixed), "file": None if self._path is None else len(self._filed)}

    @property
    def warning(self) -> str:
        """One line for the operator where the file lets nobody in; else empty."""
        self._look()
        if self._path is None or self._filed:
            return ""
        return f"api_keys_file: {self._path} {self._why_not or 'holds no key'}; nobody gets in by it"

    def admit(self, key: str) -> bool:
        """Whether it is one of the keys that count now. False for every key where none does."""
        self._look()
        digest = _digest(key)
        found = False
        for known in self._fixed + self._filed:
            found |= hmac.compare_digest(known, digest)
        return found

    def _look(self) -> None:
        now_s = self._clock.now_s()
        if self._path is None or now_s - self._looked_s < LOOK_S:
            return
        self._looked_s = now_s
        try:
            if self._seen is None or _seen(os.stat(self._path)) != self._seen:
                self._read(self._path)
        except (OSError, UnicodeDecodeError) as error:
            self._filed, self._seen = (), None
            why_not = f"cannot be read ({_reason(error)})"
            if why_not != self._why_not:
                self._why_not = why_not
                _log.error("%s", self.warning)

    def _read(self, path: Path) -> None:
        with path.open("rb") as file:
            seen = _seen(os.fstat(file.fileno()))
            data = file.read(MAX_FILE_BYTES + 1)
        if len(data) > MAX_FILE_BYTES:
            raise OSError(f"it is larger than {MAX_FILE_BYTES} bytes")
        keys = _parse(data.decode("utf-8"), path)
        self._filed = tuple({_digest(key): None for key in keys})
        self._seen, self._why_not = seen, ""
        if not keys:
            _log.error("%s", self.warning)
        else:
            _log.info("api_keys_file: %d keys from %s", len(keys), path)


def _parse(text: str, path: Path) -> list[str]:
    """One key a line; blank lines, and what follows a # at the start of a line or behind a space, do not count."""
    keys: list[str] = []
    for number, line in enumerate(text.removeprefix("\ufeff").splitlines(), start=1):
        key = "" if line.lstrip().startswith("#") else line.split(" #", 1)[0].split("\t#", 1)[0].strip()
        if not key:
            continue
        if not key.isascii() or not key.isprintable() or " " in key:
            _log.error("api_keys_file: line %d of %s is no key (printable ASCII without spaces); ignored", number, path)
        elif len(keys) == MAX_KEYS:
            _log.error("api_keys_file: %s holds more than %d keys; the rest is ignored", path, MAX_KEYS)
            break
        else:
            if len(key) < MIN_KEY_CHARS:
                _log.warning("api_keys_file: the key in line %d is shorter than %d characters", number, MIN_KEY_CHARS)
            keys.append(key)
    return keys


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()


def _seen(about: os.stat_result) -> _Seen:
    return _Seen(about.st_ino, about.st_size, about.st_mtime_ns, about.st_ctime_ns)


def _reason(error: Exception) -> str:
    return str(getattr(error, "strerror", None) or error)

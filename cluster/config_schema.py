"""How configuration dataclasses are checked: types from their annotations, ranges from `Annotated` marks, in one place.

Every class of `cluster.config` calls `check` from `__post_init__`, so a config that exists is valid wherever it came
from: code, YAML, a flag or another process. `parse` builds one from a plain mapping, `plain` turns it back. Pure.
"""

from __future__ import annotations

import dataclasses
import difflib
import enum
import math
import re
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

T = TypeVar("T")

NEAR_LETTERS, NEAR_SHARE = 3, 0.7
HIDDEN = "…"
"""What errors show in place of a secret."""
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?i?b)?\s*", re.IGNORECASE)
_UNITS = {"": 1, "b": 1}
_UNITS |= {f"{prefix}b": 1000**power for power, prefix in enumerate("kmgt", 1)}
_UNITS |= {f"{prefix}ib": 1024**power for power, prefix in enumerate("kmgt", 1)}


class ConfigError(ValueError):
    """A setting that cannot be used: `field` is its dotted path, `allowed` says what would do; `problem`, where it is
    not the value: what is.
    """

    def __init__(self, field: str, value: object, allowed: str, *, problem: str = "") -> None:
        told = problem or ("is missing" if value is None else f"{value!r} is not allowed")
        super().__init__(f"{field}: {told}; allowed: {allowed}")
        self.field = field
        self.value = value
        self.allowed = allowed
        self.problem = problem

    def under(self, prefix: str) -> ConfigError:
        """The same error, with `prefix` in front of the field's path."""
        field = f"{prefix}.{self.field}" if prefix else self.field
        return ConfigError(field, self.value, self.allowed, problem=self.problem)


@dataclass(frozen=True, slots=True)
class Within:
    """Numbers from `low` to `high`, both included unless `above` says that `low` itself is out."""

    low: float
    high: float | None = None
    above: bool = False

    def admits(self, value: float) -> bool:
        """Whether the value lies in the range."""
        over = value > self.low if self.above else value >= self.low
        return over and (self.high is None or value <= self.high)

    def __str__(self) -> str:
        start = f"{'above' if self.above else 'at least'} {_plain_number(self.low)}"
        return start if self.high is None else f"{start}, at most {_plain_number(self.high)}"


def _plain_number(value: float) -> str:
    """Whole numbers in all their digits."""
    return str(value) if isinstance(value, int) else f"{value:.15g}"


@dataclass(frozen=True, slots=True)
class OneOf:
    """One of these strings."""

    choices: tuple[str, ...]

    def admits(self, value: str) -> bool:
        """Whether the string is among the choices."""
        return value in self.choices

    def __str__(self) -> str:
        return "one of " + ", ".join(self.choices)


@dataclass(frozen=True, slots=True)
class Text:
    """A string of at least one character that is not a space, on one line."""

    def admits(self, value: str) -> bool:
        """Whether there is something in the string."""
        return bool(value.strip()) and "\n" not in value

    def __str__(self) -> str:
        return "a non-empty line of text"


@dataclass(frozen=True, slots=True)
class Hidden:
    """Marks what errors must not show."""


@dataclass(frozen=True, slots=True)
class Bytes:
    """Marks an integer that may be written with a unit: 512MiB, 1.5GB."""


_LABELS = (Bytes, Hidden)
"""Marks that restrict nothing."""


def parse_bytes(text: str) -> int:
    """`"512MiB"` to 536870912. Binary (KiB, MiB, GiB, TiB) and decimal (KB, MB, GB, TB) units; none means bytes.

    Raises ValueError for anything else.
    """
    found = _SIZE.fullmatch(text)
    if found is None:
        raise ValueError(f"{text!r} is not a size; write bytes, or a number and KiB, MiB, GiB, TiB, KB, MB, GB, TB")
    return int(float(found[1]) * _UNITS[(found[2] or "").lower()])


def hints(cls: type) -> dict[str, Any]:
    """The resolved annotations of a config class, `Annotated` kept."""
    return typing.get_type_hints(cls, include_extras=True)


def split(hint: Any) -> tuple[Any, tuple[Any, ...]]:
    """`Annotated[int, mark]` to `(int, (mark,))`; anything else has no marks."""
    if typing.get_origin(hint) is typing.Annotated:
        base, *marks = typing.get_args(hint)
        return base, tuple(marks)
    return hint, ()


def check(config: Any, marks: Mapping[str, tuple[Any, ...]] | None = None) -> None:
    """Raises ConfigError for the first field of `config` whose type or range is wrong.

    `marks` adds marks by field name, for classes that are declared elsewhere and carry none.
    """
    for name, hint in hints(type(config)).items():
        extra = () if marks is None else marks.get(name, ())
        _check_value(name, getattr(config, name), hint, extra)


def _check_value(path: str, value: Any, hint: Any, extra: tuple[Any, ...] = ()) -> None:
    base, marks = split(hint)
    members = typing.get_args(base) if typing.get_origin(base) in (typing.Union, types.UnionType) else None
    if members is not None:
        if value is None and type(None) in members:
            return
        inner = next(member for member in members if member is not type(None))
        return _check_value(path, value, inner, marks + extra)
    if typing.get_origin(base) is tuple:
        if not isinstance(value, tuple):
            raise ConfigError(path, value, "a list")
        item = typing.get_args(base)[0]
        for index, entry in enumerate(value):
            _check_value(f"{path}[{index}]", entry, item, marks + extra)
        return
    if typing.get_origin(base) is dict:
        if not isinstance(value, dict) or not all(isinstance(key, str) and key.strip() for key in value):
            raise ConfigError(path, value, "a section of names")
        for key, entry in value.items():
            _check_value(f"{path}.{key}", entry, typing.get_args(base)[1], marks + extra)
        return
    shown = HIDDEN if any(isinstance(mark, Hidden) for mark in marks + extra) else value
    if not _is_a(value, base):
        raise ConfigError(path, shown, _kind(base, marks + extra))
    for mark in marks + extra:
        if not isinstance(mark, _LABELS) and not mark.admits(value):
            raise ConfigError(path, shown, str(mark))


def _is_a(value: Any, base: Any) -> bool:
    if base is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if base is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, base)


def _kind(base: Any, marks: tuple[Any, ...]) -> str:
    if isinstance(base, type) and issubclass(base, enum.Enum):
        return "one of " + ", ".join(str(member.value) for member in base)
    words = {bool: "true or false", int: "a whole number", float: "a finite number", str: "text"}
    kind = words.get(base, "a section")
    if any(isinstance(mark, Bytes) for mark in marks):
        kind += " of bytes, or a size like 512MiB"
    ranges = [str(mark) for mark in marks if not isinstance(mark, _LABELS)]
    return ", ".join([kind, *ranges])


def parse(cls: type[T], data: Any, path: str = "") -> T:
    """Builds a `cls` from a mapping of plain values (YAML's or JSON's), its nested sections too.

    Unknown keys are refused with the nearest known one; errors name the dotted path below `path`.
    """
    if not isinstance(data, Mapping):
        raise ConfigError(path or "configuration", data, "a section of keys and values")
    known = hints(cls)
    for key in data:
        if key not in known:
            raise unknown_key(f"{path}.{key}" if path else str(key), str(key), list(known))
    values = {key: _parse_value(f"{path}.{key}" if path else key, value, known[key]) for key, value in data.items()}
    missing = [f.name for f in dataclasses.fields(cls) if _required(f) and f.name not in values]  # type: ignore[arg-type]
    if missing:
        raise ConfigError(f"{path}.{missing[0]}" if path else missing[0], None, "a value; it is required")
    try:
        return cls(**values)
    except ConfigError as error:
        raise error.under(path) from None


def assign(tree: dict[str, Any], dotted: str, value: Any) -> None:
    """Sets `a.b.c` of nested sections, which are made or copied on the way. ConfigError where one is no section."""
    *parents, name = dotted.split(".")
    for depth, parent in enumerate(parents):
        below = tree.get(parent)
        if below is not None and not isinstance(below, Mapping):
            raise ConfigError(".".join(parents[: depth + 1]), below, "a section of keys and values")
        tree[parent] = dict(below or {})
        tree = tree[parent]
    tree[name] = value


def unknown_key(path: str, key: str, known: list[str]) -> ConfigError:
    """The error for a key nobody knows, with the nearest one that is known."""
    near = nearest(key, known)
    hint = f"did you mean {near}?" if near else "one of " + ", ".join(sorted(known))
    return ConfigError(path, key, f"a known key; {hint}")


def nearest(word: str, known: Iterable[str]) -> str:
    """The known word that was meant, as far as letters tell: one that begins with it, differs by little or ends with
    it; empty where none is near.
    """
    choices, typed = list(known), word.lower()
    long = len(typed) >= NEAR_LETTERS
    begun = [one for one in choices if one.startswith((f"{typed}_", f"{typed}-")) or (long and one.startswith(typed))]
    close = difflib.get_close_matches(typed, choices, n=1, cutoff=NEAR_SHARE)
    return next(iter([*begun, *close, *(one for one in choices if long and one.endswith(typed))]), "")


def _required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _parse_value(path: str, value: Any, hint: Any) -> Any:
    base, marks = split(hint)
    if typing.get_origin(base) in (typing.Union, types.UnionType):
        if value is None:
            return None
        inner = next(member for member in typing.get_args(base) if member is not type(None))
        return _parse_value(path, value, typing.Annotated[inner, *marks] if marks else inner)
    if typing.get_origin(base) is tuple:
        return tuple(value) if isinstance(value, (list, tuple)) else value
    if typing.get_origin(base) is dict and isinstance(value, Mapping):
        item = typing.get_args(base)[1]
        return {key: _parse_value(f"{path}.{key}", entry, item) for key, entry in value.items()}
    if dataclasses.is_dataclass(base) and isinstance(base, type):
        return value if isinstance(value, base) else parse(base, value, path)
    if isinstance(base, type) and issubclass(base, enum.Enum) and isinstance(value, str):
        try:
            return base(value)
        except ValueError:
            raise ConfigError(path, value, _kind(base, marks)) from None
    if isinstance(value, str) and any(isinstance(mark, Bytes) for mark in marks):
        try:
            return parse_bytes(value)
        except ValueError:
            raise ConfigError(path, value, _kind(base, marks)) from None
    return value


def plain(value: Any) -> Any:
    """A config as dicts, lists, strings and numbers, ready for JSON; `parse` gives it back."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {key: plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(entry) for entry in value]
    return value.value if isinstance(value, enum.Enum) else value

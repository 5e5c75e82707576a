"""Errors in the words of whoever typed the command: `--request-rate`, not the field `rate` that stands behind it."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import typer

from .config_schema import ConfigError

_BOUNDS = {"gt": "above", "ge": "at least", "lt": "below", "le": "at most"}


@contextmanager
def as_typed(
    context: typer.Context, paths: Mapping[str, str] | None = None, config: str | None = None
) -> Iterator[None]:
    """Inside, a ValueError that names a field names the option instead, where that was given or no file could have
    said it. `paths`: where the value of each option stands, by the option's parameter; those that are not in it stand
    under their own name. `config`: the file in which the others stand.
    """
    try:
        yield
    except ValueError as error:
        told = _retold(error, _Options(context, paths or {}), config)
        raise (error if told is None else told) from None


def given_options(context: typer.Context) -> set[str]:
    """Parameters whose options were typed, whatever their value."""
    names = {parameter.name for parameter in context.command.params if parameter.name}
    return {name for name in names if getattr(context.get_parameter_source(name), "name", "") == "COMMANDLINE"}


def flag_of(context: typer.Context, name: str) -> str:
    """The option of a parameter, as it was typed where it has several names."""
    options = next((list(one.opts) for one in context.command.params if one.name == name), [])
    typed = {word.partition("=")[0] for word in sys.argv[1:]}
    return next((option for option in options if option in typed), options[0] if options else name)


def refused_text(error: Exception) -> str:
    """An option's value that is no number, or out of its range, refused in the words of all other values; empty: the
    error is another. The options are read by typer, which has the value from pydantic.
    """
    parameter, context = getattr(error, "param", None), getattr(error, "ctx", None)
    errors = getattr(error.__cause__, "errors", None)
    if parameter is None or context is None or errors is None:
        return ""
    first, bounds = errors()[0], errors()[0].get("ctx", {})
    kinds = {"int": "an integer", "float": "a number"}
    allowed = [text for kind, text in kinds.items() if first["type"].startswith(kind)]
    allowed += [f"{words} {bounds[key]}" for key, words in _BOUNDS.items() if key in bounds]
    if not allowed:
        return ""
    return f"{flag_of(context, parameter.name)}: {first['input']!r} is not allowed; allowed: {', '.join(allowed)}"


def check_sweep_options(context: typer.Context) -> None:
    """ValueError for an option that was given and changes nothing: of a sweep where there is none, of one run where
    there is one.
    """
    given = given_options(context)
    for name in sorted(given):
        if (name.startswith("sweep_") or name == "attainment_target") and not context.params["sweep"]:
            raise ValueError(f"{name}: has no effect without --sweep")
    if "num_prompts" in given and context.params["sweep"]:
        raise ValueError("num_prompts: has no effect with --sweep, whose runs have a length: --sweep-duration")


class _Options:
    def __init__(self, context: typer.Context, paths: Mapping[str, str]) -> None:
        self._context = context
        self._paths = paths
        self._given = given_options(context)

    def behind(self, path: str) -> tuple[str, str, bool]:
        """(the options of a field, the rest of its path, whether one was given); no options: none sets it."""
        for length in range(len(parts := path.split(".")), 0, -1):
            above = ".".join(parts[:length])
            names = [name for name, place in self._paths.items() if place == above] or self._called(above)
            if names:
                typed = [name for name in names if name in self._given]
                flags = [flag_of(self._context, name) for name in typed or names]
                return " or ".join(flags), ".".join(parts[length:]), bool(typed)
        return "", path, False

    def _called(self, field: str) -> list[str]:
        """The parameter with an option of that name, where there is one."""
        option = f"--{field.replace('_', '-')}"
        return [one.name for one in self._context.command.params if one.name and option in one.opts]


def _retold(error: ValueError, options: _Options, config: str | None) -> ValueError | None:
    """None: it is well as it is."""
    path, colon, rest = str(error).partition(": ")
    if isinstance(error, ConfigError):
        path, colon, rest = error.field, ": ", str(error).removeprefix(f"{error.field}: ")
    flags, below, given = options.behind(path)
    if not (colon and flags):
        return None
    if given or config is None:
        return ValueError(f"{flags}{f' ({below})' if below else ''}: {rest}")
    return ValueError(f"{path} (or {flags}): {rest}") if rest.startswith("is missing") else None

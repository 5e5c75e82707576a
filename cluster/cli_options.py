"""Options that several commands of `tandem` have."""

from __future__ import annotations

from typing import Annotated

import typer

API_KEY_VARIABLE = "TANDEM_API_KEY"

Url = Annotated[str, typer.Option("--url", help="The router's HTTP address.")]
Key = Annotated[str | None, typer.Option("--api-key", envvar=API_KEY_VARIABLE, show_envvar=True, help="Client's key.")]
Ca = Annotated[
    str | None,
    typer.Option("--ca", metavar="FILE", help="Who signed the router's certificate (https). [env var: TANDEM_CA]"),
]


def numbers(name: str, text: str) -> tuple[int, ...]:
    """The numbers of an option that takes several. ValueError naming the option."""
    try:
        return tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise ValueError(
            f"{name}: {text!r} is not allowed; allowed: numbers separated by commas, e.g. 1,8,32"
        ) from None

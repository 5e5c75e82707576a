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

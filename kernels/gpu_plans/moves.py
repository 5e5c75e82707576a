"""What of one worker's KV goes where in another's."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """What of a source worker's blocks goes where in a target worker's: ranges of equal length on both sides."""

    num_layers: int
    num_heads: int
    source_layer: int = 0
    target_layer: int = 0
    source_head: int = 0
    target_head: int = 0
    first_token: int = 0
    """Tokens are counted through the ids: token t lies in block ids[t // S], slot t % S."""
    num_tokens: int

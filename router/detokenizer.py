"""Turns one choice's token ids into text as they come, never half a character.

The pieces joined equal `Tokenizer.decode` of the whole sequence, for every sequence: both decode the same bytes, and an
incremental UTF-8 decoder that substitutes U+FFFD does so at the same places as a one-shot one.
"""

from __future__ import annotations

import codecs

from .tokenizer_base import Tokenizer

_Utf8Decoder = codecs.getincrementaldecoder("utf-8")


class Detokenizer:
    """State of one stream: at most three bytes of an unfinished character. Constant work per token."""

    __slots__ = ("_opening", "_skip_special", "_tokenizer", "_utf8")

    def __init__(self, tokenizer: Tokenizer, skip_special: bool = True, *, continuation: bool = False) -> None:
        """`continuation`: the stream follows other text, so that no dummy space of a SentencePiece token is dropped."""
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._opening = not continuation
        self._utf8 = _Utf8Decoder("replace")

    def push(self, token_id: int) -> str:
        """The characters that this token completes; maybe none."""
        if self._skip_special and self._tokenizer.is_special(token_id):
            return ""
        piece = self._tokenizer.token_bytes(token_id)
        if self._opening and piece:
            self._opening = False
            piece = self._tokenizer.opening_bytes(token_id)
        return self._utf8.decode(piece)

    def flush(self) -> str:
        """U+FFFD if the stream ended inside a character, else nothing. Idempotent."""
        return self._utf8.decode(b"", final=True)

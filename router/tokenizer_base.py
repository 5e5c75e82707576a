"""What the router needs of a tokenizer. Every vocabulary is reduced to one fact: the exact bytes behind a token.

Streams, one-shot decoding, logprobs and stop strings are all built on those bytes (`detokenizer`, `output`), so that
they cannot disagree. No torch, no I/O.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable

from .errors import InvalidRequest


class Tokenizer(ABC):
    """Text to token ids and back. Immutable after construction, safe to call from several threads."""

    bos_text: str = ""
    """Text of the token that opens a sequence, for chat templates; empty if the model has none."""
    eos_text: str = ""
    """Text of the end-of-sequence token, for chat templates."""
    eos_token_ids: tuple[int, ...] = ()
    """Tokens that end an answer."""
    chat_template: str | None = None
    """Jinja source; None: the model has no chat format."""

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """One more than the highest token id that has bytes. A model's own vocabulary may be padded beyond it."""

    @abstractmethod
    def encode(self, text: str, *, add_special: bool) -> list[int]:
        """Token ids of `text`; called once a prompt. Special tokens spelled out in `text` become those tokens.

        `add_special` adds what the model wants around a plain prompt (usually BOS); a rendered chat template has it
        already, so pass False there. Raises `InvalidRequest` for text that is not Unicode (lone surrogates).
        """

    @abstractmethod
    def token_bytes(self, token_id: int) -> bytes:
        """The exact bytes of one token inside a text; a special token gives its text; an unknown id gives nothing."""

    def opening_bytes(self, token_id: int) -> bytes:
        """The bytes of a token that opens a text: SentencePiece vocabularies drop the dummy space there."""
        return self.token_bytes(token_id)

    @abstractmethod
    def is_special(self, token_id: int) -> bool:
        """Whether the token is control, not text, so that `skip_special` leaves it out."""

    def decode(self, token_ids: Iterable[int], *, skip_special: bool = True, continuation: bool = False) -> str:
        """The text of a whole sequence; invalid UTF-8 becomes U+FFFD per maximal ill-formed part (Unicode §3.9, as
        WHATWG). `continuation`: the tokens follow other text, so no dummy space is dropped.
        """
        parts: list[bytes] = []
        opening = not continuation
        for token_id in token_ids:
            if skip_special and self.is_special(token_id):
                continue
            piece = self.token_bytes(token_id)
            if opening and piece:
                opening = False
                piece = self.opening_bytes(token_id)
            parts.append(piece)
        return b"".join(parts).decode("utf-8", "replace")


def require_unicode(text: str) -> None:
    """Raises `InvalidRequest` if `text` holds a lone surrogate: JSON can carry one, UTF-8 cannot."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InvalidRequest(
            f"text has U+{ord(text[error.start]):04X} at character {error.start}: a lone surrogate is not a character"
        ) from None

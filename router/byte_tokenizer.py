"""The tokenizer of `dummy:` models, which have random weights and so no vocabulary of their own: a token is a byte.

Ids 0..255 are the bytes; every higher id has a fixed, pronounceable word, so that the stream of a paced worker shows
something a person can follow.
"""

from __future__ import annotations

from .tokenizer_base import Tokenizer, require_unicode

_CONSONANTS = "bdfghklmnprstvwz"
_VOWELS = "aeiou"
_SYLLABLES = tuple(consonant + vowel for consonant in _CONSONANTS for vowel in _VOWELS)

_CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


class ByteTokenizer(Tokenizer):
    """Bytes in, bytes out. Ids above 255 never come from `encode`, only from a model's samples.

    An end-of-sequence id above 255 is special and shows as `<|end|>`; one below stays a byte, so that every text
    survives encoding and decoding.
    """

    def __init__(self, vocab_size: int, *, eos_token_ids: tuple[int, ...] = ()) -> None:
        if vocab_size < 256:
            raise ValueError(f"vocab_size is {vocab_size}; a byte tokenizer needs at least 256")
        self._vocab_size = vocab_size
        self._special = frozenset(token_id for token_id in eos_token_ids if token_id > 255)
        self.eos_token_ids = eos_token_ids
        self.eos_text = "<|end|>" if self._special else ""
        self.chat_template = _CHAT_TEMPLATE

    @property
    def vocab_size(self) -> int:
        return self._vocab_size

    def encode(self, text: str, *, add_special: bool) -> list[int]:
        require_unicode(text)
        return list(text.encode("utf-8"))

    def token_bytes(self, token_id: int) -> bytes:
        if not 0 <= token_id < self._vocab_size:
            return b""
        if token_id < 256:
            return bytes((token_id,))
        if token_id in self._special:
            return b"<|end|>"
        return b" " + _word(token_id - 256).encode("ascii")

    def is_special(self, token_id: int) -> bool:
        return token_id in self._special


def _word(number: int) -> str:
    """A distinct word for each number >= 0: its digits to the base of the syllables, bijective so none repeats."""
    syllables: list[str] = []
    number += len(_SYLLABLES)  # two syllables at least
    while number >= 0:
        number, digit = divmod(number, len(_SYLLABLES))
        syllables.append(_SYLLABLES[digit])
        number -= 1
    return "".join(reversed(syllables))

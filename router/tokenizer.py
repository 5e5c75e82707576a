"""Tokenizers of real models, on Hugging Face's `tokenizers`: from a tokenizer.json, or built from a GGUF's vocabulary.

`tokenizers` encodes. Decoding is done here, from the bytes behind each token (`TokenCodec`), because a stream needs
them exactly and one token at a time. Two families exist among the models that Tandem serves:

- byte-level BPE (GPT-2, OPT, Llama 3, Qwen, SmolLM): each character of a token stands for one byte;
- SentencePiece style (Llama 2, Mistral): U+2581 stands for a space, `<0xNN>` for a byte; a dummy space opens a text.
"""

from __future__ import annotations

import enum
import json
import re
from dataclasses import dataclass
from typing import Any

import tokenizers

from ..cluster.models.gguf import read_gguf_tokenizer
from ..cluster.models.reference import ModelFiles
from .byte_tokenizer import ByteTokenizer
from .gguf_tokenizer import build_gguf_backend
from .hf_tokenizer import read_hf_tokenizer
from .tokenizer_base import Tokenizer, require_unicode

__all__ = ["FastTokenizer", "TokenCodec", "Tokenizer", "load_tokenizer"]

_METASPACE = "\u2581"
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def _gpt2_bytes() -> dict[str, int]:
    """GPT-2's byte alphabet (Radford et al. 2019, encoder.py): printable bytes are themselves, the rest from U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(rest)}


_BYTE_OF_CHAR = _gpt2_bytes()


class _Opening(enum.Enum):
    """What happens to spaces at the start of a text."""

    KEEP = enum.auto()
    DROP_ONE = enum.auto()
    """`Strip(start=1)`: Llama 2, Mistral."""
    DROP_ALL = enum.auto()
    """The `Metaspace` decoder removes every one of the first token."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenCodec:
    """How a token's spelling in the vocabulary becomes bytes; read from tokenizer.json's `decoder`."""

    byte_level: bool = False
    metaspace: bool = False
    byte_fallback: bool = False
    opening: _Opening = _Opening.KEEP

    @classmethod
    def from_decoder(cls, decoder: dict[str, Any] | None) -> TokenCodec:
        """Raises ValueError, naming what is known, for a decoder of neither family."""
        steps = _flatten(decoder)
        kinds = [step.get("type") for step in steps]
        if kinds == ["ByteLevel"]:
            return cls(byte_level=True)
        if kinds == ["Metaspace"] and steps[0].get("replacement") == _METASPACE:
            keeps = steps[0].get("prepend_scheme", "always") == "never"
            return cls(metaspace=True, opening=_Opening.KEEP if keeps else _Opening.DROP_ALL)
        known = _sentencepiece_steps()
        if "Fuse" in kinds and steps == [step for step in known if step in steps]:
            return cls(
                metaspace=known[0] in steps,
                byte_fallback=known[1] in steps,
                opening=_Opening.DROP_ONE if known[3] in steps else _Opening.KEEP,
            )
        raise ValueError(
            f"tokenizer.json: decoder {json.dumps(decoder, ensure_ascii=False)} is not supported; known are ByteLevel, "
            "Metaspace, and Replace(\u2581 -> space), ByteFallback, Fuse, Strip(one leading space)"
        )

    def token_bytes(self, token: str) -> bytes:
        """Inside a text."""
        if self.byte_level:
            # A character outside the alphabet: an added token, written as it is (`tokenizers` has the same rule).
            values = [_BYTE_OF_CHAR.get(char) for char in token]
            return token.encode("utf-8") if None in values else bytes(value for value in values if value is not None)
        if self.byte_fallback and (match := _BYTE_TOKEN.fullmatch(token)):
            return bytes.fromhex(match[1])
        return (token.replace(_METASPACE, " ") if self.metaspace else token).encode("utf-8")

    def opening_bytes(self, token: str) -> bytes:
        """At the start of a text."""
        if self.opening is _Opening.DROP_ALL:
            return token.replace(_METASPACE, "").encode("utf-8")
        piece = self.token_bytes(token)
        return piece.removeprefix(b" ") if self.opening is _Opening.DROP_ONE else piece


def _flatten(decoder: dict[str, Any] | None) -> list[dict[str, Any]]:
    if decoder is None:
        return []
    if decoder.get("type") == "Sequence":
        return [step for nested in decoder.get("decoders", []) for step in _flatten(nested)]
    return [decoder]


def _sentencepiece_steps() -> tuple[dict[str, Any], ...]:
    """The steps that `transformers` writes for SentencePiece models, in the order in which they run."""
    return (
        {"type": "Replace", "pattern": {"String": _METASPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
        {"type": "Strip", "content": " ", "start": 1, "stop": 0},
    )


class FastTokenizer(Tokenizer):
    """A `tokenizers.Tokenizer` with exact bytes per token."""

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        eos_token_ids: tuple[int, ...] = (),
        bos_text: str = "",
        eos_text: str = "",
        chat_template: str | None = None,
    ) -> None:
        """Owns `backend` from here on. Raises ValueError if its decoder is of no known family."""
        backend.no_truncation()  # a tokenizer.json may carry the settings of somebody's training run
        backend.no_padding()
        decoder = json.loads(backend.decoder.__getstate__()) if backend.decoder is not None else None
        self._codec = TokenCodec.from_decoder(decoder)
        self._backend = backend
        self._special = frozenset(i for i, token in backend.get_added_tokens_decoder().items() if token.special)
        self._vocab_size = max(backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        self._bytes: dict[int, bytes] = {}  # filled as tokens are met; bounded by the vocabulary
        self.eos_token_ids = eos_token_ids
        self.bos_text = bos_text
        self.eos_text = eos_text
        self.chat_template = chat_template

    @property
    def vocab_size(self) -> int:
        return self._vocab_size

    def encode(self, text: str, *, add_special: bool) -> list[int]:
        require_unicode(text)
        ids: list[int] = self._backend.encode(text, add_special_tokens=add_special).ids
        return ids

    def token_bytes(self, token_id: int) -> bytes:
        piece = self._bytes.get(token_id)
        if piece is None:
            token = self._token(token_id)
            if token is None:
                return b""
            piece = self._bytes[token_id] = self._codec.token_bytes(token)
        return piece

    def opening_bytes(self, token_id: int) -> bytes:
        token = self._token(token_id)
        return b"" if token is None else self._codec.opening_bytes(token)

    def is_special(self, token_id: int) -> bool:
        return token_id in self._special

    def _token(self, token_id: int) -> str | None:
        if not 0 <= token_id < self._vocab_size:
            return None
        token: str | None = self._backend.id_to_token(token_id)
        return token


def load_tokenizer(files: ModelFiles) -> Tokenizer:
    """The tokenizer of a resolved model. Reads files: call it once, at start.

    Raises ValueError (`ModelError` for a broken GGUF), naming file and reason, if there is none that Tandem can use.
    """
    eos_token_ids = files.config.eos_token_ids
    if files.kind == "dummy":
        return ByteTokenizer(files.config.vocab_size, eos_token_ids=eos_token_ids)
    assert files.path is not None, f"{files.kind} models have files"
    bos_text: str | None
    eos_text: str | None
    if files.kind == "gguf":
        gguf = read_gguf_tokenizer(files.path)
        backend, template = build_gguf_backend(gguf), gguf.chat_template
        bos_text = None if gguf.bos_token_id is None else gguf.tokens[gguf.bos_token_id]
        eos_text = None if gguf.eos_token_id is None else gguf.tokens[gguf.eos_token_id]
    else:
        folder = read_hf_tokenizer(files.path)
        backend, template = folder.backend, folder.chat_template
        bos_text, eos_text = folder.bos_text, folder.eos_text
    if eos_text is None and eos_token_ids:
        eos_text = backend.id_to_token(eos_token_ids[0])
    return FastTokenizer(
        backend, eos_token_ids=eos_token_ids, bos_text=bos_text or "", eos_text=eos_text or "", chat_template=template
    )

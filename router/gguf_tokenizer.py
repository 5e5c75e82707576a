"""A `tokenizers.Tokenizer` from the vocabulary that a GGUF file carries.

A GGUF stores tokens and merges but only the *name* of the rule that splits text before merging; the rules here are
those of the models' own tokenizer.json files, under the names that llama.cpp gave them (src/llama-vocab.cpp).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from ..cluster.models.gguf import GgufTokenizer

_CONTROL, _USER_DEFINED = 3, 4
"""llama.cpp's token types: neither is ever made by merging; control tokens are not text."""

_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2_SPLIT = _LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")  # every digit alone


def _gpt2() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


def _digits_then_gpt2() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _gpt2()])


def _split(*patterns: str) -> pre_tokenizers.PreTokenizer:
    """Cuts the text at every match of each pattern in turn, keeping the matches, then maps bytes to characters."""
    cuts = [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in patterns]
    return pre_tokenizers.Sequence([*cuts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _llama_cpp_default() -> pre_tokenizers.PreTokenizer:
    """What llama.cpp does with files older than `tokenizer.ggml.pre`; right for no model in particular."""
    gpt2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
    return _split(r"[\p{P}\$\+<=>\^~\|]+", gpt2, r"\p{N}+", r"[0-9][0-9][0-9]")


_PRE_TOKENIZERS: dict[str, Callable[[], pre_tokenizers.PreTokenizer]] = {
    "default": _llama_cpp_default,
    "gpt-2": _gpt2,
    "smollm": _digits_then_gpt2,
    "qwen2": lambda: _split(_QWEN2_SPLIT),
    "deepseek-r1-qwen": lambda: _split(_QWEN2_SPLIT),
    "llama-bpe": lambda: _split(_LLAMA3_SPLIT),
    "llama-v3": lambda: _split(_LLAMA3_SPLIT),
    "llama3": lambda: _split(_LLAMA3_SPLIT),
}
_WHOLE_WORDS_FIRST = frozenset({"llama-bpe", "llama-v3", "llama3"})
"""Llama 3 takes a word that is itself a token without merging (`ignore_merges`)."""
_NFC = frozenset({"qwen2", "deepseek-r1-qwen"})


def build_gguf_backend(gguf: GgufTokenizer) -> Tokenizer:
    """The backend for a byte-level BPE (`gpt2`) vocabulary.

    Raises ValueError, naming what is known, for another vocabulary model or an unknown pre-tokenizer: guessing one
    would give plausible but wrong token ids.
    """
    if gguf.model != "gpt2":
        raise ValueError(f"tokenizer.ggml.model is {gguf.model!r}; known is 'gpt2' (byte-level BPE)")
    if gguf.pre not in _PRE_TOKENIZERS:
        raise ValueError(f"tokenizer.ggml.pre is {gguf.pre!r}; known are {', '.join(sorted(_PRE_TOKENIZERS))}")
    vocabulary = {token: token_id for token_id, token in enumerate(gguf.tokens)}
    backend = Tokenizer(
        models.BPE(vocab=vocabulary, merges=_merges(gguf, vocabulary), ignore_merges=gguf.pre in _WHOLE_WORDS_FIRST)
    )
    if gguf.pre in _NFC:
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = _PRE_TOKENIZERS[gguf.pre]()
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = _around(gguf)
    for kind, special in ((_CONTROL, True), (_USER_DEFINED, False)):
        added = [token for token, type_ in zip(gguf.tokens, gguf.token_types, strict=False) if type_ == kind]
        backend.add_tokens([AddedToken(token, special=special, normalized=False) for token in added])
    return backend


def _merges(gguf: GgufTokenizer, vocabulary: Mapping[str, int]) -> list[tuple[str, str]]:
    merges: list[tuple[str, str]] = []
    for merge in gguf.merges:
        left, space, right = merge.partition(" ")
        if not (left and space and right) or " " in right:
            raise ValueError(f"tokenizer.ggml.merges has {merge!r}; a merge is two tokens with one space between")
        for token in (left, right, left + right):
            if token not in vocabulary:
                raise ValueError(f"tokenizer.ggml.merges has {merge!r}, but {token!r} is no token")
        merges.append((left, right))
    return merges


def _around(gguf: GgufTokenizer) -> processors.PostProcessor | None:
    """What `add_special` puts before and after a text."""
    before = gguf.bos_token_id if gguf.add_bos else None
    after = gguf.eos_token_id if gguf.add_eos else None
    if before is None and after is None:
        return None
    names = {token_id: gguf.tokens[token_id] for token_id in (before, after) if token_id is not None}
    template = [
        *([] if before is None else [names[before]]),
        "$A",
        *([] if after is None else [names[after]]),
    ]
    return processors.TemplateProcessing(single=template, special_tokens=[(name, i) for i, name in names.items()])

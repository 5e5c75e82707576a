"""Reads what a Hugging Face model folder says about its tokenizer: tokenizer.json (or vocab.json and merges.txt, as OPT
ships), the texts of BOS and EOS, and the chat template.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors


@dataclass(frozen=True, slots=True, kw_only=True)
class HFTokenizerFiles:
    """The parts of a folder's tokenizer, read and checked."""

    backend: Tokenizer
    bos_text: str | None
    eos_text: str | None
    chat_template: str | None


def read_hf_tokenizer(folder: Path) -> HFTokenizerFiles:
    """Reads `folder`. Raises ValueError, naming the file, if there is no usable tokenizer in it."""
    config = {**_read_json(folder / "special_tokens_map.json"), **_read_json(folder / "tokenizer_config.json")}
    bos_text, eos_text = _token_text(config.get("bos_token")), _token_text(config.get("eos_token"))
    if (folder / "tokenizer.json").is_file():
        backend = _from_tokenizer_json(folder / "tokenizer.json")
    elif (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        backend = _from_gpt2_files(folder, config)
    else:
        raise ValueError(f"{folder} has no tokenizer: needed is tokenizer.json, or vocab.json and merges.txt")
    template = _chat_template(folder, config)
    return HFTokenizerFiles(backend=backend, bos_text=bos_text, eos_text=eos_text, chat_template=template)


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a file; empty if there is no such file."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not an object")
    return content


def _from_tokenizer_json(path: Path) -> Tokenizer:
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception for whatever it does not understand
        raise ValueError(f"{path} cannot be read: {error}") from error


def _from_gpt2_files(folder: Path, config: dict[str, Any]) -> Tokenizer:
    """GPT-2's own format: byte-level BPE whose special tokens stand in the configuration beside it."""
    try:
        bpe = models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt"))
    except Exception as error:  # as above
        raise ValueError(f"{folder}: vocab.json and merges.txt cannot be read: {error}") from error
    backend = Tokenizer(bpe)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=bool(config.get("add_prefix_space", False)))
    backend.decoder = decoders.ByteLevel()
    texts = (_token_text(config.get(name)) for name in ("bos_token", "eos_token", "unk_token", "pad_token"))
    known = dict.fromkeys(text for text in texts if text is not None and backend.token_to_id(text) is not None)
    backend.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in known])
    bos_text = _token_text(config.get("bos_token"))
    if config.get("add_bos_token", False) and bos_text in known:
        bos = (bos_text, backend.token_to_id(bos_text))
        backend.post_processor = processors.TemplateProcessing(single=[bos_text, "$A"], special_tokens=[bos])
    return backend


def _token_text(value: object) -> str | None:
    """A special token is written as text, or as an object with `content`."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _chat_template(folder: Path, config: dict[str, Any]) -> str | None:
    """chat_template.jinja where there is one, else tokenizer_config.json's: a text, or a list of named ones."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):
        named = (entry for entry in template if isinstance(entry, dict) and entry.get("name") == "default")
        template = next((entry.get("template") for entry in named), None)
    return template if isinstance(template, str) else None

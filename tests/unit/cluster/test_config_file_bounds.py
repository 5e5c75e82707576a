"""A configuration file that means harm: what it may unfold to, how deep and how long it may be."""

from __future__ import annotations

from pathlib import Path

import pytest
from tandem.cluster.config import ConfigError
from tandem.cluster.config_file import MAX_FILE_BYTES, load_config

LAUGHS = "a: &a [1, 2, 3, 4, 5, 6, 7, 8]\n" + "".join(
    f"{chr(name + 1)}: &{chr(name + 1)} [{', '.join([f'*{chr(name)}'] * 8)}]\n" for name in range(97, 110)
)
MERGED = LAUGHS.replace("[1, 2, 3, 4, 5, 6, 7, 8]", "{k: 1}").replace("[", "{<<: [").replace("]", "]}")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (LAUGHS, "aliases that unfold to too much"),
        (MERGED, "aliases that unfold to too much"),
        ("a: &a [*a]", "an alias inside its own value"),
        ("[" * 5000, "nested too deeply"),
        ("{a: " * 5000, "nested too deeply"),
        ("#" * (MAX_FILE_BYTES + 1), f"a file of at most {MAX_FILE_BYTES} bytes"),
        ("a: 2001-99-99", "valid YAML"),
        ("a: !!python/object/apply:os.system [id]", "valid YAML"),
    ],
    ids=["aliases", "merged aliases", "itself", "lists", "sections", "length", "date", "object"],
)
def test_it_is_refused_at_once(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=words):
        load_config(path)


def test_aliases_are_allowed_within_reason(tmp_path: Path) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_text(
        "model: dummy:tiny-llama\nengine: &e {device: paced}\nprefill: {engine: {<<: *e, max_batched_tokens: 64}}\n"
    )
    config = load_config(path)
    assert config.prefill_engine is not None
    assert (config.prefill_engine.device, config.prefill_engine.max_batched_tokens) == ("paced", 64)

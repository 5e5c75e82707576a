"""Sizes of published models, and how they are split."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tandem.cluster.latency.model_facts import ModelFacts, model_facts, registered_name
from tandem.cluster.models.registry import CONFIGS

PUBLISHED = {
    "opt-125m": 125_239_296,
    "opt-1.3b": 1_315_758_080,
    "opt-2.7b": 2_651_596_800,
    "opt-6.7b": 6_658_473_984,
    "opt-13b": 12_853_473_280,
    "opt-30b": 29_974_540_288,
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "llama-2-70b": 68_976_648_192,
    "llama-3-8b": 8_030_261_248,
    "llama-3-70b": 70_553_706_496,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "llama-3.3-70b": 70_553_706_496,
    "qwen2-0.5b": 494_032_768,
    "qwen2-1.5b": 1_543_714_304,
    "qwen2-7b": 7_615_616_512,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-3b": 3_085_938_688,
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-14b": 14_770_033_664,
    "qwen2.5-32b": 32_763_876_352,
    "qwen2.5-72b": 72_706_203_648,
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "qwen3-14b": 14_768_307_200,
    "qwen3-32b": 32_762_123_264,
    "smollm2-135m": 134_515_008,
    "smollm2-360m": 361_821_120,
    "smollm2-1.7b": 1_711_376_384,
}
"""Parameters that the models' own files hold, as their publishers count them."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_the_published_ones(name: str) -> None:
    assert model_facts(name).parameters == PUBLISHED[name]


ROUND_BILLIONS = {"opt-66b": 66, "opt-175b": 175, "qwen2-72b": 72.7}
"""Where only a round number is published: OPT's paper (Zhang et al. 2022, table 1), Qwen2's report (table 1)."""


@pytest.mark.parametrize("name", ROUND_BILLIONS)
def test_parameters_are_near_the_published_round_number(name: str) -> None:
    assert model_facts(name).parameters == pytest.approx(ROUND_BILLIONS[name] * 1e9, rel=0.01)


def test_every_registered_model_is_held_against_what_its_publisher_says() -> None:
    assert {name for name in CONFIGS if not name.startswith("tiny-")} == PUBLISHED.keys() | ROUND_BILLIONS.keys()


@pytest.mark.parametrize(
    ("name", "kv_heads", "tied", "vocabulary", "kv_bytes_per_token"),
    [
        ("opt-13b", 40, True, 50272, 2 * 40 * 5120 * 2),
        ("opt-66b", 72, True, 50272, 2 * 64 * 9216 * 2),
        ("opt-175b", 96, True, 50272, 2 * 96 * 12288 * 2),
        ("llama-2-7b", 32, False, 32000, 2 * 32 * 4096 * 2),
        ("llama-2-70b", 8, False, 32000, 2 * 80 * 1024 * 2),
        ("llama-3.1-8b", 8, False, 128256, 2 * 32 * 1024 * 2),
        ("llama-3.2-1b", 8, True, 128256, 2 * 16 * 512 * 2),
        ("qwen2-7b", 4, False, 152064, 2 * 28 * 512 * 2),
        ("qwen2.5-0.5b", 2, True, 151936, 2 * 24 * 128 * 2),
        ("qwen3-0.6b", 8, True, 151936, 2 * 28 * 1024 * 2),
        ("qwen3-32b", 8, False, 151936, 2 * 64 * 1024 * 2),
        ("smollm2-135m", 3, True, 49152, 23040),
    ],
)
def test_heads_tables_and_kv_are_those_of_the_published_configs(
    name: str, kv_heads: int, tied: bool, vocabulary: int, kv_bytes_per_token: int
) -> None:
    facts = model_facts(name)
    c = facts.config
    assert (c.num_kv_heads, c.tie_word_embeddings, c.vocab_size) == (kv_heads, tied, vocabulary)
    assert facts.kv_bytes_per_token() == kv_bytes_per_token


@pytest.mark.parametrize(
    ("written", "name"),
    [
        ("facebook/opt-13b", "opt-13b"),
        ("OPT-13B", "opt-13b"),
        ("meta-llama/Llama-3.1-8B", "llama-3.1-8b"),
        ("meta-llama/Meta-Llama-3-8B-Instruct", "llama-3-8b"),
        ("meta-llama/Llama-2-7b-chat-hf", "llama-2-7b"),
        ("llama3.1-8b", "llama-3.1-8b"),
        ("Qwen/Qwen2.5-7B-Instruct", "qwen2.5-7b"),
        ("HuggingFaceTB/SmolLM2-135M-Instruct", "smollm2-135m"),
    ],
)
def test_models_are_found_by_the_names_people_write(written: str, name: str) -> None:
    assert registered_name(written) == name


def test_no_two_models_have_names_of_the_same_letters() -> None:
    assert {registered_name(name) for name in CONFIGS} == set(CONFIGS)


@pytest.mark.parametrize(("written", "near"), [("opt-31b", "opt-30b"), ("meta-llama/Llama-3.1-9B", "llama-3.1-8b")])
def test_an_unknown_model_is_refused_with_the_nearest(written: str, near: str) -> None:
    with pytest.raises(ValueError, match=rf"{written}.*did you mean '{near}'"):
        model_facts(written)


def test_facts_come_from_a_config_file(tmp_path: Path) -> None:
    folder = tmp_path / "my-model"
    folder.mkdir()
    config = {
        "model_type": "llama", "vocab_size": 128256, "hidden_size": 4096, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 14336, "rope_theta": 500000.0,
        "max_position_embeddings": 8192, "hidden_act": "silu", "rms_norm_eps": 1e-5,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    for reference in (folder, folder / "config.json"):
        facts = model_facts(str(reference))
        assert facts.name == "my-model"
        assert facts.parameters == PUBLISHED["llama-3-8b"]
    with pytest.raises(ValueError, match="there is no such file"):
        model_facts(str(tmp_path / "other" / "config.json"))


def test_kv_of_opt_66b_is_what_distserve_says() -> None:
    """DistServe §3.3: 512 tokens of OPT-66B are about 1.13 GB (binary ones)."""
    assert model_facts("opt-66b").kv_bytes_per_token() * 512 == pytest.approx(1.13 * 2**30, rel=0.01)


def test_ranks_hold_their_share() -> None:
    facts = model_facts("llama-2-70b")
    whole = facts.parameters * 2
    assert facts.weight_bytes_per_rank() == whole
    assert facts.weight_bytes_per_rank(8) == whole // 8
    assert facts.stage_layers(3) == [27, 27, 26]
    assert whole / 4 < facts.weight_bytes_per_rank(1, 4) < 1.02 * whole / 4
    assert facts.kv_bytes_per_token() == 2 * 80 * 8 * 128 * 2
    assert facts.kv_bytes_per_token_per_rank(4, 2) == 2 * 40 * 2 * 128 * 2
    assert facts.kv_bytes_per_token_per_rank(16) == facts.kv_bytes_per_token_per_rank(8), "KV heads are repeated"


def test_a_shared_table_stands_in_both_ends_of_a_pipeline() -> None:
    facts = model_facts("smollm2-135m")
    table = 49152 * 576
    assert facts.weight_bytes_per_rank(1, 2) == 2 * (15 * facts.layer_parameters + table + 576)


def test_precisions_have_their_bytes() -> None:
    facts = model_facts("opt-13b", dtype="int8")
    assert (facts.weight_dtype_bytes, facts.kv_dtype_bytes, facts.activation_bytes) == (1, 2, 2)
    assert model_facts("opt-13b", dtype="float32").kv_dtype_bytes == 4
    with pytest.raises(ValueError, match=r"dtype: 'int4' is not allowed; allowed: one of float32, bfloat16"):
        ModelFacts(name="x", config=CONFIGS["opt-13b"], dtype="int4")


@pytest.mark.parametrize(
    ("parallel", "error"),
    [
        ((3, 1), "tensor_parallel: 3 is not allowed for opt-13b with 40 heads; allowed: 1, 2, 4, 5"),
        ((0, 1), "tensor_parallel: 0"),
        ((1, 41), "pipeline_stages: 41 is not allowed for opt-13b; allowed: 1 to its 40 layers"),
        ((1, 0), "pipeline_stages: 0"),
    ],
)
def test_a_split_that_the_model_does_not_allow_is_refused(parallel: tuple[int, int], error: str) -> None:
    facts = model_facts("opt-13b")
    for ask in (facts.weight_bytes_per_rank, facts.kv_bytes_per_token_per_rank):
        with pytest.raises(ValueError, match=error):
            ask(*parallel)

"""A promise all the way through: who is due first is served first on the workers too, whatever is under way there."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from tandem.cluster.config import EngineConfig
from tandem.cluster.types import Role

LONG, BUDGET = 8000, 256
Start = Callable[..., Any]
Paced = Callable[..., EngineConfig]


@pytest.fixture
def long_model(tmp_path: Path) -> str:
    """The architecture of `dummy:tiny-llama` with room for long contexts."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 160,
        "max_position_embeddings": 16384,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "vocab_size": 512,
        "eos_token_id": 2,
        "bos_token_id": 1,
        "tie_word_embeddings": True,
        "hidden_act": "silu",
    }
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    return f"dummy:{path}"


def test_an_interactive_prompt_does_not_wait_for_a_long_batch_prompt_under_way(
    start_cluster: Start, paced: Paced, long_model: str, wait: Start
) -> None:
    cluster = start_cluster(paced(model=long_model, max_batched_tokens=BUDGET, max_running=64))
    cluster.add(Role.PREFILL, paced_prefill_token_s=0.0004)
    cluster.add(Role.DECODE)
    cluster.wait_ready()
    for n in range(10):  # what a step takes is known
        cluster.grpc.generate(token_ids=[n + 1] * 20, max_tokens=1, temperature=0).collect()
    before = cluster.status("prefill-0").computed_tokens_total

    def computed() -> int:
        return int(cluster.status("prefill-0").computed_tokens_total - before)

    with ThreadPoolExecutor(1) as pool:
        prompt = [n % 200 + 1 for n in range(LONG)]
        batch = pool.submit(
            cluster.grpc.generate(token_ids=prompt, max_tokens=2, temperature=0, slo_class="batch").collect
        )
        wait(lambda: computed() >= 2 * BUDGET, "the long prompt to be under way")
        begun = computed()
        chat = cluster.grpc.generate(token_ids=[7] * 300, max_tokens=2, temperature=0, slo_class="interactive")
        assert next(iter(chat)).token_ids
        chunks = -(-(computed() - begun) // BUDGET)
        assert chunks <= 8, f"{chunks} chunks until the first token, of {LONG // BUDGET} for the long prompt"
        assert not batch.done()
        assert len(batch.result(60).token_ids) == 2
    cluster.wait_clean()

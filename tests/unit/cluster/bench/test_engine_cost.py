import pytest
from tandem.cluster.bench.engine_cost import RowShape, StepCost, seen_keys, step_cost, step_weight_bytes
from tandem.cluster.models.config import Architecture, ModelConfig

# C 4, H 2, K 1, D 2, F 6, V 10, L 2; per layer qkv 4x8, out 4x4, gate and up 4x12, down 6x4
CONFIG = ModelConfig(
    architecture=Architecture.LLAMA,
    vocab_size=10,
    hidden_size=4,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=2,
    intermediate_size=6,
    max_model_len=64,
)
QKV, REST, HEAD = 2 * 4 * 8, 2 * (4 * 4 + 4 * 12 + 6 * 4), 2 * 10 * 4


def test_decode_row_computes_everything_and_reads_its_context():
    cost = step_cost(CONFIG, [RowShape(5, 1, True)], weight_bytes=1000, kv_token_bytes=7)
    assert cost == StepCost(1000 + 6 * 7, 2 * REST + HEAD, 2 * QKV, 4 * 2 * 2 * (6 + 6))


def test_last_layer_counts_for_the_sampled_token_only():
    chunk = step_cost(CONFIG, [RowShape(0, 3, False)], weight_bytes=0, kv_token_bytes=0)
    whole = step_cost(CONFIG, [RowShape(0, 3, True)], weight_bytes=0, kv_token_bytes=0)
    assert (chunk.linear_flops, chunk.qkv_flops) == (3 * REST, 3 * 2 * QKV)
    assert whole.qkv_flops == chunk.qkv_flops
    assert whole.linear_flops - chunk.linear_flops == REST + HEAD
    assert chunk.attention_flops == 4 * 2 * 2 * (1 + 2 + 3)
    assert whole.attention_flops - chunk.attention_flops == 4 * 2 * 2 * 3


@pytest.mark.parametrize(("start", "length"), [(0, 1), (0, 9), (3, 2), (2, 6), (7, 4)])
def test_seen_keys_of_a_sliding_window(start, length):
    from dataclasses import replace

    window = replace(CONFIG, sliding_window=4)
    assert seen_keys(window, start, length) == sum(min(p + 1, 4) for p in range(start, start + length))
    assert seen_keys(CONFIG, start, length) == sum(p + 1 for p in range(start, start + length))


def test_weights_of_a_step_by_precision():
    elements = 2 * (4 * 8 + 4 * 4 + 4 * 12 + 6 * 4) + 10 * 4
    assert step_weight_bytes(CONFIG, "float32") == 4 * elements
    assert step_weight_bytes(CONFIG, "bfloat16") == 2 * elements
    assert step_weight_bytes(CONFIG, "w8a8") == elements + 2 * (4 * 8) + 4 * (2 * (4 + 12 + 4) + 10)

"""How a checkpoint of the Llama family names our tensors (`cluster.engine.weight_source`)."""

from __future__ import annotations

_GLOBAL = {"embed": "model.embed_tokens", "final_norm": "model.norm", "head": "lm_head"}
_LAYER = {
    "attention_norm": "input_layernorm",
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "attention_out": "self_attn.o_proj",
    "mlp_norm": "post_attention_layernorm",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}


def hf_name(name: str) -> str:
    """Of our `layers.0.q.weight`, say, the name that Hugging Face's files have."""
    *prefix, part, kind = name.split(".")
    return f"model.layers.{prefix[1]}.{_LAYER[part]}.{kind}" if prefix else f"{_GLOBAL[part]}.{kind}"

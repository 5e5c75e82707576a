"""transformers on our weights: its continuous batching, and its plain `generate` over one batch. Each is timed from its
requests to its last token, after a run that warms it up.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence
from typing import Any

import torch
from engine_rig import Ran, Rig
from tandem.cluster.models.config import ModelConfig

_WARM_TOKENS = 4


@functools.cache
def is_here() -> bool:
    """Whether the comparison can be made here."""
    try:
        import transformers
    except ImportError:
        return False
    return hasattr(transformers.LlamaForCausalLM, "continuous_batching_context_manager")


def continuous(model: Any, prompts: Sequence[list[int]], output_tokens: int) -> tuple[Ran, str]:
    """By its continuous batching, with room for these prompts and none of their blocks shared, as ours; and which
    attention it used: it picks FlashAttention where that is installed. RuntimeError where not all tokens came.
    """
    from transformers import ContinuousBatchingConfig
    from transformers.generation.continuous_batching.utils import WorkloadHints

    longest = max(map(len, prompts))
    hints = WorkloadHints(max_prompt_length=longest, max_generated_length=output_tokens, num_requests=len(prompts))
    options: dict[str, Any] = {"allow_block_sharing": False}
    if model.device.type != "cuda":  # a dry run, else it takes most of the machine's memory
        options |= {"num_blocks": 2 * len(prompts), "max_batch_tokens": 64}
    with model.continuous_batching_context_manager(
        generation_config=_greedy(output_tokens),
        continuous_batching_config=ContinuousBatchingConfig(**options),
        timeout=20,
        workload_hints=hints,
    ) as manager:
        _served(manager, prompts, min(_WARM_TOKENS, output_tokens))
        ran = _served(manager, prompts, output_tokens)
        return ran, str(model.config._attn_implementation)


def _served(manager: Any, prompts: Sequence[list[int]], output_tokens: int) -> Ran:
    begin_s = time.perf_counter()
    names = manager.add_requests(inputs=list(prompts), max_new_tokens=output_tokens)
    found: dict[str, Any] = {}
    while len(found) < len(names):
        result = manager.get_result(timeout=1.0)
        if result is None and not manager.is_running():
            raise RuntimeError(f"its thread has ended: {len(found)} of {len(names)} requests are done")
        if result is not None and result.is_finished():
            if result.error is not None:
                raise RuntimeError(f"a request failed: {result.error}")
            found[result.request_id] = result
    taken_s = time.perf_counter() - begin_s
    tokens = {str(index): list(found[name].generated_tokens) for index, name in enumerate(names)}
    return Ran(tokens, taken_s).of_length(output_tokens)


def static(model: Any, prompts: Sequence[list[int]], output_tokens: int) -> tuple[Ran, str]:
    """By `generate`, all prompts (of one length) as one batch from the first step to the last; and its attention."""
    ids = torch.tensor(prompts, device=model.device)

    def run(count: int) -> Ran:
        begin_s = time.perf_counter()
        config = _greedy(count)
        tokens = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config).tolist()
        taken_s = time.perf_counter() - begin_s
        return Ran({str(index): row[ids.shape[1] :] for index, row in enumerate(tokens)}, taken_s).of_length(count)

    run(min(_WARM_TOKENS, output_tokens))
    return run(output_tokens), str(model.config._attn_implementation)


def _greedy(output_tokens: int) -> Any:
    from transformers import GenerationConfig

    return GenerationConfig(max_new_tokens=output_tokens, do_sample=False, eos_token_id=-1, pad_token_id=0)


def model_of(rig: Rig) -> torch.nn.Module:
    """The same weights as a model of transformers'."""
    from transformers import LlamaConfig, LlamaForCausalLM

    c = rig.config
    theirs = LlamaConfig(
        vocab_size=c.vocab_size,
        hidden_size=c.hidden_size,
        intermediate_size=c.intermediate_size,
        num_hidden_layers=c.num_layers,
        num_attention_heads=c.num_heads,
        num_key_value_heads=c.num_kv_heads,
        head_dim=c.head_dim,
        max_position_embeddings=c.max_model_len,
        rms_norm_eps=c.norm_eps,
        tie_word_embeddings=c.tie_word_embeddings,
        rope_parameters=_rope(c),
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(theirs)
    model.load_state_dict(_named(rig), assign=True)
    rotary = type(model.model.rotary_emb)(theirs)  # its tables are no weights, and were made nowhere
    model.model.rotary_emb = rotary
    model.tie_weights()
    return model.to(rig.device).eval()


def _rope(c: ModelConfig) -> dict[str, object]:
    if c.rope_scaling is None:
        return {"rope_type": "default", "rope_theta": c.rope_theta}
    scaling = c.rope_scaling
    return {
        "rope_type": "llama3",
        "rope_theta": c.rope_theta,
        "factor": scaling.factor,
        "low_freq_factor": scaling.low_freq_factor,
        "high_freq_factor": scaling.high_freq_factor,
        "original_max_position_embeddings": scaling.original_max_position,
    }


def _named(rig: Rig) -> dict[str, torch.Tensor]:
    """Parameters by transformers' names."""
    c, weights = rig.config, rig.model.weights
    named = {"model.embed_tokens.weight": weights.embed.weight, "model.norm.weight": weights.final_norm.weight}
    named["lm_head.weight"] = weights.head._weight
    for index, layer in enumerate(weights.layers):
        place = f"model.layers.{index}"
        counts = [heads * c.head_dim for heads in (c.num_heads, c.num_kv_heads, c.num_kv_heads)]
        for name, part in zip("qkv", layer.qkv._weight.split(counts), strict=True):
            named[f"{place}.self_attn.{name}_proj.weight"] = part
        named[f"{place}.self_attn.o_proj.weight"] = layer.attention_out._weight
        gate, up = layer.up._weight.chunk(2)
        named |= {f"{place}.mlp.gate_proj.weight": gate, f"{place}.mlp.up_proj.weight": up}
        named[f"{place}.mlp.down_proj.weight"] = layer.down._weight
        named[f"{place}.input_layernorm.weight"] = layer.attention_norm.weight
        named[f"{place}.post_attention_layernorm.weight"] = layer.mlp_norm.weight
    # Copies: ours were made under inference mode, and would not be taken.
    return {name: torch.nn.Parameter(value.to(torch.bfloat16, copy=True)) for name, value in named.items()}

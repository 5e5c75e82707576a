"""The same weights in the forms that the peers read: `folder` writes a model as a Hugging Face folder.

    python tests/peers/peer_models.py smollm2-135m --out DIR              # bfloat16
    python tests/peers/peer_models.py smollm2-135m --out DIR --int8       # W8A8 in compressed-tensors' form

The int8 form holds linears as int8 with one float32 scale per output channel, symmetric, round to nearest, and asks for
activations quantized per token at run time; the head stays bfloat16. Nothing is calibrated: it is for timing.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "common"))  # modules that tests of several folders share

import torch
from llama_names import hf_name
from safetensors.torch import save_file
from tandem.cluster.engine.weight_source import WeightSource, expected_shapes
from tandem.cluster.engine.weights import open_weights
from tandem.cluster.models.config import Architecture, ModelConfig
from tandem.cluster.models.reference import ModelFiles, resolve_model

INT8_MAX = 127


def hf_config(config: ModelConfig, *, int8: bool) -> dict[str, Any]:
    """`config.json` of a Llama model. ValueError for another architecture."""
    if config.architecture is not Architecture.LLAMA or config.rope_scaling is not None or config.sliding_window:
        raise ValueError(f"model: {config.architecture} with these facts is not allowed; allowed: a plain llama")
    fields: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "torch_dtype": "bfloat16",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_model_len,
        "rms_norm_eps": config.norm_eps,
        "hidden_act": config.activation,
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": config.tie_word_embeddings,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_ids[0] if config.eos_token_ids else None,
    }
    if int8:
        fields["quantization_config"] = _INT8_CONFIG
    return fields


_INT8 = {"num_bits": 8, "type": "int", "symmetric": True}
_INT8_CONFIG = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "quantization_status": "compressed",
    "ignore": ["lm_head"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {**_INT8, "strategy": "channel", "dynamic": False},
            "input_activations": {**_INT8, "strategy": "token", "dynamic": True},
        }
    },
}


def quantize(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[O, I] -> int8 [O, I] and the scales [O, 1] float32 of its output channels."""
    scale = weight.float().abs().amax(dim=1, keepdim=True).clamp(min=1e-12) / INT8_MAX
    return torch.round(weight.float() / scale).to(torch.int8), scale


def tensors(source: WeightSource, config: ModelConfig, *, int8: bool) -> dict[str, torch.Tensor]:
    """All tensors of the checkpoint."""
    found: dict[str, torch.Tensor] = {}
    for name, shape in expected_shapes(config).items():
        value = source.read(name)
        if int8 and name.startswith("layers.") and len(shape) == 2:
            found[hf_name(name)], scale = quantize(value)
            found[hf_name(name) + "_scale"] = scale
        else:
            found[hf_name(name)] = value.to(torch.bfloat16).clone()
    source.release()
    return found


def write_folder(files: ModelFiles, folder: Path, *, int8: bool) -> None:
    """Writes weights, config and tokenizer; the config last, so that a folder that has one is whole."""
    folder.mkdir(parents=True, exist_ok=True)
    found = tensors(open_weights(files), files.config, int8=int8)
    save_file(found, folder / "model.safetensors", metadata={"format": "pt"})
    if files.kind == "gguf":
        _write_tokenizer(files, folder)
    config = json.dumps(hf_config(files.config, int8=int8), indent=1)
    (folder / "config.json").write_text(config + "\n", encoding="utf-8")


def _write_tokenizer(files: ModelFiles, folder: Path) -> None:
    from tandem.cluster.models.gguf import read_gguf_tokenizer
    from tandem.router.gguf_tokenizer import build_gguf_backend

    assert files.path is not None
    stored = read_gguf_tokenizer(files.path)
    build_gguf_backend(stored).save(str(folder / "tokenizer.json"))
    facts = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": None if stored.bos_token_id is None else stored.tokens[stored.bos_token_id],
        "eos_token": None if stored.eos_token_id is None else stored.tokens[stored.eos_token_id],
        "chat_template": stored.chat_template,
        "model_max_length": files.config.max_model_len,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


def folder(model: str, root: Path, *, int8: bool) -> Path:
    """The checkpoint of `model` below `root`, written where it is not there yet. Raises ModelError, ValueError."""
    path = root / f"{model.replace('/', '_').replace(':', '_')}-{'w8a8' if int8 else 'bf16'}"
    if not (path / "config.json").is_file():
        write_folder(resolve_model(model), path, int8=int8)
    return path


def gguf_file(model: str) -> Path:
    """The GGUF file of a model. ValueError if it has none."""
    files = resolve_model(model)
    if files.kind != "gguf" or files.path is None:
        raise ValueError(f"model: {model!r} is not allowed; allowed: a model of which there is a GGUF file")
    return files.path


def main() -> None:
    """Writes one folder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--int8", action="store_true")
    options = parser.parse_args()
    write_folder(resolve_model(options.model), options.out, int8=options.int8)


if __name__ == "__main__":
    main()

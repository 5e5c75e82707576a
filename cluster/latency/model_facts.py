"""What costs and memory depend on in a model: sizes, parameters, bytes. Pure.

From a `config.json` or a name as people write it (`meta-llama/Llama-3.1-8B-Instruct`, `facebook/opt-13b`, `opt-13b`).
Tensor parallelism splits heads, feed-forward and vocabulary evenly, and repeats KV heads where there are fewer than
ranks (Shoeybi et al., Megatron-LM, 2019, §3); pipeline parallelism splits layers, earlier stages having one more where
they do not come out even; embedding and output head stand in the first and the last stage.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from ..config_schema import nearest
from ..models.config import ModelConfig
from ..models.errors import ModelError
from ..models.hf_config import CONFIG_NAME, load_hf_config
from ..models.registry import CONFIGS

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "fp8": 1, "int8": 1}
_OPT_POSITION_OFFSET = 2
_VARIANT = re.compile(r"[-_](hf|instruct|chat|base|it|v0\.\d)$")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFacts:
    """Sizes of one model in one precision. A sliding window is not counted: its KV is taken for the whole context."""

    name: str
    config: ModelConfig
    dtype: str = "bfloat16"
    """Of weights and activations."""
    kv_dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        for field in ("dtype", "kv_dtype"):
            value = getattr(self, field)
            if value not in DTYPE_BYTES:
                raise ValueError(f"{field}: {value!r} is not allowed; allowed: one of {', '.join(DTYPE_BYTES)}")

    @property
    def weight_dtype_bytes(self) -> int:
        """Of one parameter."""
        return DTYPE_BYTES[self.dtype]

    @property
    def kv_dtype_bytes(self) -> int:
        """Of one element of KV."""
        return DTYPE_BYTES[self.kv_dtype]

    @property
    def activation_bytes(self) -> int:
        """Of one element of an activation: 8-bit models compute between their products in 16 bits."""
        return max(self.weight_dtype_bytes, 2)

    @property
    def layer_parameters(self) -> int:
        """Of one decoder layer, biases and norms included."""
        c = self.config
        queries, keys = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
        attention = c.hidden_size * (queries + 2 * keys) + queries * c.hidden_size
        attention += (queries + 2 * keys) * c.qkv_bias + c.hidden_size * c.attention_out_bias
        into = 2 if c.gated_mlp else 1
        mlp = (into + 1) * c.hidden_size * c.intermediate_size
        mlp += (into * c.intermediate_size + c.hidden_size) * c.mlp_bias
        norms = 2 * c.hidden_size * (2 if c.norm == "layer" else 1) + 2 * c.head_dim * c.qk_norm
        return attention + mlp + norms

    @property
    def embedding_parameters(self) -> int:
        """Of what stands before the first layer: token table, learned positions, a projection into the width."""
        c = self.config
        width = c.embed_dim or c.hidden_size
        positions = (c.max_model_len + _OPT_POSITION_OFFSET) * c.hidden_size if c.learned_positions else 0
        projection = width * c.hidden_size if width != c.hidden_size else 0
        return c.vocab_size * width + positions + projection

    @property
    def head_parameters(self) -> int:
        """Of what stands after the last layer: final norm, projection, output head (also where it shares the table)."""
        c = self.config
        width = c.embed_dim or c.hidden_size
        norm = c.hidden_size * (2 if c.norm == "layer" else 1) if c.norm_before else 0
        projection = width * c.hidden_size if width != c.hidden_size else 0
        return c.vocab_size * width + norm + projection

    @property
    def parameters(self) -> int:
        """Of the whole model; a shared table counts once."""
        c = self.config
        shared = c.vocab_size * (c.embed_dim or c.hidden_size) if c.tie_word_embeddings else 0
        return c.num_layers * self.layer_parameters + self.embedding_parameters + self.head_parameters - shared

    def stage_layers(self, pipeline_stages: int) -> list[int]:
        """Layers of each stage, [stages]."""
        each, more = divmod(self.config.num_layers, pipeline_stages)
        return [each + (stage < more) for stage in range(pipeline_stages)]

    def weight_bytes_per_rank(self, tensor_parallel: int = 1, pipeline_stages: int = 1) -> int:
        """Of the rank that holds most. ValueError for a split that the model does not allow."""
        self.check_parallel(tensor_parallel, pipeline_stages)
        layers = self.stage_layers(pipeline_stages)
        if pipeline_stages == 1:
            most = self.parameters
        else:
            held = [count * self.layer_parameters for count in layers]
            held[0] += self.embedding_parameters
            held[-1] += self.head_parameters  # a shared table stands in both of these stages
            most = max(held)
        return -(-most * self.weight_dtype_bytes // tensor_parallel)

    def kv_bytes_per_token(self) -> int:
        """Of all layers and KV heads: what a handoff moves for each token of the context."""
        c = self.config
        return 2 * c.num_layers * c.num_kv_heads * c.head_dim * self.kv_dtype_bytes

    def kv_bytes_per_token_per_rank(self, tensor_parallel: int = 1, pipeline_stages: int = 1) -> int:
        """Of the rank that holds most."""
        self.check_parallel(tensor_parallel, pipeline_stages)
        heads = -(-self.config.num_kv_heads // tensor_parallel)
        return 2 * max(self.stage_layers(pipeline_stages)) * heads * self.config.head_dim * self.kv_dtype_bytes

    def check_parallel(self, tensor_parallel: int, pipeline_stages: int) -> None:
        """ValueError, naming what is allowed, for a split that the model's heads or layers do not allow."""
        heads, layers = self.config.num_heads, self.config.num_layers
        if tensor_parallel < 1 or heads % tensor_parallel:
            allowed = ", ".join(str(count) for count in range(1, heads + 1) if heads % count == 0)
            raise ValueError(
                f"tensor_parallel: {tensor_parallel} is not allowed for {self.name} with {heads} heads; "
                f"allowed: {allowed}"
            )
        if not 1 <= pipeline_stages <= layers:
            raise ValueError(
                f"pipeline_stages: {pipeline_stages} is not allowed for {self.name}; allowed: 1 to its {layers} layers"
            )


def model_facts(reference: str, *, dtype: str = "bfloat16", kv_dtype: str | None = None) -> ModelFacts:
    """Facts of a registered model by name, or of a `config.json` by its path or its folder's. Fetches nothing.

    `kv_dtype` None: that of the weights, or bfloat16 where those have 8 bits. Raises ModelError (a ValueError) naming
    the nearest known model, or what the file lacks.
    """
    kv = kv_dtype or (dtype if DTYPE_BYTES.get(dtype, 2) >= 2 else "bfloat16")
    path = Path(reference).expanduser()
    if path.name == CONFIG_NAME or (path / CONFIG_NAME).is_file():
        if not path.exists():
            raise ModelError(f"model {reference!r}: there is no such file")
        folder = path if path.is_dir() else path.parent
        return ModelFacts(name=folder.resolve().name, config=load_hf_config(path), dtype=dtype, kv_dtype=kv)
    name = registered_name(reference)
    return ModelFacts(name=name, config=CONFIGS[name], dtype=dtype, kv_dtype=kv)


def registered_name(reference: str) -> str:
    """The registry's name of a published model: `meta-llama/Meta-Llama-3-8B-Instruct` is `llama-3-8b`. ModelError
    naming the nearest one.
    """
    plain = reference.rsplit("/", 1)[-1].lower().removeprefix("meta-")
    while _VARIANT.search(plain):
        plain = _VARIANT.sub("", plain)
    by_letters = {_letters(name): name for name in CONFIGS}
    if _letters(plain) in by_letters:
        return by_letters[_letters(plain)]
    near = nearest(plain, CONFIGS)
    hint = f" (did you mean {near!r}?)" if near else ""
    raise ModelError(
        f"model {reference!r} is not known{hint}; allowed: a {CONFIG_NAME}, its folder, or one of {', '.join(CONFIGS)}"
    )


def _letters(name: str) -> str:
    return re.sub(r"[-_ ]", "", name)

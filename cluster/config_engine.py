"""The engine's section of a configuration: one model replica and what it runs on. Frozen and checked as all of
`cluster.config` is, which hands it on.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated

from .config_schema import Bytes, ConfigError, OneOf, Text, Within, check
from .config_sections import Line

StepSeconds = Annotated[float, Within(0, 60)]
_HOST_KV_BYTES = 512 * 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """One model replica: its model, device, KV memory and batch limits."""

    model: Line = "smollm2-135m"
    device: Annotated[str, OneOf(("cpu", "cuda", "paced"))] = "cpu"
    """`cpu`, `cuda` (one GPU) or `paced`."""
    dtype: Annotated[str, OneOf(("bfloat16", "float32"))] = "bfloat16"
    """`bfloat16` or `float32`; of weights, and of KV if nothing else is said of it."""
    quantization: Annotated[str | None, OneOf(("w8a8", "w4a16"))] = None
    """`w8a8`: int8 weights by output channel, int8 activations by token, scales drawn from the data; `w4a16` (`cuda`
    only): 4-bit weights by groups of inputs; None: none."""
    kernels: Annotated[str, OneOf(("auto", "compiled", "triton", "torch", "reference"))] = "auto"
    """Who computes: kernels compiled for this processor (`compiled`, on `cpu`) or for a GPU (`triton`), torch's own
    operations, or the plain formulas; `auto`: the first of them that the device has (`kernels.dispatch`)."""
    batching: Annotated[str, OneOf(("iteration", "request", "prompts_alone"))] = "iteration"
    """`iteration`: sequences join and leave between any two steps (Orca §3.1). For comparison: `request`: a batch runs
    until its last sequence has ended, as systems before Orca did; `prompts_alone`: no step mixes prompts and decode
    rows, prompts go first, as in vLLM before chunked prefill."""
    block_size: Annotated[int, Within(1, 1024)] = 16
    kv_cache_bytes: Annotated[int, Bytes(), Within(0, 2**50)] = 0
    """Memory for KV; the number of blocks follows. 0: on `cuda` what `gpu_memory_utilization` leaves for it, elsewhere
    512 MiB."""
    gpu_memory_utilization: Annotated[float, Within(0, 1, above=True)] = 0.9
    """`cuda` only: the part of the GPU's memory that this worker may take, weights and all; what is left of it after a
    profiling step is KV. Workers that share a GPU share this out: 0.45 each of two."""
    gpus: Annotated[tuple[int, ...], Within(0, 1023)] = ()
    """`cuda` only: the GPUs of the machine, as PyTorch counts them, that the workers of this engine take in turn, one
    for each rank, as the rank's node counts them; empty: the first. One that is named for two workers, in one pool or
    in two, is shared (`gpu_memory_utilization`)."""
    enforce_eager: bool = False
    """`cuda` only: launch every kernel of a decode step anew, without captured graphs: slower, a quicker start."""
    max_model_len: Annotated[int | None, Within(1, 2**31 - 1)] = None
    """None: the model's own."""
    max_batched_tokens: Annotated[int, Within(1, 2**20)] = 512
    """Token budget of a step."""
    max_running: Annotated[int, Within(1, 65536)] = 64
    """Sequences in the running batch."""
    max_waiting: Annotated[int, Within(1, 2**20)] = 256
    """Bounded queue: beyond it, work is refused with RESOURCE_EXHAUSTED."""
    kv_cache_dtype: Annotated[str, OneOf(("auto", "int8", "fp8"))] = "auto"
    """`cuda` only: `int8` or `fp8` (e4m3) hold KV in a byte a number, by scales of layers and KV heads; `auto`: as
    `dtype` says."""
    kv_scales: Annotated[str | None, Text()] = None
    """Of narrow KV: a file of `tandem calibrate`. None, with `fp8`: the checkpoint's own, 1 where it has none."""
    prefix_cache: bool = True
    tensor_parallel: Annotated[int, Within(1, 1024)] = 1
    """Devices that share each layer: GPUs, or on `cpu` processes, as many as divide the model's heads. `paced`: any, as
    its step times say what a split step takes."""
    pipeline_stages: Annotated[int, Within(1, 1024)] = 1
    """Groups of devices that share the layers out among themselves. `paced`: 1 where it is served (`check_served`), any
    in virtual time."""
    threads: Annotated[int, Within(1, 1024)] = 1
    """Compute threads of the device; of several ranks, each rank's."""
    cpus: Annotated[tuple[int, ...], Within(0, 65535)] = ()
    """Processors that the engine's threads are pinned to; empty: not pinned."""
    paced_step_s: StepSeconds = 0.002
    """`paced` only: the latency model's coefficients, seconds."""
    paced_prefill_token_s: StepSeconds = 0.00005
    paced_decode_row_s: StepSeconds = 0.0002
    paced_context_token_s: StepSeconds = 0.0
    paced_profile: Annotated[str | None, Text()] = None
    """`paced` only: a file of step-time coefficients instead of those above."""

    def __post_init__(self) -> None:
        check(self)
        if not self.kv_cache_bytes and self.device != "cuda":
            object.__setattr__(self, "kv_cache_bytes", _HOST_KV_BYTES)
        if len(set(self.cpus)) != len(self.cpus):
            raise ConfigError("cpus", list(self.cpus), "each processor once")
        self._check_kv()
        if self.device == "cuda":
            self._check_cuda()
        elif self.gpus:
            raise ConfigError("gpus", list(self.gpus), f"none on {self.device}")
        elif self.enforce_eager:
            raise ConfigError("enforce_eager", True, f"false on {self.device}, where no steps are captured")
        elif self.quantization == "w4a16":
            raise ConfigError("quantization", self.quantization, f"w8a8 or none on {self.device}: w4a16 wants a GPU")
        if self.kernels == "triton" and self.device == "cpu":
            raise ConfigError("kernels", self.kernels, "auto, compiled, torch or reference on cpu: triton wants a GPU")
        if self.num_ranks > 1 and self.device == "cpu":
            for name, allowed_values in (("kernels", "auto, torch, reference"), ("quantization", "none")):
                if getattr(self, name) in ("compiled", "w8a8"):
                    allowed = f"{allowed_values} for a worker of {self.num_ranks} ranks, which torch computes"
                    raise ConfigError(name, getattr(self, name), allowed)

    def _check_kv(self) -> None:
        narrow = self.kv_cache_dtype
        if narrow != "auto" and self.device != "cuda":
            raise ConfigError("kv_cache_dtype", narrow, f"auto on {self.device}: narrow KV wants a GPU")
        if narrow == "auto" and self.kv_scales is not None:
            raise ConfigError("kv_scales", self.kv_scales, "none with kv_cache_dtype auto, whose KV has no scales")
        if narrow == "int8" and self.kv_scales is None:
            raise ConfigError("kv_scales", None, "a file with kv_cache_dtype int8: `tandem calibrate` makes it")

    def _check_cuda(self) -> None:
        if self.kernels == "compiled":
            raise ConfigError("kernels", self.kernels, "auto, triton, torch or reference on cuda")
        if len(self.gpus) % self.num_ranks:
            allowed = f"{self.num_ranks}, or a multiple of that: one for each rank of a worker"
            raise ConfigError("gpus", list(self.gpus), allowed)

    @property
    def kv_dtype(self) -> str:
        """Of KV memory, as `KVLayout` names it."""
        return {"auto": self.dtype, "fp8": "float8_e4m3"}.get(self.kv_cache_dtype, self.kv_cache_dtype)

    @property
    def num_ranks(self) -> int:
        """Devices, or processes, of one worker."""
        return self.tensor_parallel * self.pipeline_stages

    @property
    def num_processes(self) -> int:
        """That compute for one worker where it is served."""
        return 1 if self.device == "paced" else self.num_ranks

    def of_worker(self, index: int) -> EngineConfig:
        """The same for one worker of a pool: on its own GPUs of those that the pool has."""
        if not self.gpus:
            return self
        first = index * self.num_ranks % len(self.gpus)
        return replace(self, gpus=self.gpus[first : first + self.num_ranks])

    def check_served(self) -> None:
        """ConfigError for what can be simulated and no worker can be."""
        if self.pipeline_stages > 1 and self.device == "paced":
            allowed = (
                "1 on paced, which cannot serve pipelines: `tandem plan --max-pp 1` plans without them, `tandem "
                "simulate --cluster` takes them as they are"
            )
            raise ConfigError("pipeline_stages", self.pipeline_stages, allowed)

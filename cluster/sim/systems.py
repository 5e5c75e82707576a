"""Serving systems as data: how each batches, lets in, hands over, and what its control plane takes, so that virtual
time can play them on the same device and workload.

    workers = [(DISTSERVE.replica(Role.PREFILL, tensor_parallel=2), 1), (DISTSERVE.replica(Role.DECODE), 1)]
    outcomes = SimCluster(DISTSERVE.cluster(workers, device)).run(asked)

A system has one set of constants for all its runs, each with its source. Those marked *calibrated* were set once, on
the runs that the DistServe authors measured on A100s (OPT-13B, ShareGPT: `tandem bench replay`), and are the same for
every rate and split. Nothing here is a model of the device: that is the profile's or the roofline's part.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from ...router.slo_classes import Promise
from ..latency.links import INSTANT, Link
from ..latency.profile import DecodeTerms, StepProfile, distserve_profile
from ..types import Role
from .cluster import ClusterSpec
from .deploy import DeviceModel, Replica, worker_spec
from .router import RouterSpec
from .worker_spec import WorkerSpec

_FOR_EVER_S = 1e6
_NO_PROMISE = Promise(slo_class="", share=1.0, ttft_s=None, tpot_s=None)
NVLINK = Link(name="nvlink", bandwidth_gb_s=200.0, latency_us=2000.0)
"""DistServe's way between two GPUs of a node: a call of Ray and some 200 copies that are queued one by one, then NVLink
3 (300 GB/s a direction, two thirds of it achieved)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Batching:
    """How a system's engine fills its steps, in one role."""

    policy: str
    """As `cluster.engine.policies.policy_for` has it."""
    max_batched_tokens: int
    max_running: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Control:
    """What a system's own processes add, seconds."""

    request_s: float = 0.0
    """Before a request is queued: HTTP, tokenizer, an idle engine's sleep."""
    request_token_s: float = 0.0
    """The same, for each token of its prompt."""
    message_s: float = 0.0
    """A message between its processes, one way."""
    step_s: float = 0.0
    """Each step, beside what the profile has."""
    prompt_step_s: float = 0.0
    """Each step of prompts, beside that."""
    step_row_s: float = 0.0
    """Each decode row of a step."""
    step_token_s: float = 0.0
    """Each token of context that a step looks at: tables and ids that are packed and unpacked."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingSystem:
    """One system."""

    name: str
    source: str
    """Where its constants are from."""
    batching: dict[Role, Batching]
    control: Control = field(default_factory=Control)
    decode_after_prefill: bool = False
    credits: bool = True
    """Whether the decode side promises its memory before a prompt is computed."""
    inside: Link = INSTANT
    prefill_factor: float = 1.0
    """Of DistServe's published coefficients, which its authors multiplied by hand to make up for what a control plane
    adds: back to what was measured, where the control plane is modelled here."""
    decode_factor: float = 1.0

    def replica(self, role: Role, tensor_parallel: int = 1, pipeline_stages: int = 1, node: str = "") -> Replica:
        """A worker that batches as the system does. ValueError for a role that it does not have."""
        if role not in self.batching:
            known = ", ".join(sorted(self.batching))
            raise ValueError(f"role: {self.name} has no {role} workers; it has {known}")
        how = self.batching[role]
        return Replica(
            role=role,
            tensor_parallel=tensor_parallel,
            pipeline_stages=pipeline_stages,
            node=node,
            max_batched_tokens=how.max_batched_tokens,
            max_running=how.max_running,
            batching=how.policy,
        )

    def cluster(
        self,
        workers: Sequence[tuple[Replica, int]],
        device: DeviceModel,
        *,
        kv_tokens: Callable[[Replica], int] | None = None,
    ) -> ClusterSpec:
        """So many of each replica, made by `replica`, behind one router that refuses nobody.

        `kv_tokens`: what a replica holds, instead of the arithmetic of its memory. DoesNotFit and ValueError as
        `worker_spec` raises them.
        """
        specs = []
        for number, (replica, count) in enumerate(workers):
            blocks = kv_tokens(replica) // device.block_size if kv_tokens is not None else 0
            for copy in range(count):
                spec = worker_spec(f"{replica.role}-{number}-{copy}", replica, device, num_blocks=blocks)
                specs.append(self._unhurried(spec))
        router = RouterSpec(
            promises={"": _NO_PROMISE},
            refuses=False,
            own_s=self.control.request_s,
            own_token_s=self.control.request_token_s,
            rpc_s=self.control.message_s,
            decode_after_prefill=self.decode_after_prefill,
        )
        return ClusterSpec(workers=tuple(specs), router=router, inside=self.inside, between=self.inside)

    def _unhurried(self, spec: WorkerSpec) -> WorkerSpec:
        """Nothing lapses, however long a queue grows; and what of the worker is the system's."""
        spec = replace(spec, lease_s=_FOR_EVER_S, pull_wait_s=_FOR_EVER_S, credit_ttl_s=_FOR_EVER_S)
        if not self.credits:
            spec = replace(spec, credit_factor=1000.0)
        return spec

    def costs(self, profile: StepProfile) -> StepProfile:
        """The device's step times with what the system's control plane adds to each step."""
        control, factor = self.control, self.decode_factor

        def decode(terms: DecodeTerms) -> DecodeTerms:
            return DecodeTerms(
                step_s=terms.step_s * factor,
                row_s=terms.row_s * factor + control.step_row_s,
                context_token_s=terms.context_token_s * factor,
            )

        return replace(
            profile,
            prefill_step_s=profile.prefill_step_s * self.prefill_factor + control.prompt_step_s,
            prefill_token_s=profile.prefill_token_s * self.prefill_factor,
            prefill_square_s=profile.prefill_square_s * self.prefill_factor,
            decode=decode(profile.decode),
            large_decode=decode(profile.large_decode),
            overhead_s=profile.overhead_s + control.step_s,
            overhead_token_s=profile.overhead_token_s + control.step_token_s,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishedCosts:
    """DistServe's coefficients as a system has them: a `CostSource`."""

    system: ServingSystem
    path: str
    """The file of its simulator for this system's engine."""
    model: str
    """As the file calls it, `facebook/opt-13b`."""

    def costs(self, tensor_parallel: int, pipeline_stages: int) -> StepProfile:
        """See `CostSource.costs`."""
        return self.system.costs(
            distserve_profile(self.path, self.model, tensor_parallel=tensor_parallel, pipeline_stages=pipeline_stages)
        )


DISTSERVE = ServingSystem(
    name="distserve",
    source="OSDI '24 §4.3, §5; LLMServe/DistServe: single_stage_engine.py, {context,decoding}_stage_scheduler.py; "
    "limits of its evaluation's server; step times and 2 ms + 1e-4 ms a token of control from its own simulator",
    batching={
        Role.PREFILL: Batching(policy="distserve", max_batched_tokens=8192, max_running=128),
        Role.DECODE: Batching(policy="distserve", max_batched_tokens=65_536, max_running=1024),
    },
    # An idle stage sleeps 3 ms between two looks (1.5 on average); HTTP and the first call of Ray 2 ms, the tokenizer
    # some 500 tokens a millisecond: calibrated on unloaded prompts.
    # Each drawn token is made text and handed to its request in Python, some 30 us: calibrated on the tokens' pace.
    control=Control(request_s=3.5e-3, request_token_s=2e-6, step_row_s=3e-5),
    decode_after_prefill=True,  # the bridge queue (§5)
    # Every stage of a decode pipeline has a batch, though its loop reads as if only one might: with one, 66B would
    # attain half of what table 2 has at 3 requests/s.
    credits=False,  # prefill goes on until its own memory is full; decode pulls when it has room (§4.3)
    inside=NVLINK,
)

VLLM = ServingSystem(
    name="vllm",
    source="vLLM 0.2 as DistServe's evaluation starts it (engine and workers in Ray): prompts go before decode rows, "
    "never beside them, padded to the longest of their step; preemption recomputes (SOSP '23 §4.5); step times from "
    "DistServe's simulator",
    batching={Role.MIXED: Batching(policy="padded", max_batched_tokens=16_384, max_running=1024)},
    # Calibrated. Its loop takes new requests in between two steps, a call of Ray and the tokenizer each; sequences are
    # packed, scheduled, sampled and made text one by one in Python. Its two runs were not made by one build: the same
    # prompts, computed back to back, and the same decode batches took an eighth longer in the second, and only there
    # did prompts of unlike length share a step. One set of constants stands between them.
    control=Control(request_s=1e-3, prompt_step_s=15e-3, step_row_s=0.7e-3, step_token_s=1e-7),
    prefill_factor=0.84,  # calibrated: 1.18 times what was measured, where DistServe's simulator has 1.4 times
    decode_factor=1 / 1.2,
)

TANDEM = ServingSystem(
    name="tandem",
    source="this project: the runtime's batching, and the planner's times of a message and of the router's own work",
    batching={
        Role.PREFILL: Batching(policy="iteration", max_batched_tokens=2048, max_running=256),
        Role.DECODE: Batching(policy="iteration", max_batched_tokens=2048, max_running=256),
        Role.MIXED: Batching(policy="iteration", max_batched_tokens=512, max_running=256),
    },
    control=Control(request_s=1e-3, message_s=0.5e-3),
)

SYSTEMS = {system.name: system for system in (DISTSERVE, VLLM, TANDEM)}

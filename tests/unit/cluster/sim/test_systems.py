"""Systems as data: what each does that others do not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest
from tandem.cluster.latency.hardware import load_hardware
from tandem.cluster.latency.model_facts import model_facts
from tandem.cluster.latency.profile import DecodeTerms, StepProfile
from tandem.cluster.sim.cluster import SimCluster
from tandem.cluster.sim.deploy import DeviceModel
from tandem.cluster.sim.request import Asked, Outcome
from tandem.cluster.sim.systems import DISTSERVE, SYSTEMS, VLLM, Control, ServingSystem
from tandem.cluster.types import Role

TERMS = DecodeTerms(step_s=0.02, row_s=0.0, context_token_s=0.0)
PROFILE = StepProfile(
    prefill_step_s=0.1, prefill_token_s=0.0, decode=TERMS, large_decode=TERMS, large_batch_rows=100, overhead_s=0.001
)


@dataclass(frozen=True)
class Flat:
    """Steps that take the same whatever is in them."""

    system: ServingSystem
    profile: StepProfile

    def costs(self, tensor_parallel: int, pipeline_stages: int) -> StepProfile:
        return self.system.costs(replace(self.profile, pipeline_stages=pipeline_stages))


def run(
    system: ServingSystem,
    asked: Sequence[Asked],
    *,
    kv_tokens: int = 4096,
    stages: int = 1,
    profile: StepProfile = PROFILE,
) -> list[Outcome]:
    device = DeviceModel(
        facts=model_facts("opt-13b", dtype="float16"),
        hardware=load_hardware("a100-80g"),
        source=Flat(system, profile),
        max_model_len=2048,
    )
    roles = [role for role in (Role.PREFILL, Role.DECODE, Role.MIXED) if role in system.batching][:2]
    workers = [(system.replica(role, 1, stages if role is Role.DECODE else 1), 1) for role in roles]
    return SimCluster(system.cluster(workers, device, kv_tokens=lambda replica: kv_tokens)).run(asked)


def ask(number: int, arrival_s: float, prompt: int, output: int) -> Asked:
    return Asked(request_id=str(number), arrival_s=arrival_s, prompt_token_ids=(0,) * prompt, output_tokens=output)


def test_distserve_moves_kv_between_two_steps_that_wait_for_it() -> None:
    """§4.3: the KV stays where it was computed until decode pulls it, and decode's loop waits meanwhile."""
    plain = replace(DISTSERVE, control=Control())
    alone, beside = run(plain, [ask(0, 0.0, 160, 200), ask(1, 0.5, 1600, 2)])
    assert alone.ttft_s == pytest.approx(0.101)
    pull_s = 2e-3 + 1600 * 819_200 / 200e9
    assert beside.tpot_s is not None
    assert 0.021 + pull_s <= beside.tpot_s <= 2 * 0.021 + pull_s + 1e-9
    assert alone.last_token_s is not None
    assert alone.first_token_s is not None
    own_pull_s = 2e-3 + 160 * 819_200 / 200e9
    took_s = alone.last_token_s - alone.first_token_s
    assert took_s == pytest.approx(199 * 0.021 + own_pull_s + pull_s, abs=2e-3)


def test_distserve_swaps_where_others_compute_again() -> None:
    """Three answers outgrow the memory: who has to wait computes no prompt a second time, which would take 100 s."""
    slow = replace(PROFILE, prefill_step_s=100.0)
    asked = [ask(number, 0.0, 320, 300) for number in range(3)]
    swapped = run(replace(DISTSERVE, control=Control()), asked, kv_tokens=1024, profile=slow)
    again = run(replace(VLLM, control=Control(), prefill_factor=1.0), asked, kv_tokens=1024, profile=slow)
    assert all(outcome.done for outcome in (*swapped, *again))
    assert max(outcome.last_token_s or 0.0 for outcome in swapped) < 250.0  # the first prompt, then the other two
    assert max(outcome.last_token_s or 0.0 for outcome in again) > 300.0


def test_one_batch_goes_through_distserves_decode_pipeline() -> None:
    """So that its depth brings memory and no pace; a pipeline that holds two batches is faster."""
    asked = [ask(number, 0.2 * number, 160, 400) for number in range(6)]
    plain = replace(DISTSERVE, control=Control())
    one = [outcome.tpot_s for outcome in run(plain, asked)]
    deep = [outcome.tpot_s for outcome in run(plain, asked, stages=2)]
    assert deep == pytest.approx(one)


def test_control_adds_to_the_device() -> None:
    system = replace(
        VLLM,
        control=Control(step_s=0.001, prompt_step_s=0.01, step_row_s=0.002, step_token_s=1e-5),
        prefill_factor=0.5,
        decode_factor=2.0,
    )
    costs = system.costs(PROFILE)
    assert costs.step_time_s(100, 10_000, 0, 0) == pytest.approx(0.5 * 0.1 + 0.01 + 0.002 + 100 * 1e-5)
    assert costs.step_time_s(0, 0, 3, 300) == pytest.approx(2 * 0.02 + 3 * 0.002 + 0.002 + 300 * 1e-5)


def test_systems_are_known_by_name_and_by_what_they_have() -> None:
    assert all(system.name == name and system.source for name, system in SYSTEMS.items())
    with pytest.raises(ValueError, match="role: vllm has no prefill workers; it has mixed"):
        VLLM.replica(Role.PREFILL)

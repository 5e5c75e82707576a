from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tandem.cluster.engine.policies import (
    BatchPolicy,
    DecodePolicy,
    MixedPolicy,
    PrefillPolicy,
    StepShares,
    StepView,
    policy_for,
)
from tandem.cluster.types import Role


def shares(policy: BatchPolicy, budget: int, decode: int, prefill: int) -> tuple[int, int]:
    result = policy.shares(StepView(budget_tokens=budget, decode_rows=decode, prefill_tokens=prefill))
    assert isinstance(result, StepShares)
    return result.decode_rows, result.prefill_tokens


def test_prefill_takes_prompts_first_but_leftover_decodes_drain() -> None:
    policy = PrefillPolicy()
    assert shares(policy, 512, 0, 10_000) == (0, 512)
    assert shares(policy, 512, 100, 10_000) == (64, 448)
    assert shares(policy, 512, 100, 500) == (64, 448)
    assert shares(policy, 512, 100, 400) == (100, 412)
    assert policy.headroom_blocks(7) == 0


def test_decode_bounds_what_prompts_add_to_a_step() -> None:
    policy = DecodePolicy()
    assert shares(policy, 512, 60, 10_000) == (60, 128)
    assert shares(policy, 512, 1, 10_000) == (1, 128)
    assert shares(policy, 512, 0, 10_000) == (0, 512)
    assert shares(policy, 64, 60, 10_000) == (60, 4)
    assert policy.headroom_blocks(7) == 7


def test_mixed_fills_the_rest() -> None:
    policy = MixedPolicy()
    assert shares(policy, 512, 60, 10_000) == (60, 452)
    assert shares(policy, 512, 0, 3) == (0, 512)
    assert policy.headroom_blocks(7) == 7


@given(role=st.sampled_from(Role), budget=st.integers(2, 600), data=st.data())
def test_shares_stay_within_the_budget_and_starve_nobody(role: Role, budget: int, data: st.DataObject) -> None:
    decode = data.draw(st.integers(0, budget - 1))
    prefill = data.draw(st.integers(1, 10_000))
    rows, tokens = shares(policy_for(role), budget, decode, prefill)
    assert 0 <= rows <= decode
    assert 1 <= tokens <= budget - rows
    assert rows > 0 or decode == 0


@pytest.mark.parametrize("batching", ["iteration", "request", "prompts_alone", "padded", "distserve"])
def test_policies_know_their_role(batching: str) -> None:
    assert [policy_for(role, batching).role for role in Role] == list(Role)


@given(role=st.sampled_from(Role), budget=st.integers(2, 600), data=st.data())
def test_batching_changes_who_is_let_in_or_what_shares_a_step(role: Role, budget: int, data: st.DataObject) -> None:
    decode = data.draw(st.integers(0, budget - 1))
    prefill = data.draw(st.integers(1, 10_000))
    by_request, alone = policy_for(role, "request"), policy_for(role, "prompts_alone")
    assert (by_request.whole_batches, by_request.prompts_alone) == (True, False)
    assert shares(by_request, budget, decode, prefill) == shares(policy_for(role), budget, decode, prefill)
    assert (alone.whole_batches, alone.prompts_alone) == (False, True)
    assert shares(alone, budget, decode, prefill) == (decode, budget)
    for policy in (by_request, alone):
        assert policy.headroom_blocks(7) == policy_for(role).headroom_blocks(7)


def test_padded_prompts_are_prompts_alone_that_a_device_computes_as_a_rectangle() -> None:
    padded, alone = policy_for(Role.MIXED, "padded"), policy_for(Role.MIXED, "prompts_alone")
    assert (padded.prompts_alone, padded.pads_prompts, alone.pads_prompts) == (True, True, False)
    assert shares(padded, 512, 60, 9) == shares(alone, 512, 60, 9)


def test_divisors_are_checked() -> None:
    with pytest.raises(ValueError, match="decode_divisor: 0 is not at least 1"):
        PrefillPolicy(decode_divisor=0)
    with pytest.raises(ValueError, match="prefill_divisor: -1 is not at least 1"):
        DecodePolicy(prefill_divisor=-1)

"""PagedAttention (SOSP '23): which share of the KV memory holds tokens."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tandem.cluster.bench.claims_kv_waste import PAPER_SLOTS, BuddyAllocator, KVWaste, compare, contiguous_waste
from tandem.cluster.bench.claims_virtual import Job
from tandem.cluster.workload.traces import draw_rows, fit_trace, read_trace


def job(prompt: int, output: int) -> Job:
    return Job(arrival_s=0.0, prompt_tokens=prompt, output_tokens=output)


def ordered(rows: tuple[KVWaste, ...]) -> list[float]:
    for row in rows:
        assert row.tokens + row.reserved + row.internal + row.external == pytest.approx(1.0)
    return [row.tokens for row in rows]


def test_the_shares_of_figure_2_with_lengths_as_long_as_the_papers() -> None:
    """Figure 2, OPT-13B on ShareGPT: 20.4 % (max), 26.8 % (pow2), 38.2 % (oracle), 96.3 % (paged, block size 16). Here
    with the KV memory of table 1 and lengths of the paper's means (figure 11: 161 in, 338 out), exponential.
    """
    draw = np.random.default_rng(0)
    lengths = [(int(prompt) + 1, int(output) + 2) for prompt, output in draw.exponential((160, 336), (150, 2))]
    rows = compare([job(*pair) for pair in lengths if sum(pair) <= 2048], num_slots=PAPER_SLOTS)
    by_max, pow2, oracle, paged = ordered(rows)
    assert by_max == pytest.approx(0.204, abs=0.08)
    assert by_max < pow2 < oracle == pytest.approx(0.382, abs=0.15)
    assert paged > 0.90
    assert rows[3].internal < 0.03  # §4.2: the waste is within a sequence's last block


def test_the_order_holds_on_sharegpt_lengths_of_another_selection(data: Path) -> None:
    """Figure 2's order, and above 90 % paged, on DistServe's ShareGPT selection (longer prompts, shorter answers)."""
    trace = fit_trace(read_trace(data / "workloads" / "sharegpt_distserve_opt_poisson16rps.csv.gz"), max_model_len=2048)
    rows = draw_rows(trace.rows, 120, 0)
    by_max, pow2, oracle, paged = ordered(compare([job(row.input_tokens, row.output_tokens) for row in rows]))
    assert by_max < pow2 < oracle < paged
    assert by_max < 0.55
    assert paged > 0.90


def test_what_is_lost_by_one_request_is_counted_by_kind() -> None:
    """§3.1: reserved, internal and external waste. One request of 10 + 6 tokens in a memory of 64 slots, another that
    waits; under `max` 32 slots are taken, of which 15 are ever used; 32 stay free, but the second takes those.
    """
    row = contiguous_waste([job(10, 6), job(10, 6), job(10, 6)], "max", num_slots=64, max_model_len=32)
    # Six steps in which two run and hold 10 … 15 tokens each.
    assert row.steps == 6
    assert row.tokens == pytest.approx(2 * 12.5 / 64)
    assert row.reserved == pytest.approx(2 * 2.5 / 64)
    assert row.internal == pytest.approx(2 * 17 / 64)
    assert row.external == 0.0
    assert row.running == 2.0


def test_too_little_memory_or_too_few_requests_are_named() -> None:
    with pytest.raises(ValueError, match="num_prompts: too few"):
        contiguous_waste([job(10, 6)], "oracle", num_slots=64, max_model_len=32)
    with pytest.raises(ValueError, match="slots: 16 is not allowed"):
        contiguous_waste([job(10, 6)] * 2, "max", num_slots=16, max_model_len=32)


@given(num_slots=st.integers(1, 300), asks=st.lists(st.integers(1, 80), max_size=40), data=st.data())
def test_a_buddy_allocator_gives_nothing_twice_and_forgets_nothing(
    num_slots: int, asks: list[int], data: st.DataObject
) -> None:
    """§6.1: the contiguous systems take their stretches from a buddy allocator."""
    memory = BuddyAllocator(num_slots)
    held: dict[int, int] = {}
    for ask in asks:
        stretch = memory.allocate(ask)
        if stretch is not None:
            start, size = stretch
            assert ask <= size < 2 * ask
            assert start + size <= num_slots
            assert all(start + size <= other or other + length <= start for other, length in held.items())
            held[start] = size
        if held and data.draw(st.booleans()):
            start = data.draw(st.sampled_from(sorted(held)))
            memory.release(start)
            del held[start]
        assert memory.free_slots == num_slots - sum(held.values())
    for start in sorted(held):
        memory.release(start)
    whole = 1 << (num_slots.bit_length() - 1)
    assert memory.allocate(whole) is not None  # everything has joined again

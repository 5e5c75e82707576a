"""Operators at their limits: bound by arithmetic, by traffic, by their launch."""

from __future__ import annotations

import numpy as np
import pytest
from tandem.cluster.latency.operators import (
    AllReduceTerms,
    DecodeAttentionTerms,
    GemmTerms,
    Peaks,
    PrefillAttentionTerms,
    all_reduce_s,
    decode_attention_s,
    elementwise_s,
    gemm_s,
    prefill_attention_s,
    sizes,
)

PEAKS = Peaks(flops_s=100e12, bytes_s=1e12)
GEMM = GemmTerms(launch_us=5, compute_share=0.5, inner_ns=0, bandwidth_share=0.8, overlap_power=8)


def test_a_large_product_is_bound_by_arithmetic() -> None:
    m = n = k = 2**14
    assert gemm_s(GEMM, PEAKS, m, n, k, 2, 2) == pytest.approx(2 * m * n * k / 50e12, rel=0.01)


def test_a_product_with_one_row_is_bound_by_its_weights() -> None:
    assert gemm_s(GEMM, PEAKS, 1, 8192, 8192, 2, 2) == pytest.approx(5e-6 + 2 * 8192**2 / 0.8e12, rel=0.01)
    assert gemm_s(GEMM, PEAKS, 1, 8192, 8192, 1, 2) == pytest.approx(5e-6 + 8192**2 / 0.8e12, rel=0.01)


def test_arithmetic_and_traffic_overlap_as_the_power_says() -> None:
    added = GemmTerms(launch_us=0, compute_share=1, inner_ns=0, bandwidth_share=1, overlap_power=1)
    hidden = GemmTerms(launch_us=0, compute_share=1, inner_ns=0, bandwidth_share=1, overlap_power=16)
    compute, traffic = 2 * 100 * 1000 * 1000 / 100e12, 2 * (1000 * 1000 + 100 * 2000) / 1e12
    assert gemm_s(added, PEAKS, 100, 1000, 1000, 2, 2) == pytest.approx(compute + traffic)
    assert gemm_s(hidden, PEAKS, 100, 1000, 1000, 2, 2) == pytest.approx(max(compute, traffic), rel=0.05)


def test_products_are_computed_for_many_sizes_at_once() -> None:
    terms = GemmTerms(launch_us=5, compute_share=0.5, inner_ns=0.3, bandwidth_share=0.8, overlap_power=1.7)
    many = gemm_s(terms, PEAKS, sizes(0, 3), 64, 32, 2, 2)
    assert many == pytest.approx([gemm_s(terms, PEAKS, m, 64, 32, 2, 2) for m in range(4)])


def test_prompts_pay_for_half_of_their_square() -> None:
    terms = PrefillAttentionTerms(launch_us=10, compute_share=0.5, length_ns=0, bandwidth_share=1)
    causal = 4 * 32 * 128 * (4096**2 / 2) / 50e12
    assert prefill_attention_s(terms, PEAKS, 4096**2, 0, 32, 128) == pytest.approx(10e-6 + causal)
    serial = PrefillAttentionTerms(launch_us=10, compute_share=0.5, length_ns=2, bandwidth_share=1)
    longer = prefill_attention_s(serial, PEAKS, 4096**2, 5e6, 32, 128)
    assert longer == pytest.approx(10e-6 + causal + 4096 * 2e-9 + 5e-6)


def test_decode_reads_its_context_once() -> None:
    terms = DecodeAttentionTerms(launch_us=10, bandwidth_share=0.5, row_ns=20)
    assert decode_attention_s(terms, PEAKS, 8, 4, 1e6) == pytest.approx(10e-6 + 8 * 4 * 20e-9 + 2e-6)


def test_passes_over_activations_pay_each_launch() -> None:
    assert elementwise_s(2, 0.5, PEAKS, 1e6, kernels=3) == pytest.approx(6e-6 + 2e-6)


def test_an_all_reduce_sends_what_a_ring_does() -> None:
    terms = AllReduceTerms(launch_us=10, rank_us=2, bandwidth_gb_s=100)
    assert all_reduce_s(terms, 2, 1e6) == pytest.approx(12e-6 + 1e6 / 1e11)
    assert np.allclose(all_reduce_s(terms, np.array([4, 8]), 1e6), [16e-6 + 1.5e-5, 24e-6 + 1.75e-5])

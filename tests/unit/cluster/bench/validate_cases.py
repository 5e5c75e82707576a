"""What the tests of prediction beside measurement have in common: a profile, and a load that is promised."""

from __future__ import annotations

from tandem.cluster.bench.claims_load import Promise, Staircase
from tandem.cluster.latency.profile import DecodeTerms, StepProfile

TERMS = DecodeTerms(step_s=0.01, row_s=1e-4, context_token_s=0.0)
PROFILE = StepProfile(prefill_step_s=0.01, prefill_token_s=1e-4, decode=TERMS, large_decode=TERMS, large_batch_rows=64)


def load_of(trace: str, *rates: float, **fields: float) -> Staircase:
    promise = Promise(ttft_s=0.1, tpot_s=0.03)
    return Staircase(dataset_path=trace, rates=rates, stair_s=20.0, promises=(promise,), **fields)

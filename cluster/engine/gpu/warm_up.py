"""Steps that are computed before a device serves: between them they launch every kernel that a step may want, and where
products are quantized every size of product for which another way may be the quickest.
"""

from __future__ import annotations

from ...types import SamplingParams
from ..plan import SampleSpec, StepPlan, StepRow
from .inputs import Limits
from .sizing import decode_plan, prompt_plan

PENALIZED = SampleSpec(SamplingParams(repetition_penalty=1.1, top_k=40, top_p=0.9, top_logprobs=1), 0, (0,), ())
"""A row whose logits are changed and put back."""


def warm_up_plans(
    limits: Limits, block_size: int, num_blocks: int, most_sampled: int, *, tunes: bool
) -> list[StepPlan]:
    """Over blocks that are nobody's. `most_sampled`: rows that a step samples at most; `tunes`: products of other sizes
    may be computed in other ways, the output head's by the rows that sample.
    """
    prompts = _sizes(limits.tokens) if tunes else (limits.tokens,)
    sampled = _sizes(most_sampled) if tunes else (1,)
    return [
        *(prompt_plan(tokens, limits, block_size, num_blocks) for tokens in prompts),
        *(decode_plan(rows) for rows in sampled),
        StepPlan(0, (StepRow("penalized", 0, [0], [0], PENALIZED),)),
    ]


def _sizes(most: int) -> tuple[int, ...]:
    """Of each power of two one that stands for it, ascending."""
    return (*(2**power for power in range(most.bit_length()) if 2**power < most), most)

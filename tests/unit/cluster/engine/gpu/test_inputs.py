"""Where a step's inputs lie on the device."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from tandem.cluster.engine.gpu.inputs import Limits, StepInputs
from tandem.cluster.engine.plan import SampleSpec, StepPlan, StepRow
from tandem.cluster.models.registry import CONFIGS
from tandem.cluster.types import SamplingParams
from tandem.kernels.paged_attention import AttentionShape

CONFIG = dataclasses.replace(CONFIGS["tiny-llama"], max_model_len=64)
pytestmark = pytest.mark.usefixtures("few_multiprocessors")
SPEC = SampleSpec(SamplingParams(), 0, (), ())


@pytest.mark.parametrize("decoding", [0, 1, 3])
def test_kernels_find_everything_at_multiples_of_16_bytes(where: str, decoding: int) -> None:
    """They are compiled anew for other addresses, while requests wait."""
    shape = AttentionShape(CONFIG.num_heads, CONFIG.num_kv_heads, CONFIG.head_dim, 4)
    inputs = StepInputs(CONFIG, shape, torch.float32, torch.device(where), Limits(4, 32, 16), num_blocks=20, turns=2)
    rows = [StepRow(str(r), 4, [1], [r, r + 1], SPEC) for r in range(decoding)]
    prompt = StepRow("p", 0, list(range(9)), [7, 8, 9], SPEC)
    batch = inputs.lay_out(StepPlan(0, (*rows, prompt)), {}, lambda rows: rows).batch
    assert batch.prefill is not None
    read = [batch.blocks_T, batch.slots_T, batch.decode_tables, batch.prefill_tables]
    read += [batch.prefill.rows_R3, batch.prefill.tiles_I2]
    if batch.decode is not None:
        read += [batch.decode.lengths_B, batch.decode.work_W4, batch.decode.spans_B2]
    assert not any(tensor.data_ptr() % 16 for tensor in read)
    assert batch.decode_tables[:, :2].tolist() == [[r, r + 1] for r in range(decoding)]
    assert batch.prefill_tables.tolist() == [[7, 8, 9]]

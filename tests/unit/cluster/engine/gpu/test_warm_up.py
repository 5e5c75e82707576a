"""What a device computes before it serves."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
from tandem.cluster.engine.devices import cuda
from tandem.cluster.engine.gpu.inputs import Limits
from tandem.cluster.engine.gpu.warm_up import warm_up_plans
from tandem.cluster.models.reference import ModelFiles
from tandem.cluster.models.registry import CONFIGS
from tandem.kernels import dispatch
from tandem.kernels.gpu.tuning import bucket

CONFIG = dataclasses.replace(CONFIGS["tiny-llama"], num_layers=1, vocab_size=300, max_model_len=16)


def test_products_of_every_size_are_tuned_the_heads_too() -> None:
    limits = Limits(rows=33, tokens=100, table_width=2)
    plans = warm_up_plans(limits, 16, 2, 64, tunes=True)
    tokens = {bucket(sum(len(row.token_ids) for row in plan.rows), 8, 8) for plan in plans}
    assert tokens == {bucket(count, 8, 8) for count in range(1, 101)}
    sampled = {bucket(sum(row.sample is not None for row in plan.rows), 8, 8) for plan in plans}
    assert sampled >= {bucket(count, 8, 8) for count in range(1, 65)}
    assert len(warm_up_plans(limits, 16, 2, 64, tunes=False)) == 3


@pytest.mark.usefixtures("few_multiprocessors")
def test_every_kernel_of_a_step_is_launched(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    launched = set()
    operations = dispatch.gpu_operations("triton")
    of_step = {field.name for field in dataclasses.fields(operations)} - {"layer_norm", "int8"}

    def noting(name: str) -> Callable[..., Any]:
        kernel = getattr(operations, name)

        def noted(*given: Any, **named: Any) -> Any:
            launched.add(name)
            return kernel(*given, **named)

        return noted

    noted = dataclasses.replace(operations, **{name: noting(name) for name in of_step})
    monkeypatch.setattr(cuda, "gpu_operations", {"triton": noted}.get)
    device = cuda.CudaDevice(
        ModelFiles(name="tiny", kind="dummy", path=None, config=CONFIG),
        dtype="float32",
        block_size=4,
        kv_cache_bytes=2**15,
        max_batched_tokens=8,
        max_running=2,
        enforce_eager=True,
        device=where,
    )
    launched.clear()
    for plan in warm_up_plans(Limits(2, 8, 4), 4, device.num_blocks, 8, tunes=False):
        device.launch(plan)
        device.collect()
    device.close()
    assert launched == of_step

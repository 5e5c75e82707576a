"""The GPU engine where Triton is not installed: torch computes, and moves blocks."""

from __future__ import annotations

import subprocess
import sys

_SCRIPT = """
import sys

sys.modules["triton"] = None
from tandem.cluster.engine.devices.cpu import CpuDevice
from tandem.cluster.engine.devices.cuda import CudaDevice
from tandem.cluster.engine.gpu.kv_peers import GpuPeer
from tandem.cluster.engine.plan import SampleSpec, StepPlan, StepRow
from tandem.cluster.models.reference import resolve_model
from tandem.cluster.types import SamplingParams
from tandem.kernels import dispatch

installed = dispatch._version
dispatch._version = lambda name: "" if name == "triton" else installed(name)
files = resolve_model("dummy:tiny-llama")
options = {"dtype": "float32", "block_size": 4, "kv_cache_bytes": 2**20}
ours = CudaDevice(files, device="cpu", **options)
print(ours.picked.kernels, ours.picked.reason)


PROMPT = [1, 2, 3, 4, 5]


def drawn(device, output, blocks):
    # The next token: from the prompt, or behind the one token of `output`.
    start, tokens = (len(PROMPT), output) if output else (0, PROMPT)
    spec = SampleSpec(SamplingParams(temperature=0.0), len(output), PROMPT, output)
    device.launch(StepPlan(start, (StepRow("a", start, tokens, blocks, spec),)))
    return device.collect().rows[0].tokens[0].token_id


theirs = CpuDevice(files, kernels="torch", **options)
first = drawn(ours, [], [0, 1])
GpuPeer(ours.kv, ours.kv.tensor, None).begin_copy([0, 1], [6, 7], first_token=0, num_tokens=8).wait()
print(first, drawn(ours, [first], [6, 7]))
print(drawn(theirs, [], [0, 1]), drawn(theirs, [first], [0, 1]))
"""


def test_torch_computes_and_moves_blocks() -> None:
    done = subprocess.run([sys.executable, "-c", _SCRIPT], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    picked, ours, theirs = done.stdout.splitlines()
    assert picked.startswith("torch Triton kernels cannot run here: triton is not installed ")
    assert ours == theirs

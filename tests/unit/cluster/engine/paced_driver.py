"""One sequence on one paced device, driven by hand."""

from __future__ import annotations

from collections.abc import Sequence

from tandem.cluster.clock import VirtualClock
from tandem.cluster.engine.devices.paced import PacedDevice
from tandem.cluster.engine.plan import RowOutput, SampleSpec, StepPlan, StepRow
from tandem.cluster.types import SamplingParams, StepTimeCoefficients

VOCAB = 1000
GREEDY = SamplingParams(temperature=0.0)
COEFFICIENTS = StepTimeCoefficients(step_s=0.5, prefill_token_s=0.25, decode_row_s=0.125, context_token_s=0.0625)


def device(**options: object) -> PacedDevice:
    defaults: dict[str, object] = {
        "block_size": 4,
        "num_blocks": 64,
        "coefficients": COEFFICIENTS,
        "clock": VirtualClock(),
    }
    return PacedDevice(VOCAB, **{**defaults, **options})  # type: ignore[arg-type]


class Driver:
    """One sequence on one device, as a scheduler would run it."""

    def __init__(
        self,
        paced: PacedDevice,
        prompt: Sequence[int],
        blocks: Sequence[int],
        params: SamplingParams = GREEDY,
        seq_id: str = "a",
    ) -> None:
        self.device, self.prompt, self.blocks, self.params, self.seq_id = (
            paced,
            list(prompt),
            list(blocks),
            params,
            seq_id,
        )
        self.output: list[int] = []

    def row(self, start: int, end: int) -> StepRow:
        """Computes start … end-1, and samples where that is the whole context."""
        context = self.prompt + self.output
        sample = None
        if end == len(context):
            sample = SampleSpec(self.params, len(self.output), self.prompt, self.output)
        return StepRow(self.seq_id, start, context[start:end], self.blocks, sample)

    def step(self, start: int, end: int) -> RowOutput:
        [output] = run(self.device, [self.row(start, end)])
        self.output += [token.token_id for token in output.tokens]
        return output

    def generate(self, n: int) -> list[int]:
        while len(self.output) < n:
            end = len(self.prompt) + len(self.output)
            self.step(end - 1 if self.output else 0, end)
        return self.output


def run(paced: PacedDevice, rows: Sequence[StepRow]) -> tuple[RowOutput, ...]:
    paced.launch(StepPlan(0, tuple(rows)))
    return paced.collect().rows


def move(source: PacedDevice, target: PacedDevice, pairs: Sequence[tuple[int, int]]) -> None:
    """Copies blocks as a transport would."""
    for theirs, ours in pairs:
        target.kv.write_block(ours, source.kv.read_block(theirs))

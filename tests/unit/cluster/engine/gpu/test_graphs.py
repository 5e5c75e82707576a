"""Which sizes decode steps are padded to, how they are captured, and what runs where nothing is."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tandem.cluster.engine.gpu.graphs import DecodeGraphs, DecodeShape, decode_shapes, padded_sizes

CPU = torch.device("cpu")


def test_sizes_are_vllms() -> None:
    assert padded_sizes(1) == (1,)
    assert padded_sizes(6) == (1, 2, 4, 6)
    assert padded_sizes(8) == (1, 2, 4, 8)
    assert padded_sizes(33) == (1, 2, 4, 8, 16, 24, 32, 33)
    assert padded_sizes(300)[-5:] == (248, 256, 272, 288, 300)
    with pytest.raises(ValueError, match="most_rows: 0"):
        padded_sizes(0)


@given(st.integers(1, 2000), st.data())
def test_every_batch_has_the_smallest_size_that_holds_it(most: int, data: st.DataObject) -> None:
    shapes = decode_shapes(most, lambda rows: rows + 7)
    graphs = DecodeGraphs(lambda shape: torch.empty(0), shapes, CPU)
    rows = data.draw(st.integers(1, most))
    found = graphs.shape_for(rows)
    assert found.pieces == found.rows + 7
    assert found.rows >= rows
    assert not [size for size in padded_sizes(most) if rows <= size < found.rows]
    assert found.rows - rows < max(16, rows)  # never twice the work
    for wrong in (0, -1, most + 1):
        with pytest.raises(ValueError, match=rf"rows: {wrong} is not in 1…{most}"):
            graphs.shape_for(wrong)


class Step:
    """A decode step that writes its shape into its buffer, and what records it."""

    def __init__(self, fails_at: int = 0, error: RuntimeError | None = None) -> None:
        self.out = torch.zeros(64, 2)
        self.ran: list[int] = []
        self.replayed: list[int] = []
        self.fails_at = fails_at
        self.error = error or RuntimeError("operation not permitted when stream is capturing")

    def run(self, shape: DecodeShape) -> torch.Tensor:
        if shape.rows == self.fails_at:
            raise self.error
        self.ran.append(shape.rows)
        return self.out[: shape.rows]

    def record(self, run: Callable[[], torch.Tensor]) -> tuple[Callable[[], None], torch.Tensor]:
        out = run()
        return lambda: self.replayed.append(len(out)), out

    def finish(self) -> int:
        return 12345


def test_all_sizes_are_captured_once_the_largest_first() -> None:
    step, told = Step(), []
    graphs = DecodeGraphs(step.run, decode_shapes(16, lambda rows: rows), CPU, recorder=step)
    graphs.capture(told.append)
    assert step.ran == [16, 8, 4, 2, 1]
    assert told == [0.2, 0.4, 0.6, 0.8, 1.0]
    assert graphs.memory_bytes == 12345
    logits = graphs.replay(graphs.shape_for(3))
    assert logits.data_ptr() == step.out.data_ptr()
    assert logits.shape == (4, 2)
    assert (step.ran[5:], step.replayed) == ([], [4])
    graphs.close()
    graphs.replay(graphs.shape_for(3))
    assert (step.ran[5:], step.replayed) == ([4], [4])


def test_what_cannot_be_captured_says_how_to_do_without() -> None:
    step = Step(fails_at=4)
    graphs = DecodeGraphs(step.run, decode_shapes(16, lambda rows: rows), CPU, recorder=step)
    with pytest.raises(RuntimeError, match=r"step of 4 rows cannot be captured .*capturing.*enforce_eager: true"):
        graphs.capture()


def test_memory_that_runs_out_is_no_step_that_cannot_be_captured() -> None:
    step = Step(fails_at=4, error=torch.OutOfMemoryError("CUDA out of memory"))
    graphs = DecodeGraphs(step.run, decode_shapes(16, lambda rows: rows), CPU, recorder=step)
    with pytest.raises(torch.OutOfMemoryError):
        graphs.capture()


@pytest.mark.parametrize("eager", [False, True])
def test_without_graphs_the_same_step_is_called_with_the_same_padding(eager: bool) -> None:
    step = Step()
    recorder = step if eager else None  # on a processor there is nothing that captures
    graphs = DecodeGraphs(step.run, decode_shapes(16, lambda rows: rows), CPU, enforce_eager=eager, recorder=recorder)
    graphs.capture()
    assert step.ran == []
    assert graphs.memory_bytes == 0
    assert graphs.replay(graphs.shape_for(5)).shape == (8, 2)
    assert (step.ran, step.replayed) == ([8], [])

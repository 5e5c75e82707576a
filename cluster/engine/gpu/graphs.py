"""Decode steps as captured CUDA graphs: a step's launches cost the host a replay instead of hundreds of calls.

A graph replays the same kernels on the same addresses, so a decode step reads static buffers and is padded to one of a
few numbers of rows (`padded_sizes`), with the capacity of decode attention's work list that goes with it
(`DecodeShape`). All graphs are captured at the start, the largest first: the others' activations fit into what it took.

On a processor, or with `enforce_eager`, nothing is captured: the same function is called with the same padding.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

_DENSE = (1, 2, 4)
_FINE_STEP, _FINE_UP_TO, _COARSE_STEP = 8, 256, 16


def padded_sizes(most_rows: int) -> tuple[int, ...]:
    """Numbers of rows that decode steps are padded to, ascending: 1, 2, 4, every eighth up to 256, every sixteenth
    beyond (vLLM's), and `most_rows` itself. ValueError for none.
    """
    if most_rows < 1:
        raise ValueError(f"most_rows: {most_rows} is not 1 or more")
    fine = range(_FINE_STEP, min(most_rows, _FINE_UP_TO) + 1, _FINE_STEP)
    coarse = range(_FINE_UP_TO + _COARSE_STEP, most_rows + 1, _COARSE_STEP)
    return tuple(sorted({size for size in (*_DENSE, *fine, *coarse) if size <= most_rows} | {most_rows}))


@dataclass(frozen=True, slots=True)
class DecodeShape:
    """What a captured decode step is made for."""

    rows: int
    """Padded batch size."""
    pieces: int
    """Capacity of decode attention's work list: `kernels.gpu.decode_attention.most_pieces` of these rows."""


def decode_shapes(most_rows: int, most_pieces: Callable[[int], int]) -> tuple[DecodeShape, ...]:
    """Of all `padded_sizes`, ascending. `most_pieces(rows)`: pieces that no plan of so many rows exceeds."""
    return tuple(DecodeShape(rows, most_pieces(rows)) for rows in padded_sizes(most_rows))


class Recorder(Protocol):
    """Captures what a function launches."""

    def record(self, run: Callable[[], torch.Tensor]) -> tuple[Callable[[], None], torch.Tensor]:
        """Replay, and the tensor that a replay writes. RuntimeError where it cannot be captured."""
        ...

    def finish(self) -> int:
        """Once, behind the last one: bytes of the device's memory that all of it took."""
        ...


class CudaRecorder:
    """Graphs of one memory pool. One thread; other threads may use the device meanwhile."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)
        torch.cuda.synchronize(device)
        self._free_bytes = torch.cuda.mem_get_info(device)[0]

    def record(self, run: Callable[[], torch.Tensor]) -> tuple[Callable[[], None], torch.Tensor]:
        """Runs it once before (kernels compile, libraries take their workspaces), then captures it."""
        with torch.cuda.device(self._device):
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                before = run()
            self._stream.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                out = run()
        assert out.data_ptr() == before.data_ptr(), "a captured step returns a view of a buffer that was there before"
        return graph.replay, out

    def finish(self) -> int:
        torch.cuda.synchronize(self._device)
        torch.cuda.empty_cache()
        return max(0, self._free_bytes - torch.cuda.mem_get_info(self._device)[0])


class DecodeGraphs:
    """Runs decode steps by their number of rows. One thread."""

    def __init__(
        self,
        run: Callable[[DecodeShape], torch.Tensor],
        shapes: Sequence[DecodeShape],
        device: torch.device,
        *,
        enforce_eager: bool = False,
        recorder: Recorder | None = None,
    ) -> None:
        """`run(shape)` computes a step of `shape.rows` rows from static buffers and returns its logits: a view of a
        buffer that was made before, the same at every call with the same shape; it neither waits for the device nor
        copies from it. Rows behind the batch's own are padding that it must not let touch anything. `shapes`: ascending
        (`decode_shapes`). `recorder`: what captures; None: `CudaRecorder` on a GPU, nothing elsewhere.
        """
        assert list(shapes) == sorted(shapes, key=lambda shape: shape.rows)
        self._run = run
        self._shapes = tuple(shapes)
        self._rows = [shape.rows for shape in shapes]
        self._device = device
        self._recorder = None if enforce_eager else recorder
        self._wants_capture = not enforce_eager and (recorder is not None or device.type == "cuda")
        self._captured: dict[int, tuple[Callable[[], None], torch.Tensor]] = {}
        self.memory_bytes = 0
        """What the graphs took of the device."""

    def capture(self, progress: Callable[[float], None] | None = None) -> None:
        """Captures all shapes, the largest first; once, at the start, while the static buffers hold padding only.
        `progress` is told the share that is done. RuntimeError where a step cannot be captured, OutOfMemoryError for
        want of memory.
        """
        if not self._wants_capture:
            return
        recorder = self._recorder or CudaRecorder(self._device)
        for done, shape in enumerate(reversed(self._shapes), 1):
            try:
                self._captured[shape.rows] = recorder.record(lambda shape=shape: self._run(shape))  # type: ignore[misc]
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                raise RuntimeError(
                    f"a decode step of {shape.rows} rows cannot be captured as a CUDA graph ({error}); "
                    "enforce_eager: true does without graphs"
                ) from error
            if progress is not None:
                progress(done / len(self._shapes))
        self.memory_bytes = recorder.finish()

    def shape_for(self, rows: int) -> DecodeShape:
        """The smallest that holds so many rows. ValueError where none does."""
        index = bisect.bisect_left(self._rows, rows)
        if rows < 1 or index == len(self._rows):
            raise ValueError(f"rows: {rows} is not in 1…{self._rows[-1] if self._rows else 0}")
        return self._shapes[index]

    def replay(self, shape: DecodeShape) -> torch.Tensor:
        """One step of the static buffers' contents: logits [shape.rows, V], overwritten by the next step. Does not
        wait for the device.
        """
        captured = self._captured.get(shape.rows)
        if captured is None:
            return self._run(shape)
        launch, logits = captured
        launch()
        return logits

    def close(self) -> None:
        """Frees the graphs; steps are launched anew afterwards. Nothing may be under way."""
        self._captured.clear()

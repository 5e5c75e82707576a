"""A step's inputs on their way to a GPU: gathered in pinned host memory with numpy, copied at once, seen as tensors.

Arrays are put one after another, each at an offset that depends on nothing but the sizes of those before it: a step of
the same sizes finds its tensors at the same addresses, so that a captured graph reads the next step's numbers. Host
buffers take turns, because the copy of one may still be under way when the next step is gathered; the device's is one,
since copies and kernels follow each other on one stream.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

ALIGNMENT_BYTES = 256
"""Of every array; kernels are compiled for pointers that are multiples of 16."""
_TORCH: dict[np.dtype[Any], torch.dtype] = {
    np.dtype(np.uint8): torch.uint8,
    np.dtype(np.int32): torch.int32,
    np.dtype(np.int64): torch.int64,
    np.dtype(np.float32): torch.float32,
    np.dtype(np.float64): torch.float64,
}


@dataclass(frozen=True, slots=True)
class Place:
    """Where an array lies in the buffers."""

    offset: int
    """Bytes."""
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def nbytes(self) -> int:
        """Of the array."""
        return int(np.prod(self.shape)) * self.dtype.itemsize


class Staging:
    """Buffers of one size in turn, and their counterpart on the device. One thread, one stream."""

    def __init__(self, device: torch.device, nbytes: int, turns: int) -> None:
        """`turns`: host buffers; one may be filled again when the step `turns` before it is over."""
        self.nbytes = nbytes
        pinned = device.type == "cuda"
        self._hosts = [torch.empty(nbytes, dtype=torch.uint8, pin_memory=pinned) for _ in range(turns)]
        self._arrays: list[NDArray[np.uint8]] = [host.numpy() for host in self._hosts]
        self._device = torch.zeros(nbytes, dtype=torch.uint8, device=device)
        self._turn = 0
        self._used = 0

    def begin(self) -> None:
        """The next step's inputs follow."""
        self._turn = (self._turn + 1) % len(self._hosts)
        self._used = 0

    def room(self, shape: tuple[int, ...], dtype: type[np.generic]) -> tuple[Place, NDArray[Any]]:
        """An array to be filled before `upload`. AssertionError where the buffers are too small."""
        place = Place(-(-self._used // ALIGNMENT_BYTES) * ALIGNMENT_BYTES, shape, np.dtype(dtype))
        self._used = place.offset + place.nbytes
        assert self._used <= self.nbytes, f"{self._used} bytes of inputs do not fit into {self.nbytes}"
        stretch = self._arrays[self._turn][place.offset : self._used]
        return place, stretch.view(place.dtype).reshape(shape)

    def put(self, values: NDArray[Any]) -> Place:
        """A copy of `values`."""
        place, array = self.room(values.shape, values.dtype.type)
        array[...] = values
        return place

    def upload(self) -> None:
        """Copies what was put, without waiting; into the current stream."""
        host = self._hosts[self._turn]
        self._device[: self._used].copy_(host[: self._used], non_blocking=True)

    def tensor(self, place: Place) -> torch.Tensor:
        """The device's counterpart of an array: a view, valid for as long as the buffers are."""
        stretch = self._device[place.offset : place.offset + place.nbytes]
        return stretch.view(_TORCH[place.dtype]).view(place.shape)

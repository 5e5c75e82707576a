"""Device memory with a descriptor, where the driver refuses: what is unsupported, what is an error, what is left."""

from __future__ import annotations

import ctypes
import os
from typing import Any

import pytest
from tandem.kvtransfer.cuda_ipc import driver
from tandem.kvtransfer.cuda_ipc.driver import Allocation, CudaError, CudaUnsupported

SIZE = 4 * driver.ROUND_BYTES


class Driver:
    """A CUDA driver whose memory is nowhere. `refuses`: a function, and the code that it answers."""

    def __init__(self, refuses: tuple[str, int] = ("", 0)) -> None:
        self._refuses = dict([refuses])
        self.taken: list[str] = []
        """What was made and is there still."""

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any) -> int:
            if code := self._refuses.get(name, 0):
                return code
            self._answer(name, arguments)
            return 0

        return call

    def _answer(self, name: str, arguments: tuple[Any, ...]) -> None:
        made = {"cuMemCreate": "memory", "cuMemAddressReserve": "address", "cuMemMap": "mapping"}
        gone = {"cuMemRelease": "memory", "cuMemAddressFree": "address", "cuMemUnmap": "mapping"}
        if name in made:
            self.taken.append(made[name])
        elif name in gone:
            self.taken.remove(gone[name])
        elif name == "cuDeviceGetAttribute":
            arguments[0]._obj.value = 1
        elif name == "cuMemGetAllocationGranularity":
            arguments[0]._obj.value = driver.ROUND_BYTES
        elif name == "cuMemExportToShareableHandle":
            arguments[0]._obj.value = os.memfd_create("device")


def loaded(monkeypatch: pytest.MonkeyPatch, *refuses: Any) -> Driver:
    found = Driver(*refuses)
    monkeypatch.setattr(driver, "_library", lambda: found)
    monkeypatch.setattr(driver, "_context", lambda device: (device, ctypes.c_void_p()))
    return found


def test_memory_has_a_descriptor_until_it_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    found = loaded(monkeypatch)
    allocation = Allocation.create(SIZE - 1, 0)
    assert found.taken == ["address", "mapping"], "which keep the memory"
    assert allocation.fd is not None
    os.fstat(allocation.fd)
    allocation.close()
    allocation.close()
    assert found.taken == []
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(allocation.fd)


@pytest.mark.parametrize("code", [1, 304, 801, 999])
def test_memory_that_cannot_be_exported_is_unsupported_whatever_the_code(
    monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    found = loaded(monkeypatch, ("cuMemExportToShareableHandle", code))
    with pytest.raises(CudaUnsupported, match=rf"^cuMemExportToShareableHandle: error \({code}\)$"):
        Allocation.create(SIZE, 0)
    assert found.taken == []


@pytest.mark.parametrize("function", ["cuMemCreate", "cuMemMap", "cuMemSetAccess"])
def test_memory_that_is_not_left_is_an_error(monkeypatch: pytest.MonkeyPatch, function: str) -> None:
    found = loaded(monkeypatch, (function, 2))
    open_before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(CudaError, match=function) as refused:
        Allocation.create(SIZE, 0)
    assert not isinstance(refused.value, CudaUnsupported)
    assert found.taken == []
    assert len(os.listdir("/proc/self/fd")) == open_before

"""Device memory with a descriptor, through CUDA's driver: CUDA C++ Programming Guide, "Virtual Memory Management", and
the driver API's reference, 6.14.

Memory that is made so can be exported as a file descriptor, which is passed over a Unix socket like that of any other
memory: who was not handed it cannot have it, whatever it knows. (A handle of `cudaIpcGetMemHandle` is bytes that any
process of the user could use; and what PyTorch's allocator made with expandable segments has none.) Physical memory is
counted: it lives until the last process that maps it has unmapped it, so that an owner's death leaves a reader's
mapping as it is. Readers map it for reading only.

Every function raises `CudaError`; none of this is loaded where there is no driver.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
from collections.abc import Iterator

ROUND_BYTES = 2 * 2**20
"""Sizes are whole multiples: of the granularity of every device so far, so that both sides compute the same size."""
_POSIX_FD = 1  # CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR
_DEVICE, _PINNED = 1, 1  # CU_MEM_LOCATION_TYPE_DEVICE, CU_MEM_ALLOCATION_TYPE_PINNED
_READ, _READ_WRITE = 1, 3  # CU_MEM_ACCESS_FLAGS_PROT_…
_NOT_HERE = (800, 801)  # CUDA_ERROR_NOT_PERMITTED, CUDA_ERROR_NOT_SUPPORTED
_ORDINAL = 9  # CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL
_VMM_SUPPORTED, _FD_SUPPORTED = 102, 103  # CU_DEVICE_ATTRIBUTE_…


class CudaError(RuntimeError):
    """The driver refused."""


class CudaUnsupported(CudaError):
    """There is no driver, or its memory has no descriptors."""


class _Location(ctypes.Structure):
    _fields_ = (("type", ctypes.c_int), ("id", ctypes.c_int))


class _Flags(ctypes.Structure):
    _fields_ = (
        ("compression", ctypes.c_ubyte),
        ("rdma", ctypes.c_ubyte),
        ("usage", ctypes.c_ushort),
        ("reserved", ctypes.c_ubyte * 4),
    )


class _Properties(ctypes.Structure):
    """CUmemAllocationProp."""

    _fields_ = (
        ("type", ctypes.c_int),
        ("handle_types", ctypes.c_int),
        ("location", _Location),
        ("metadata", ctypes.c_void_p),
        ("flags", _Flags),
    )


class _Access(ctypes.Structure):
    """CUmemAccessDesc."""

    _fields_ = (("location", _Location), ("flags", ctypes.c_int))


_U64, _SIZE, _INT, _POINTER = ctypes.c_uint64, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p
_ARGUMENTS = {
    "cuInit": (ctypes.c_uint,),
    "cuGetErrorName": (_INT, _POINTER),
    "cuDeviceGet": (_POINTER, _INT),
    "cuDeviceGetAttribute": (_POINTER, _INT, _INT),
    "cuDevicePrimaryCtxRetain": (_POINTER, _INT),
    "cuPointerGetAttribute": (_POINTER, _INT, _U64),
    "cuCtxPushCurrent_v2": (_POINTER,),
    "cuCtxPopCurrent_v2": (_POINTER,),
    "cuMemGetAllocationGranularity": (_POINTER, _POINTER, _INT),
    "cuMemCreate": (_POINTER, _SIZE, _POINTER, _U64),
    "cuMemRelease": (_U64,),
    "cuMemAddressReserve": (_POINTER, _SIZE, _SIZE, _U64, _U64),
    "cuMemAddressFree": (_U64, _SIZE),
    "cuMemMap": (_U64, _SIZE, _SIZE, _U64, _U64),
    "cuMemUnmap": (_U64, _SIZE),
    "cuMemSetAccess": (_U64, _SIZE, _POINTER, _SIZE),
    "cuMemExportToShareableHandle": (_POINTER, _U64, _INT, _U64),
    "cuMemImportFromShareableHandle": (_POINTER, _POINTER, _INT),
}


@functools.cache
def _library() -> ctypes.CDLL:
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise CudaUnsupported(f"no CUDA driver: {error}") from error
    for name, arguments in _ARGUMENTS.items():
        try:
            function = getattr(library, name)
        except AttributeError as error:
            raise CudaUnsupported(f"the CUDA driver is too old: it has no {name}") from error
        function.argtypes, function.restype = arguments, _INT
    return library


def _call(name: str, *arguments: object) -> None:
    library = _library()
    result = getattr(library, name)(*arguments)
    if result:
        text = ctypes.c_char_p()
        library.cuGetErrorName(result, ctypes.byref(text))
        kind = CudaUnsupported if result in _NOT_HERE else CudaError
        raise kind(f"{name}: {(text.value or b'error').decode()} ({result})")


@functools.cache
def _context(device: int) -> tuple[int, ctypes.c_void_p]:
    """(the driver's number of a device, its primary context, which PyTorch uses too and this process keeps)."""
    _call("cuInit", 0)
    number, context = _INT(), _POINTER()
    _call("cuDeviceGet", ctypes.byref(number), device)
    _call("cuDevicePrimaryCtxRetain", ctypes.byref(context), number)
    return number.value, context


@contextlib.contextmanager
def _on(device: int) -> Iterator[int]:
    """The device's context is this thread's meanwhile; yields the driver's number of it."""
    number, context = _context(device)
    _call("cuCtxPushCurrent_v2", context)
    try:
        yield number
    finally:
        _call("cuCtxPopCurrent_v2", ctypes.byref(_POINTER()))


class Allocation:
    """Device memory at `address`; `fd` is its descriptor, None for another process's. `close` ends it here."""

    def __init__(self, device: int, address: int, num_bytes: int, fd: int | None) -> None:
        """Of what `create` and `open` have mapped."""
        self.device = device
        self.address = address
        self.fd = fd
        self._num_bytes = num_bytes
        self._open = True

    @classmethod
    def create(cls, num_bytes: int, device: int) -> Allocation:
        """New memory of this process, rounded up, not zeroed. CudaUnsupported where it can have no descriptor."""
        size = _rounded(num_bytes)
        with _on(device) as number, contextlib.ExitStack() as undo:
            for attribute in (_VMM_SUPPORTED, _FD_SUPPORTED):
                value = _INT()
                _call("cuDeviceGetAttribute", ctypes.byref(value), attribute, number)
                if not value.value:
                    raise CudaUnsupported("this GPU's memory cannot be exported as a descriptor")
            wanted = _Properties(type=_PINNED, handle_types=_POSIX_FD, location=_Location(_DEVICE, number))
            unit = _SIZE()
            _call("cuMemGetAllocationGranularity", ctypes.byref(unit), ctypes.byref(wanted), 0)
            if ROUND_BYTES % unit.value:
                raise CudaUnsupported(f"this GPU allocates in units of {unit.value} bytes, not of {ROUND_BYTES}")
            handle = _U64()
            _call("cuMemCreate", ctypes.byref(handle), size, ctypes.byref(wanted), 0)
            undo.callback(_call, "cuMemRelease", handle)  # mapping and descriptor keep the memory
            fd = _exported(handle)
            try:
                address = _map(handle, size, number, _READ_WRITE)
            except BaseException:
                os.close(fd)
                raise
        return cls(device, address, size, fd)

    @classmethod
    def open(cls, fd: int, num_bytes: int, device: int) -> Allocation:
        """Memory of `num_bytes` that another process created, mapped for reading; `fd` stays the caller's."""
        size = _rounded(num_bytes)
        with _on(device) as number, contextlib.ExitStack() as undo:
            handle = _U64()
            _call("cuMemImportFromShareableHandle", ctypes.byref(handle), fd, _POSIX_FD)
            undo.callback(_call, "cuMemRelease", handle)
            address = _map(handle, size, number, _READ)
        return cls(device, address, size, None)

    def home(self) -> int:
        """The GPU that the memory lies on: another than `device` where that one reads a neighbor's."""
        ordinal = _INT()
        with _on(self.device):
            _call("cuPointerGetAttribute", ctypes.byref(ordinal), _ORDINAL, self.address)
        return ordinal.value

    def close(self) -> None:
        """Unmaps it; nothing on the device uses it any more. Idempotent."""
        if not self._open:
            return
        self._open = False
        if self.fd is not None:
            os.close(self.fd)
        with _on(self.device):
            _call("cuMemUnmap", self.address, self._num_bytes)
            _call("cuMemAddressFree", self.address, self._num_bytes)


def _rounded(num_bytes: int) -> int:
    return -(-num_bytes // ROUND_BYTES) * ROUND_BYTES


def _exported(handle: ctypes.c_uint64) -> int:
    """A descriptor of memory. In a container (gVisor) a driver that has such memory may refuse this with any code:
    CudaUnsupported.
    """
    fd = _INT(-1)
    try:
        _call("cuMemExportToShareableHandle", ctypes.byref(fd), handle, _POSIX_FD, 0)
    except CudaError as error:
        raise CudaUnsupported(str(error)) from error
    return fd.value


def _map(handle: ctypes.c_uint64, size: int, number: int, access: int) -> int:
    """Puts memory at an address of its own, which it returns."""
    with contextlib.ExitStack() as undo:
        address = _U64()
        _call("cuMemAddressReserve", ctypes.byref(address), size, 0, 0, 0)
        undo.callback(_call, "cuMemAddressFree", address, size)
        _call("cuMemMap", address, size, 0, handle, 0)
        undo.callback(_call, "cuMemUnmap", address, size)
        wanted = _Access(location=_Location(_DEVICE, number), flags=access)
        _call("cuMemSetAccess", address, size, ctypes.byref(wanted), 1)
        undo.pop_all()
    return address.value

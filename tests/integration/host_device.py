"""A "device" for tests whose memory is a memfd: it copies as a GPU would, when it is told to, and may break."""

from __future__ import annotations

import mmap
import os
import threading
from collections.abc import Sequence

from tandem.kvtransfer.cuda_ipc.memory import DeviceCopy, DeviceLost, DeviceMemory, PeerMemory
from tandem.kvtransfer.layout import KVLayout
from tandem.kvtransfer.mapped.segment import KVSegment, SegmentError
from tandem.kvtransfer.memory_store import MemoryKVStore


class DeviceStore(MemoryKVStore):
    """KV in the device's memory, generations in host memory."""

    def __init__(self, layout: KVLayout, num_blocks: int) -> None:
        super().__init__(layout, num_blocks)
        self.segment = KVSegment(layout, num_blocks, in_device=True)
        size = num_blocks * layout.block_bytes
        fd = os.memfd_create("device")
        os.ftruncate(fd, size)
        self._data = memoryview(mmap.mmap(fd, size))
        self.device_memory: HostDevice = HostDevice(self, fd)

    def close(self) -> None:
        self.segment.close()
        os.close(self.device_memory.fd)


class HostDevice(DeviceMemory):
    def __init__(self, store: DeviceStore, fd: int) -> None:
        self.store = store
        self.fd = fd
        self.refuses: str = ""
        """Why no memory can be mapped."""
        self.broken = False
        """Copies fail from now on."""
        self.gate = threading.Event()
        """Copies end when it is set."""
        self.gate.set()
        self.copies: list[HostCopy] = []
        self.most_under_way = 0
        self.peers: list[HostPeer] = []

    def open(self, fd: int, layout: KVLayout, num_blocks: int) -> PeerMemory:
        if self.refuses:
            raise SegmentError(self.refuses)
        memory = mmap.mmap(fd, num_blocks * layout.block_bytes, prot=mmap.PROT_READ)
        self.peers.append(HostPeer(self, layout, memory))
        return self.peers[-1]


class HostPeer(PeerMemory):
    def __init__(self, device: HostDevice, layout: KVLayout, memory: mmap.mmap) -> None:
        self.device = device
        self.layout = layout
        self.memory: mmap.mmap | None = memory

    def begin_copy(
        self, source_ids: Sequence[int], target_ids: Sequence[int], *, first_token: int, num_tokens: int
    ) -> DeviceCopy:
        if self.device.broken:
            raise DeviceLost("an illegal memory access was encountered")
        assert self.memory is not None, "a copy out of memory that was closed"
        tokens = range(first_token, first_token + num_tokens)
        self.device.copies.append(HostCopy(self, list(source_ids), list(target_ids), tokens))
        under_way = sum(copy.under_way for copy in self.device.copies)
        self.device.most_under_way = max(self.device.most_under_way, under_way)
        return self.device.copies[-1]

    def close(self) -> None:
        assert not any(copy.under_way for copy in self.device.copies), "memory was unmapped under a copy"
        memory, self.memory = self.memory, None
        if memory is not None:
            memory.close()


class HostCopy(DeviceCopy):
    """Happens when it is waited for, or looked at, once the gate is open."""

    def __init__(self, peer: HostPeer, source_ids: list[int], target_ids: list[int], tokens: range) -> None:
        self.peer = peer
        self.source_ids, self.target_ids, self.tokens = source_ids, target_ids, tokens
        self.under_way = True
        self._lock = threading.Lock()

    def done(self) -> bool:
        if self.peer.device.gate.is_set():
            self._happen()
        return not self.under_way

    def wait(self) -> None:
        assert self.peer.device.gate.wait(20)
        self._happen()

    def _happen(self) -> None:
        with self._lock:
            if not self.under_way:
                return
            self.under_way = False
            if self.peer.device.broken:
                raise DeviceLost("an illegal memory access was encountered")
            self._copy()

    def _copy(self) -> None:
        store, theirs = self.peer.device.store, self.peer.layout
        memory = self.peer.memory
        assert memory is not None
        if theirs == store.layout:
            size = theirs.block_size
            for index in range(self.tokens.start // size, self.tokens.stop // size):
                start = self.source_ids[index] * theirs.block_bytes
                store.write_block(self.target_ids[index], memory[start : start + theirs.block_bytes])
            return
        (group,) = theirs.groups
        rows, slot_bytes = group.num_layers * 2 * group.num_kv_heads, theirs.block_bytes // theirs.block_size
        slot_bytes //= rows
        for token in self.tokens:
            for row in range(rows):
                origin = self.source_ids[token // theirs.block_size] * theirs.block_bytes
                origin += (row * theirs.block_size + token % theirs.block_size) * slot_bytes
                own = store.layout
                goal = self.target_ids[token // own.block_size] * own.block_bytes
                goal += (row * own.block_size + token % own.block_size) * slot_bytes
                store._data[goal : goal + slot_bytes] = memory[origin : origin + slot_bytes]

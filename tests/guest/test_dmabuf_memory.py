"""d.5, scenario 21, and what else there is to dma-bufs of memory: CPU access, fences, displays."""

from __future__ import annotations

import asyncio
import fcntl
import gc
import mmap
import os
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from dmabuf_support import PAGE, no_dmabuf_left
from modes import EDU
from test_ioctl_mdev import mdev

import vfiopy
from vfiopy import DmaBuf, Fence, MemfdPart
from vfiopy.errors import AddressRangeError, NotSupportedError, VfioTimeoutError, WrongFdError
from vfiopy.kernel.ioctl import SyncFileFd
from vfiopy.lives import drain_finalizers

Bdf = Callable[..., str]
SW_SYNC = Path("/sys/kernel/debug/sync/sw_sync")
SW_SYNC_CREATE_FENCE, SW_SYNC_INC = 0xC0285700, 0x40045701


@pytest.fixture(autouse=True)
def no_leak() -> Iterator[None]:
    with no_dmabuf_left():
        yield
        gc.collect()
        drain_finalizers()


@pytest.fixture
def memfd() -> Iterator[int]:
    fd = os.memfd_create("test", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, 8 * PAGE)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
    yield fd
    os.close(fd)


class Timeline:
    """A software timeline of the kernel's sw_sync: fences that signal when it is advanced."""

    def __init__(self) -> None:
        self.fd = os.open(SW_SYNC, os.O_RDWR | os.O_CLOEXEC)

    def fence(self, value: int, name: bytes = b"fence") -> Fence:
        argument = bytearray(struct.pack("=I32si", value, name, -1))
        fcntl.ioctl(self.fd, SW_SYNC_CREATE_FENCE, argument)
        return Fence(SyncFileFd(struct.unpack_from("=i", argument, 36)[0], name.decode()))

    def advance(self, by: int = 1) -> None:
        fcntl.ioctl(self.fd, SW_SYNC_INC, struct.pack("=I", by))

    def advance_soon(self, seconds: float = 0.1) -> threading.Thread:
        def later() -> None:
            time.sleep(seconds)
            self.advance()

        thread = threading.Thread(target=later)
        thread.start()
        return thread


@pytest.fixture
def timeline() -> Iterator[Timeline]:
    timeline = Timeline()
    yield timeline
    os.close(timeline.fd)


# --- where it comes from ----------------------------------------------------------------------------------------


def test_memfds(memfd: int) -> None:
    os.pwrite(memfd, b"first", 0)
    os.pwrite(memfd, b"third", 2 * PAGE)
    with DmaBuf.of_memfd(MemfdPart(memfd, 0, 4 * PAGE)) as buffer:
        assert (buffer.size, buffer.exporter, buffer.ranges) == (4 * PAGE, "udmabuf", None)
        with buffer.cpu_access("rw") as array:
            assert bytes(array[:5]) == b"first"
            array[PAGE : PAGE + 6] = np.frombuffer(b"second", np.uint8)
        assert os.pread(memfd, 6, PAGE) == b"second"
        with buffer.cpu_access("r", offset=PAGE + 2, size=4) as array:
            assert bytes(array) == b"cond"
            with pytest.raises(ValueError, match="read-only"):
                array[0] = 1
    with (
        DmaBuf.of_memfd(MemfdPart(memfd, 2 * PAGE, PAGE), MemfdPart(memfd, 0, PAGE)) as buffer,
        buffer.cpu_access("r") as array,
    ):
        assert bytes(array[:5]) == b"third"
        assert bytes(array[PAGE : PAGE + 5]) == b"first"
    with pytest.raises(vfiopy.VfioError, match="whole pages"):
        DmaBuf.of_memfd(MemfdPart(memfd, 1, PAGE))
    unsealed = os.memfd_create("unsealed")
    os.ftruncate(unsealed, PAGE)
    with pytest.raises(vfiopy.VfioError, match="sealed with F_SEAL_SHRINK"):
        DmaBuf.of_memfd(MemfdPart(unsealed, 0, PAGE))
    os.close(unsealed)


def test_new_memory_and_heaps() -> None:
    with DmaBuf.allocate(PAGE + 1) as buffer:
        assert buffer.size == 2 * PAGE
        buffer.name = "scratch"
        assert buffer.name == "scratch"
        assert buffer.info.references >= 1
        with pytest.raises(ValueError, match="longer than 31 bytes"):
            buffer.name = "n" * 32
    heaps = sorted(path.name for path in Path("/dev/dma_heap").iterdir())
    assert len(heaps) >= 2, "the lab has the system heap and one of CMA"
    for heap in heaps:
        with DmaBuf.of_heap(3 * PAGE, heap) as buffer:
            assert buffer.size == 3 * PAGE
            with buffer.cpu_access("rw", dtype="<u8") as array:
                assert array.shape == (3 * PAGE // 8,)
                array[-1] = 7
            with buffer.cpu_access("r", dtype="<u8") as array:
                assert array[-1] == 7
    with pytest.raises(NotSupportedError, match="there is no such heap") as caught:
        DmaBuf.of_heap(PAGE, "none")
    assert "system" in caught.value.hint
    with pytest.raises(vfiopy.AlignmentError):
        DmaBuf.allocate(0)


def test_only_dma_bufs_are_adopted(memfd: int) -> None:
    with pytest.raises(WrongFdError, match="not a dma-buf"):
        DmaBuf.adopt(memfd)
    with DmaBuf.allocate(PAGE) as buffer, DmaBuf.adopt(buffer.fileno()) as same:
        assert same.inode == buffer.inode
        assert same.origin is buffer.origin


def test_21_memory_that_cannot_be_imported(memfd: int, bdf: Bdf) -> None:
    edu = bdf(EDU)
    with vfiopy.bind(edu), vfiopy.open(edu, backend="iommufd") as device:
        space = device.space
        ioas = space.mappers[0].ioas
        hints = set()
        with DmaBuf.of_memfd(MemfdPart(memfd, PAGE, 2 * PAGE)) as udmabuf, DmaBuf.of_heap(PAGE) as heap:
            for buffer in (udmabuf, heap):
                with pytest.raises(NotSupportedError, match="takes only what vfio-pci exports") as caught:
                    space.import_dmabuf(buffer)
                hints.add(caught.value.hint)
                with pytest.raises(NotSupportedError, match="takes only those that vfio-pci exports"):
                    ioas.map_file(buffer.fileno(), 0, PAGE)  # so says the kernel
            assert len(hints) == 2
            # The way that works: the memfd below it, whose pages are the same.
            (memory,) = udmabuf.backing()
            assert heap.backing() == ()
            with space.map(memory) as mapping:
                assert mapping.size == 2 * PAGE
                os.pwrite(memfd, b"through the memfd", PAGE)
                from vfiopy.drivers.edu import EduDriver  # noqa: PLC0415

                driver, device.bus_master = EduDriver(device), True
                driver.load(mapping.iova, 17)
                driver.store(mapping.iova + PAGE, 17)
                with udmabuf.cpu_access("r", offset=PAGE, size=17) as array:
                    assert bytes(array) == b"through the memfd"
            del memory
        with Path(__file__).open("rb") as file:  # no tmpfs, whose files are as good as memfds
            with pytest.raises(vfiopy.MemoryKindError, match="not a memfd"):
                vfiopy.file_memory(file.fileno(), PAGE)
            with pytest.raises(vfiopy.VfioError):
                ioas.map_file(file.fileno(), 0, PAGE)
        with DmaBuf.allocate(PAGE) as buffer, pytest.raises(vfiopy.MemoryKindError) as refused:
            vfiopy.file_memory(buffer.fileno(), PAGE)
        assert "import_dmabuf" in refused.value.hint
        with space.map(vfiopy.file_memory(memfd, PAGE)) as mapping:
            assert mapping.iova
        assert not space.book.mappings()


# --- the CPU ----------------------------------------------------------------------------------------------------


def test_views_may_outlive_the_access() -> None:
    with DmaBuf.allocate(PAGE) as buffer:
        with buffer.cpu_access("w") as array:
            array[:] = 5
        view = array[10:]
        del array
    assert int(view.sum()) == 5 * (PAGE - 10)  # the pages stay until the last view is gone
    del view
    drain_finalizers()


def test_refused_accesses() -> None:
    with DmaBuf.allocate(PAGE) as buffer:
        for offset, size in ((-1, 1), (0, 0), (0, PAGE + 1), (PAGE, 1)):
            with pytest.raises(AddressRangeError), buffer.cpu_access("r", offset=offset, size=size):
                pass
        with pytest.raises(ValueError, match="'r', 'w' or 'rw'"), buffer.cpu_access("x"):
            pass
        private = mmap.MAP_PRIVATE
        with pytest.raises(NotSupportedError, match="MAP_SHARED or"), buffer.cpu_access("rw", flags=private):
            pass
        with pytest.raises(RuntimeError, match="mine"), buffer.cpu_access("rw"):
            raise RuntimeError("mine")
        with buffer.cpu_access("rw"):  # SYNC END was sent all the same
            pass
    with pytest.raises(vfiopy.ClosedError):
        buffer.cpu_access("r")


def test_cpu_access_waits_for_fences_and_survives_signals(timeline: Timeline) -> None:
    import signal  # noqa: PLC0415

    with DmaBuf.allocate(PAGE) as buffer, timeline.fence(1) as fence:
        buffer.add_fence(fence, "w")
        hits: list[int] = []
        before = signal.signal(signal.SIGALRM, lambda *_: hits.append(1))
        signal.setitimer(signal.ITIMER_REAL, 0.02, 0.02)  # EINTR, again and again, while SYNC waits for the fence
        try:
            thread = timeline.advance_soon(0.3)
            start = time.monotonic()
            with buffer.cpu_access("rw"):
                waited = time.monotonic() - start
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
            thread.join()
        assert waited > 0.2
        assert hits


# --- fences -----------------------------------------------------------------------------------------------------


def test_fences(timeline: Timeline) -> None:
    with timeline.fence(1, b"one") as one, timeline.fence(2, b"two") as two, one.merge(two, "both") as both:
        assert not both.signalled
        assert both.info.name == "both"
        both.set_deadline(0.01)
        with pytest.raises(VfioTimeoutError, match=r"not signalled within 0.01 s"):
            both.wait(0.01)
        timeline.advance()
        one.wait(1)
        assert not both.signalled
        thread = timeline.advance_soon()
        both.wait(5)
        thread.join()
        assert both.signalled
        assert both.info.status == 1


def test_fences_of_a_buffer(timeline: Timeline) -> None:
    with DmaBuf.allocate(PAGE) as buffer, timeline.fence(1) as writing:
        buffer.wait("rw", 0)
        with buffer.fence("rw") as nothing:
            assert nothing.signalled
        buffer.add_fence(writing, "w")
        for mode in ("r", "w", "rw"):
            with pytest.raises(VfioTimeoutError):
                buffer.wait(mode, 0.01)
        with buffer.fence("r") as fence:
            assert not fence.signalled
            thread = timeline.advance_soon()
            fence.wait(5)
            thread.join()
        buffer.wait("rw", 0)
    with DmaBuf.allocate(PAGE) as buffer, timeline.fence(2) as reading:
        buffer.add_fence(reading, "r")
        buffer.wait("r", 0)  # readers do not wait for readers
        with pytest.raises(VfioTimeoutError):
            buffer.wait("w", 0.01)
        timeline.advance()
        buffer.wait("w", 1)


def test_fences_in_an_event_loop(timeline: Timeline) -> None:
    async def main() -> list[str]:
        order: list[str] = []

        async def wait(name: str, waiting: object) -> None:
            await waiting  # type: ignore[misc]
            order.append(name)

        with DmaBuf.allocate(PAGE) as buffer, timeline.fence(1) as first, timeline.fence(2) as second:
            buffer.add_fence(second, "w")
            with pytest.raises(VfioTimeoutError):
                await second.wait_async(0.01)
            tasks = [
                asyncio.create_task(wait("second", second.wait_async(5))),
                asyncio.create_task(wait("buffer", buffer.wait_async("r", 5))),
                asyncio.create_task(wait("buffer too", buffer.wait_async("rw", 5))),
                asyncio.create_task(wait("first", first.wait_async(5))),
            ]
            await asyncio.sleep(0.05)
            timeline.advance()
            await asyncio.sleep(0.05)
            assert order == ["first"]
            timeline.advance()
            await asyncio.gather(*tasks)
            await second.wait_async(0)
        return order

    assert len(asyncio.run(main())) == 4


# --- displays ---------------------------------------------------------------------------------------------------


def test_a_display_plane() -> None:
    with mdev("mbochs", "small") as calls:
        with pytest.raises((vfiopy.StateError, vfiopy.VfioError)):
            DmaBuf.of_plane(calls)
        # Program a mode of 64x80 at 32 bit through the Bochs display's registers in BAR 2.
        registers = calls.get_region_info(2).offset + 0x500
        for index, value in ((4, 0), (1, 64), (2, 80), (3, 32), (6, 64), (4, 0x41)):
            calls.pwrite(registers + 2 * index, value.to_bytes(2, "little"))
        buffer, plane = DmaBuf.of_plane(calls)
        with buffer:
            assert (plane.width, plane.height, plane.stride) == (64, 80, 256)
            assert buffer.size >= plane.size >= 64 * 80 * 4
            assert buffer.exporter == "mbochs"
            # mbochs exports read-only and then insists on a shared mapping, which read-only files never get.
            with pytest.raises(NotSupportedError, match="has no mmap"), buffer.cpu_access("r"):
                pass
            with vfiopy.AddressSpace("no") as space, pytest.raises(NotSupportedError, match="vfio-pci exports"):
                space.import_dmabuf(buffer)
    with mdev("mdpy", "vga") as calls, pytest.raises(NotSupportedError, match="its display is a region") as caught:
        DmaBuf.of_plane(calls)
    assert "map region" in caught.value.hint
    with mdev("mtty", "mtty-2") as calls, pytest.raises(NotSupportedError, match="has no display"):
        DmaBuf.of_plane(calls)

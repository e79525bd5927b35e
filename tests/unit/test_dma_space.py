"""Address spaces through an emulated device: the same code as for a kernel's."""

from __future__ import annotations

import ctypes
import errno
import gc
import mmap
import threading
from collections.abc import Iterator

import numpy as np
import pytest
from iova_kernel import FakeKernel

import vfiopy
from vfiopy import AddressSpace, ClosedError, HostMemory, IovaRangeError, PinnedError, Prot
from vfiopy._native import SpaceBase
from vfiopy.backend import DeviceWindow, IovaRange, MapperTraits, Memory, MemoryKind
from vfiopy.dma.buffer import allocate_pages
from vfiopy.dma.memory import PAGE_SIZE
from vfiopy.iova import MAPPER_TYPE1, leaked_memory
from vfiopy.lives import drain_finalizers


@pytest.fixture
def device() -> Iterator[vfiopy.Device]:
    with vfiopy.open("emulated:edu") as device:
        yield device


@pytest.fixture
def page() -> Iterator[mmap.mmap]:
    with mmap.mmap(-1, PAGE_SIZE) as area:
        yield area


def test_map_find_unmap(device: vfiopy.Device, page: mmap.mmap) -> None:
    space = device.space
    with space.map(page, prot=Prot.READ) as mapping:
        assert mapping
        assert mapping.iova
        assert (mapping.size, mapping.prot) == (PAGE_SIZE, Prot.READ)
        found = space.find(mapping.last)
        assert found is not None
        assert found.memory is mapping.memory
        assert [item.iova for item in space.mappings()] == [mapping.iova]
    assert not mapping
    assert space.mappings() == []
    with pytest.raises(ClosedError, match="unmapped before"):
        mapping.unmap()
    with pytest.raises(ClosedError):
        _ = mapping.memory


def test_fixed_iova_and_what_is_refused(device: vfiopy.Device, page: mmap.mmap) -> None:
    space = device.space
    mapping = space.map(page, iova=0x10_0000)
    assert mapping.iova == 0x10_0000
    with pytest.raises(vfiopy.OverlapError, match="0x100000"):
        space.map(page, iova=0x10_0000)
    with pytest.raises(vfiopy.AlignmentError):
        space.map(page, iova=0x10_0800)
    with pytest.raises(vfiopy.IovaRangeError):
        space.map(page, iova=0xFEE0_0000)
    with pytest.raises(vfiopy.IovaRangeError):
        space.map(page, iova=0x1000_0000, limit=(1 << 28) - 1)
    with pytest.raises(vfiopy.NotMappedError):
        space.unmap(0x20_0000)
    assert space.unmap(0x20_0000, PAGE_SIZE) == 0
    with pytest.raises(vfiopy.NotMappedError):
        space.unmap(0x20_0000, 0)
    assert space.unmap_all() == PAGE_SIZE


@pytest.mark.parametrize("iova", [-1, -PAGE_SIZE, (1 << 64) - 1, 1 << 64])
def test_a_wrong_iova_does_not_mean_anywhere(device: vfiopy.Device, page: mmap.mmap, iova: int) -> None:
    space = device.space
    with pytest.raises(ValueError, match="iova"):
        space.map(page, iova=iova)
    memory = allocate_pages(PAGE_SIZE)
    with pytest.raises(ValueError, match="iova"):
        space.map(memory, iova=iova)
    window = DeviceWindow(0, 0, PAGE_SIZE, -1, memory.address, memory)  # as import_dmabuf() and peer() do
    with pytest.raises(ValueError, match="iova"):
        space.map_window(window, Prot.RW, iova=iova, limit=(1 << 64) - 1, alignment=0)
    assert space.mappings() == []


def test_the_device_limit_is_kept(device: vfiopy.Device) -> None:
    device.dma.bits = 28
    buffers = [device.dma.allocate(1 << 20) for _ in range(20)]
    assert all(buffer.iova > 0 and buffer.iova + (1 << 20) <= 1 << 28 for buffer in buffers)
    for buffer in buffers:
        buffer.free()


def test_a_device_has_1_to_64_address_lines(device: vfiopy.Device) -> None:
    for bits in (0, -1, 65):
        with pytest.raises(ValueError, match=f"1 to 64 address lines, not {bits}"):
            device.dma.bits = bits
    with pytest.raises(TypeError):
        device.dma.bits = 28.5  # type: ignore[assignment]
    assert device.dma.bits == 64
    device.dma.bits = 32
    assert device.dma.limit == 0xFFFF_FFFF


def test_a_stale_handle_cannot_unmap_what_came_after(device: vfiopy.Device, page: mmap.mmap) -> None:
    space = device.space
    stale = space.map(page, iova=0x5000)
    space.unmap(0x5000)
    with mmap.mmap(-1, PAGE_SIZE) as other:
        fresh = space.map(other, iova=0x5000)
        assert not stale
        with pytest.raises(ClosedError):
            stale.unmap()
        assert fresh
        fresh.unmap()


def test_map_many_is_all_or_nothing(device: vfiopy.Device) -> None:
    areas = [mmap.mmap(-1, PAGE_SIZE) for _ in range(3)]
    with pytest.raises(vfiopy.MemoryKindError):
        device.space.map_many([*areas, b"immutable"])
    assert device.space.mappings() == []
    mappings = device.space.map_many(areas)
    assert len({mapping.iova for mapping in mappings}) == 3
    for mapping in mappings:
        mapping.unmap()
    for area in areas:
        area.close()


def test_buffers_know_their_iova(device: vfiopy.Device) -> None:
    buffer = device.dma.allocate((16, 64), dtype="u4")
    assert buffer.shape == (16, 64)
    assert buffer.dtype == np.uint32
    assert not buffer.any()
    assert buffer[3].iova == buffer.iova + 3 * 256
    assert buffer[3][5:].iova == buffer.iova + 3 * 256 + 20
    assert buffer.view("u1")[0, 7:].iova == buffer.iova + 7
    assert buffer.device_address == buffer.iova
    assert buffer.mapping.iova == buffer.iova
    with pytest.raises(ClosedError, match="ordinary memory"):
        _ = (buffer + 1).iova
    with pytest.raises(ClosedError, match="ordinary memory"):
        _ = buffer.copy().iova
    buffer.free()
    buffer.free()
    with pytest.raises(ClosedError):
        _ = buffer.iova
    buffer[0, 0] = 7  # the host memory stays as long as somebody looks at it
    assert buffer[0, 0] == 7


def test_a_copy_neither_frees_nor_keeps_the_buffer(device: vfiopy.Device) -> None:
    buffer = device.dma.allocate(PAGE_SIZE)
    iova = buffer.iova
    copies = [buffer.copy(), buffer + 1, buffer[[1, 2]], buffer.astype("u4"), buffer.reshape(2, -1).T.reshape(-1)]
    for copy in copies:
        copy.free()
        with pytest.raises(ClosedError, match="ordinary memory"):
            _ = copy.mapping
    assert buffer.iova == iova
    views = [np.lib.stride_tricks.as_strided(buffer[8:], (4,), (2,), subok=True), buffer[8:], buffer.real[8:]]
    assert [view.iova for view in views] == [iova + 8] * 3
    del buffer, views
    gc.collect()
    with pytest.warns(ResourceWarning, match="DMA buffer of 0x1000 bytes at IOVA"):
        drain_finalizers()
    assert device.space.find(iova) is None


def test_big_buffers_are_congruent_so_that_big_pages_fit(device: vfiopy.Device) -> None:
    buffer = device.dma.allocate(3 << 20)
    assert buffer.address % vfiopy.HUGE_2M == 0
    assert buffer.iova % vfiopy.HUGE_2M == 0
    buffer.free()


def test_a_dropped_buffer_is_taken_back_with_a_warning(device: vfiopy.Device) -> None:
    buffer = device.dma.allocate(100)
    iova = buffer.iova
    view = buffer[10:20]
    del buffer
    gc.collect()
    assert drain_finalizers() == 0, "a view is alive"
    assert device.space.find(iova)
    del view
    gc.collect()
    with pytest.warns(ResourceWarning, match="DMA buffer of 0x1000 bytes at IOVA"):
        drain_finalizers()
    assert device.space.find(iova) is None


def test_a_plain_numpy_view_keeps_the_buffer_too(device: vfiopy.Device) -> None:
    buffer = device.dma.allocate(PAGE_SIZE)
    iova = buffer.iova
    plain = np.asarray(buffer)[5:]
    del buffer
    gc.collect()
    assert drain_finalizers() == 0
    assert device.space.find(iova)
    base = plain.base
    while not isinstance(base, vfiopy.DmaArray):
        base = base.base
    base.free()


def test_bounce_copies(device: vfiopy.Device) -> None:
    with device.dma.bounce(b"hello") as buffer:
        assert bytes(buffer) == b"hello"
        assert buffer.mapping.prot == Prot.READ


@pytest.mark.parametrize("in_python", [False, True])
def test_buffers_that_live_shortly_have_a_window(in_python: bool) -> None:
    with AddressSpace("window") as space:
        if in_python:
            space.add_mapper(SlowMapper())
        space.book.set_transient(0x10_0000, 0x10_1FFF)
        stays = [space.allocate(PAGE_SIZE) for _ in range(3)]
        with space.bounce(b"one") as one, space.allocate(PAGE_SIZE, transient=True) as two:
            assert {one.iova, two.iova} == {0x10_0000, 0x10_1000}
            with space.bounce(b"three") as three:
                assert not 0x10_0000 <= three.iova <= 0x10_1FFF, "a full window is no reason to fail"
        assert not any(0x10_0000 <= buffer.iova <= 0x10_1FFF for buffer in stays)
        with space.bounce(b"out of reach", limit=0xF_FFFF) as near:
            assert near.iova < 0x10_0000
        for buffer in stays:
            buffer.free()


def test_a_device_offers_what_its_space_does(device: vfiopy.Device) -> None:
    device.space.book.set_transient(0x10_0000, 0x10_0FFF)
    with device.dma.allocate((2, 3), "u2", order="F", transient=True) as buffer:
        assert buffer.flags.f_contiguous
        assert buffer.strides == (2, 4)
        assert buffer.iova == 0x10_0000


def test_nothing_cannot_be_bounced(device: vfiopy.Device) -> None:
    before = len(device.space.mappings())
    with pytest.raises(vfiopy.AlignmentError, match="no bytes to copy: a DMA buffer has at least one"):
        device.dma.bounce(b"")
    assert len(device.space.mappings()) == before


def test_freeing_waits_for_dma_under_way(device: vfiopy.Device) -> None:
    book = device.space.book
    buffer = device.dma.allocate(4096)
    owner = book.add_owner("a device's DMA")
    book.pin(buffer.iova, 16, Prot.WRITE, owner)
    with pytest.raises(vfiopy.PinnedError, match="a device's DMA"):
        buffer.free(timeout=0.0)
    assert buffer.iova in book  # as it was
    threading.Timer(0.05, book.unpin, [buffer.iova, 16, owner]).start()
    buffer.free()
    with pytest.raises(vfiopy.ClosedError):
        _ = buffer.iova
    book.remove_owner(owner)


def test_a_space_without_a_book_refuses() -> None:
    bare = SpaceBase.__new__(SpaceBase)
    bare._direct = True
    with pytest.raises(AttributeError, match="_map_slowly"), mmap.mmap(-1, PAGE_SIZE) as memory:
        bare.map(memory)
    with pytest.raises(AttributeError, match="_map_many_slowly"), mmap.mmap(-1, PAGE_SIZE) as memory:
        bare.map_many([memory])


def test_allocate_says_why_not(device: vfiopy.Device) -> None:
    with pytest.raises(vfiopy.AlignmentError, match="at least 1 byte"):
        device.dma.allocate(0)
    with pytest.raises(vfiopy.AlignmentError, match="pages of 12345 bytes do not exist"):
        device.dma.allocate(5, page_size=12345)
    with pytest.raises(vfiopy.VfioError, match=r"NUMA node 63 cannot be had[^\n]*\n.*/sys/devices/system/node/online"):
        device.dma.allocate(5, numa_node=63)
    assert device.space.mappings() == []


def test_buffers_end_with_their_device() -> None:
    with vfiopy.open("emulated:edu") as device:
        buffer = device.dma.allocate(8)
    with pytest.raises(ClosedError):
        _ = buffer.iova
    buffer.free()
    del buffer
    gc.collect()
    assert drain_finalizers() == 0


@pytest.mark.parametrize("mappers", ["none", "in C", "in Python"])
def test_iova_0_is_never_mapped(mappers: str, page: mmap.mmap) -> None:
    with AddressSpace("null") as space:
        kernel = FakeKernel()
        if mappers == "in C":
            space.book.add_kernel_mapper(MAPPER_TYPE1, 10, ioctl=kernel.address)
        elif mappers == "in Python":
            space.add_mapper(SlowMapper())
        for call in (lambda: space.map(page, iova=0), lambda: space.allocate(8, iova=0)):
            with pytest.raises(IovaRangeError, match="IOVA 0 is never mapped") as caught:
                call()
            assert "choose another IOVA" in str(caught.value)
        assert space.mappings() == []
        assert kernel.tables.get(10, {}) == {}
        if mappers == "in C":
            (token, *_), = space.book.kernel_mappers()
            space.book.remove_kernel_mapper(token)


def test_several_devices_in_one_space() -> None:
    with AddressSpace("shared") as space:
        with vfiopy.open("emulated:edu", space=space) as a:
            buffer = space.allocate(64)
            with vfiopy.open("emulated:edu", space=space) as b:
                assert a.space is b.space is space
                assert len(space.mappers) == 2
            assert len(space.mappers) == 1
            assert buffer.iova
            buffer.free()
        assert space.mappers == ()


def test_closing_a_space_closes_its_devices_first() -> None:
    space = AddressSpace("shared")
    device = vfiopy.open("emulated:edu", space=space)
    device.bus_master = True
    space.close()
    assert not device
    with pytest.raises(ClosedError, match="address space 'shared' is closed"):
        space.allocate(8)
    with pytest.raises(ClosedError):
        _ = device.bus_master


def test_a_space_with_pins_is_closed_when_they_go_or_by_force() -> None:
    space = AddressSpace("pinned")
    buffer = space.allocate(4096)
    buffer[:] = 0x5A
    told: list[tuple[int, int]] = []
    owner = space.book.add_owner("frame grabber", lambda iova, size: told.append((iova, size)))
    space.book.pin(buffer.iova, 4096, Prot.RW, owner)
    where = (buffer.iova, 4096)
    with pytest.raises(PinnedError, match="frame grabber"):
        space.close()
    assert space
    assert told == [where]
    assert buffer.iova == where[0]
    kept = len(leaked_memory())
    with pytest.warns(ResourceWarning, match="'pinned': frame grabber left 1 pins"):
        space.close(force=True)
    assert not space
    assert told == [where] * 2
    with pytest.raises(ClosedError):
        _ = buffer.iova
    # A device may still write it: nobody else may get that memory.
    (memory,) = leaked_memory()[kept:]
    address = buffer.address
    del buffer
    gc.collect()
    assert isinstance(memory, HostMemory)
    assert memory.address == address
    assert ctypes.string_at(address, 4096) == b"\x5a" * 4096

    patient = AddressSpace("patient")
    buffer = patient.allocate(4096)

    def let_go(iova: int, size: int) -> None:
        patient.book.unpin(iova, size, owner)

    owner = patient.book.add_owner("reader", let_go)
    patient.book.pin(buffer.iova, 4096, Prot.READ, owner)
    patient.close()
    assert not patient


class SlowMapper:
    """A mapper written in Python, as a socket's will be."""

    name = "slow mapper"
    kernel_target = None
    adopted = False

    def __init__(self, fail_at: int = -1) -> None:
        self.mapped: dict[int, int] = {}
        self.calls = 0
        self.fail_at = fail_at
        self.closed = False

    def traits(self) -> MapperTraits:
        return MapperTraits(PAGE_SIZE, 16, frozenset({MemoryKind.HOST}))

    def ranges(self) -> list[IovaRange]:
        return [IovaRange(0, 0xFFFF_FFFF)]

    def _count(self) -> None:
        self.calls += 1
        if self.calls == self.fail_at:
            raise vfiopy.VfioError("refused", object=self.name)

    def map(self, iova: int, memory: Memory, prot: Prot) -> None:
        self._count()
        self.mapped[iova] = memory.size

    def unmap(self, iova: int, size: int) -> int:
        self._count()
        assert self.mapped.pop(iova) == size
        return size

    def close(self) -> None:
        self.closed = True


class Guest:
    def close(self) -> None:
        raise AssertionError("not asked to")


def test_mappers_in_python_are_kept_in_step(page: mmap.mmap) -> None:
    with AddressSpace() as space:
        first, second, guest = SlowMapper(), SlowMapper(), Guest()
        space.join(first, guest)
        early = space.map(page, iova=0x4000)
        space.join(second, guest)
        assert second.mapped == {0x4000: PAGE_SIZE}, "what is mapped is replayed into a new mapper"
        assert space.usable_ranges() == [IovaRange(0, 0xFFFF_FFFF)]
        early.unmap()
        assert first.mapped == second.mapped == {}
        second.fail_at = second.calls + 1
        with pytest.raises(vfiopy.VfioError, match="refused"):
            space.map(page, iova=0x4000)
        assert first.mapped == {}, "a map fans out everywhere or nowhere"
        assert space.mappings() == []
        space.map(page, iova=0x4000)
        second.fail_at = second.calls + 1
        with pytest.raises(vfiopy.VfioError, match="refused"):
            space.unmap(0x4000)
        assert first.mapped == {0x4000: PAGE_SIZE}, "a refused unmap leaves the mapping as it was"
        assert space.unmap(0x4000) == PAGE_SIZE
        space.map(page, iova=0x8000)
        assert space.unmap_all() == PAGE_SIZE
        for mapper in (first, second):
            space.leave(mapper, guest)
            assert mapper.closed


def test_a_mapper_that_cannot_take_what_is_mapped_is_not_let_in(page: mmap.mmap) -> None:
    with AddressSpace() as space:
        first, guest = SlowMapper(), Guest()
        space.join(first, guest)
        mapping = space.map(page)
        with pytest.raises(vfiopy.VfioError, match="refused"):
            space.join(SlowMapper(fail_at=1), guest)
        assert space.mappers == (first,)
        assert mapping
        mapping.unmap()
        space.leave(first, guest)


class Stubborn(SlowMapper):
    """Refuses to take anything back."""

    def unmap(self, iova: int, size: int) -> int:
        raise vfiopy.VfioError("will not", object=self.name)


def test_trouble_while_rolling_back_leaves_no_range_reserved(page: mmap.mmap) -> None:
    with AddressSpace() as space:
        first, second, guest = Stubborn(), SlowMapper(fail_at=1), Guest()
        space.join(first, guest)
        space.join(second, guest)
        with pytest.raises(vfiopy.VfioError, match="refused") as caught:
            space.map(page, iova=0x4000)
        assert caught.value.__notes__ == ["while putting things back: slow mapper: will not"]
        assert len(space.book.free_ranges()) == 1, "the range is free again"
        space.leave(second, guest)
        space.leave(first, guest)


def test_a_kernel_mapper_that_refuses_after_python_ones_agreed(page: mmap.mmap) -> None:
    """Everywhere or nowhere also across the two kinds: no mapper keeps, or loses, what the book does not."""
    kernel, mapper, guest = FakeKernel(), SlowMapper(), Guest()
    with AddressSpace() as space:
        space.join(mapper, guest)
        token = space.book.add_kernel_mapper(MAPPER_TYPE1, 99, ioctl=kernel.address)
        kernel.fail(1, 1, errno.ENOMEM)
        with pytest.raises(vfiopy.VfioError):
            space.map(page, iova=0x4000)
        assert mapper.mapped == kernel.tables.get(99, {}) == {}
        assert space.mappings() == []
        space.map(page, iova=0x4000)
        kernel.fail(1, 1, errno.EBUSY)
        with pytest.raises(vfiopy.VfioError):
            space.unmap(0x4000)
        assert set(mapper.mapped) == set(kernel.tables[99]) == {0x4000}
        assert [item.iova for item in space.mappings()] == [0x4000]
        assert space.unmap(0x4000) == PAGE_SIZE
        space.book.remove_kernel_mapper(token)
        space.leave(mapper, guest)


def test_leaving_can_be_done_again_after_an_interruption(page: mmap.mmap) -> None:
    class Interrupted(SlowMapper):
        def close(self) -> None:
            if not self.calls:
                self.calls += 1
                raise KeyboardInterrupt
            super().close()

    with AddressSpace() as space:
        mapper, guest = Interrupted(), Guest()
        space.join(mapper, guest)
        with pytest.raises(KeyboardInterrupt):
            space.leave(mapper, guest)
        space.leave(mapper, guest)
        assert mapper.closed
        assert space.mappers == ()


def test_a_mapper_before_its_devices() -> None:
    mapper = SlowMapper()
    with AddressSpace() as space:
        space.add_mapper(mapper)
        assert space.mappers == (mapper,)
    assert mapper.closed


@pytest.mark.parametrize("wrong", [{"order": "Q"}, {"dtype": object}, {"shape": -1}, {"shape": (2, -3)}])
def test_a_shape_that_numpy_refuses_maps_nothing(device: vfiopy.Device, wrong: dict[str, object]) -> None:
    with pytest.raises((ValueError, TypeError)):
        device.space.allocate(**{"shape": 16, **wrong})
    assert device.space.mappings() == []


def test_threads_map_and_unmap_at_once(device: vfiopy.Device) -> None:
    errors: list[BaseException] = []

    def work() -> None:
        try:
            with mmap.mmap(-1, 4 * PAGE_SIZE) as area:
                for _ in range(200):
                    with device.space.map(area) as mapping:
                        assert device.space.find(mapping.iova).memory is mapping.memory
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert device.space.mappings() == []
    device.space.book.verify()


def test_two_threads_that_want_the_same_iova(device: vfiopy.Device) -> None:
    """Exactly one gets it; the other is told that it is taken or about to be."""
    for _ in range(50):
        outcomes: list[str] = []
        barrier = threading.Barrier(2)

        def work() -> None:
            with mmap.mmap(-1, PAGE_SIZE) as area:
                barrier.wait()  # noqa: B023
                try:
                    device.space.map(area, iova=0x7000)
                    outcomes.append("mapped")  # noqa: B023
                    finished.wait()  # noqa: B023
                    device.space.unmap(0x7000)
                except (vfiopy.OverlapError, vfiopy.BusyError):
                    outcomes.append("refused")  # noqa: B023

        finished = threading.Event()
        threads = [threading.Thread(target=work) for _ in range(2)]
        for thread in threads:
            thread.start()
        while len(outcomes) < 2:
            pass
        finished.set()
        for thread in threads:
            thread.join()
        assert sorted(outcomes) == ["mapped", "refused"]

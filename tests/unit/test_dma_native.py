"""The native road of AddressSpace: handles, batches, what makes it step aside for the long way."""

from __future__ import annotations

import ctypes
import errno
import gc
import mmap
import os
import signal
import threading
import time
import weakref
from collections.abc import Iterator

import numpy as np
import pytest

import vfiopy
from vfiopy import AddressSpace, ClosedError, ForkedError, HostMemory, Mapping, Prot, uapi
from vfiopy.backend import IovaRange, MapperTraits, Memory, MemoryKind
from vfiopy.dma.memory import PAGE_SIZE, file_memory
from vfiopy.iova import MAPPER_IOAS
from vfiopy.lives import retire


class Kernel:
    """An ioctl() that says yes to everything but the calls that it is told to fail."""

    def __init__(self) -> None:
        self.calls = 0
        self.fail_at = -1
        self.errno = errno.ENOSPC
        self.live = 0
        self.gate: threading.Event | None = None
        kind = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int, ctypes.c_ulong, ctypes.c_void_p, use_errno=True)
        self.function = kind(self._ioctl)
        self.address = ctypes.cast(self.function, ctypes.c_void_p).value or 0

    def _ioctl(self, _fd: int, request: int, _argument: int) -> int:
        if self.gate is not None:
            self.gate.wait(5)
        self.calls += 1
        if self.calls == self.fail_at:
            ctypes.set_errno(self.errno)
            return -1
        self.live += {uapi.IOMMU_IOAS_MAP: 1, uapi.IOMMU_IOAS_MAP_FILE: 1, uapi.IOMMU_IOAS_UNMAP: -1}[request]
        return 0


@pytest.fixture
def kernel() -> Kernel:
    return Kernel()


@pytest.fixture
def pages() -> Iterator[list[mmap.mmap]]:
    areas = [mmap.mmap(-1, PAGE_SIZE) for _ in range(4)]
    yield areas
    for area in areas:
        area.close()


@pytest.fixture
def space(kernel: Kernel, pages: list[mmap.mmap]) -> Iterator[AddressSpace]:
    with AddressSpace("native") as space:  # ends before the pages do
        token = space.book.add_kernel_mapper(MAPPER_IOAS, 1000, 1, kernel.address)
        yield space
        space.book.unmap_all()
        space.book.remove_kernel_mapper(token)


# --- memory ----------------------------------------------------------------------------------------------------------


def test_host_memory_says_what_it_is() -> None:
    owner = bytearray(10)
    memory = HostMemory(0xFFFF_8000_0000_0000, 0x2000, False, owner)
    assert (memory.address, memory.size, memory.writable) == (0xFFFF_8000_0000_0000, 0x2000, False)
    assert memory.owner is owner
    assert memory.kind is MemoryKind.HOST
    assert "of 8192 bytes, read-only, in a bytearray object" in repr(memory)
    with pytest.raises(AttributeError):
        memory.size = 5  # type: ignore[misc]
    with pytest.raises(ValueError, match="address must be an int from 0"):
        HostMemory(-1, 0, True, None)
    assert memory != HostMemory(0xFFFF_8000_0000_0000, 0x2000, False, owner)
    gone = weakref.ref(memory)
    del memory
    assert gone() is None


def test_a_buffer_is_exported_exactly_as_long_as_it_is_mapped(space: AddressSpace) -> None:
    area = mmap.mmap(-1, PAGE_SIZE)
    mapping = space.map(area)
    with pytest.raises(BufferError):
        area.close()
    memory = mapping.memory
    assert isinstance(memory, HostMemory)
    assert memory.owner is area
    del memory
    mapping.unmap()
    area.close()
    assert not mapping


@pytest.mark.parametrize("failure", ["overlap", "kernel"])
def test_a_failed_map_gives_the_buffer_back_at_once(
    space: AddressSpace, kernel: Kernel, pages: list[mmap.mmap], failure: str
) -> None:
    area = mmap.mmap(-1, PAGE_SIZE)
    space.map(pages[0], iova=0x8000)
    if failure == "kernel":
        kernel.fail_at = kernel.calls + 1
    with pytest.raises(vfiopy.VfioError) as caught:
        space.map(area, iova=0x8000 if failure == "overlap" else 0x9000)
    assert isinstance(caught.value, vfiopy.OverlapError) == (failure == "overlap")
    area.close()
    assert kernel.live == 1


def test_what_a_mapping_holds_is_seen_by_the_collector(pages: list[mmap.mmap]) -> None:
    class Owner:
        space: AddressSpace

    owner = Owner()
    with AddressSpace("cycle") as space:
        owner.space = space
        mapping = space.map(HostMemory(0x10_0000, PAGE_SIZE, True, owner))
        assert mapping
    gone = weakref.ref(owner)
    del owner, space, mapping
    gc.collect()
    assert gone() is None


# --- handles ---------------------------------------------------------------------------------------------------------


def test_a_handle_shows_what_was_mapped(space: AddressSpace, pages: list[mmap.mmap]) -> None:
    mapping = space.map(pages[0], iova=0xFFFF_F000, prot=Prot.READ)
    assert (mapping.iova, mapping.size, mapping.last) == (0xFFFF_F000, PAGE_SIZE, 0xFFFF_FFFF)
    assert mapping.prot is Prot.READ
    assert mapping.address == np.frombuffer(pages[0], "u1").ctypes.data
    assert repr(mapping) == "<Mapping 0xfffff000-0xffffffff r>"
    mapping.unmap()
    assert repr(mapping) == "<Mapping 0xfffff000-0xffffffff r (unmapped)>"
    assert repr(space.map(pages[0], iova=0x1000)) == "<Mapping 0x1000-0x1fff rw>"
    with pytest.raises(AttributeError):
        mapping.iova = 5  # type: ignore[misc]


def test_the_same_memory_at_the_same_iova_is_another_mapping(space: AddressSpace) -> None:
    """A serial number tells them apart, not the memory."""
    memory = vfiopy.dma.allocate_pages(PAGE_SIZE)
    stale = space.map(memory, iova=0x5000)
    stale.unmap()
    fresh = space.map(memory, iova=0x5000)
    assert not stale
    for use in (stale.unmap, lambda: stale.memory, lambda: space.unmap_many([stale])):
        with pytest.raises(ClosedError, match=r"<Mapping 0x5000-0x5fff rw \(unmapped\)> was unmapped before"):
            use()
    assert fresh.memory is memory
    found = space.find(0x5000)
    assert found is not None
    found.unmap()  # a handle that was looked up is as good as the first
    assert not fresh


def test_unmap_takes_no_other_argument_than_a_timeout(space: AddressSpace, pages: list[mmap.mmap]) -> None:
    mapping = space.map(pages[0])
    with pytest.raises(TypeError):
        mapping.unmap(1.0)  # type: ignore[misc]
    with pytest.raises(TypeError):
        mapping.unmap(wait=1.0)  # type: ignore[call-arg]
    with pytest.raises(TypeError):
        space.map(pages[0], 0x5000)  # type: ignore[misc]
    with pytest.raises(TypeError):
        Mapping(object(), 0, 0, 0, 0, 0)  # type: ignore[arg-type]
    mapping.unmap(timeout=None)


def test_a_pinned_mapping_waits_for_its_owners(space: AddressSpace, pages: list[mmap.mmap]) -> None:
    mapping = space.map(pages[0])
    told: list[tuple[int, int]] = []
    owner = space.book.add_owner("device model", lambda iova, size: told.append((iova, size)))
    space.book.pin(mapping.iova, 1, 3, owner)
    begin = time.monotonic()
    with pytest.raises(vfiopy.PinnedError, match="device model"):
        mapping.unmap(timeout=0.1)
    assert time.monotonic() - begin >= 0.1
    assert told == [(mapping.iova, PAGE_SIZE)]
    assert mapping
    timer = threading.Timer(0.05, space.book.unpin, [mapping.iova, 1, owner])
    timer.start()
    mapping.unmap(timeout=None)
    timer.join()
    assert not mapping


def test_an_unmap_that_the_kernel_refuses_leaves_the_mapping(
    space: AddressSpace, kernel: Kernel, pages: list[mmap.mmap]
) -> None:
    mapping = space.map(pages[0])
    kernel.fail_at, kernel.errno = kernel.calls + 1, errno.EBUSY
    with pytest.raises(vfiopy.VfioError, match="IOMMU_IOAS_UNMAP"):
        mapping.unmap()
    assert mapping
    with pytest.raises(BufferError):
        pages[0].close()
    mapping.unmap()


def test_other_threads_run_while_the_kernel_maps(
    space: AddressSpace, kernel: Kernel, pages: list[mmap.mmap]
) -> None:
    kernel.gate = threading.Event()
    worker = threading.Thread(target=space.map, args=[pages[0]])
    worker.start()
    kernel.gate.set()  # reached only because that map() let go of the interpreter
    worker.join(5)
    assert kernel.live == 1


# --- batches ---------------------------------------------------------------------------------------------------------


def test_batches_map_and_unmap_in_order(space: AddressSpace, kernel: Kernel, pages: list[mmap.mmap]) -> None:
    mappings = space.map_many(iter(pages), prot=Prot.READ, limit=0xFFFF_FFFF)
    assert kernel.live == 4
    assert [mapping.memory.owner for mapping in mappings] == pages
    assert all(mapping.prot is Prot.READ and mapping.last <= 0xFFFF_FFFF for mapping in mappings)
    assert sorted(mapping.iova for mapping in space.mappings()) == sorted(mapping.iova for mapping in mappings)
    space.unmap_many(iter(mappings))
    assert kernel.live == 0
    assert not any(mappings)
    assert space.map_many([]) == []
    space.unmap_many([])
    space.book.verify()


@pytest.mark.parametrize("fails", range(1, 5))
def test_a_batch_is_mapped_whole_or_not_at_all(
    space: AddressSpace, kernel: Kernel, pages: list[mmap.mmap], fails: int
) -> None:
    kernel.fail_at = kernel.calls + fails
    with pytest.raises(vfiopy.NoSpaceError, match="IOMMU_IOAS_MAP"):
        space.map_many(pages)
    assert kernel.live == 0
    assert space.mappings() == []
    for area in pages:  # nothing is exported any more
        area.close()


@pytest.mark.parametrize("bad", [b"immutable", 5, memoryview(bytearray(3 * PAGE_SIZE))[1:]])
def test_a_batch_with_something_unfit_is_refused_in_words(
    space: AddressSpace, kernel: Kernel, pages: list[mmap.mmap], bad: object
) -> None:
    with pytest.raises((vfiopy.MemoryKindError, vfiopy.AlignmentError), match=r"allocate\(\)"):
        space.map_many([*pages, bad])  # type: ignore[list-item]
    assert kernel.live == 0
    assert space.mappings() == []


@pytest.mark.parametrize("road", ["native", "python"])
@pytest.mark.parametrize("refusals", [1, 4])
def test_a_batch_that_cannot_be_taken_back_says_all(
    space: AddressSpace, kernel: Kernel, pages: list[mmap.mmap], refusals: int, road: str
) -> None:
    """The fourth map fails, and so do unmaps: one that goes the second time, or one for good and others once."""
    counts = {uapi.IOMMU_IOAS_MAP: 0, uapi.IOMMU_IOAS_UNMAP: 0}

    def ioctl(fd: int, request: int, argument: int) -> int:
        counts[request] += 1
        limits = (4, 4) if request == uapi.IOMMU_IOAS_MAP else (1, refusals)
        if not limits[0] <= counts[request] <= limits[1]:
            return 0
        ctypes.set_errno(errno.ENOSPC if request == uapi.IOMMU_IOAS_MAP else errno.EBUSY)
        return -1

    second = type(kernel.function)(ioctl)
    token = space.book.add_kernel_mapper(MAPPER_IOAS, 1001, 1, ctypes.cast(second, ctypes.c_void_p).value or 0)
    with pytest.raises(vfiopy.VfioError, match="IOMMU_IOAS_UNMAP") as caught:
        space.map_many(pages) if road == "native" else space._map_many_slowly(pages, Prot.RW, 0xFFFF_FFFF)
    chain: list[BaseException | None] = [caught.value]
    while chain[-1] is not None:
        chain.append(chain[-1].__context__)
    assert isinstance(chain[-2], vfiopy.NoSpaceError)
    assert len(chain) == refusals + 2
    stuck = [mapping.iova for mapping in space.mappings()]
    assert len(stuck) == (refusals == 4)
    notes = [note for error in chain[:-1] for note in getattr(error, "__notes__", ())]
    assert [iova for iova in stuck if f"{iova:#x}" in notes[0]] == stuck
    assert len(notes) == len(stuck)
    for iova in stuck:
        space.unmap(iova)
    space.book.remove_kernel_mapper(token)
    assert kernel.live == 0


def test_an_interrupt_does_not_end_the_way_back(pages: list[mmap.mmap]) -> None:
    class Interrupted(Mapper):
        def map(self, iova: int, memory: Memory, prot: Prot) -> None:
            if len(self.mapped) == 3:
                raise OSError(errno.ENOSPC, "full")
            super().map(iova, memory, prot)

        def unmap(self, iova: int, size: int) -> int:
            self.tries.append(iova)
            if len(self.tries) == 2:
                raise KeyboardInterrupt
            if len(self.tries) == 3:
                raise OSError(errno.EBUSY, "busy")
            return super().unmap(iova, size)

    with AddressSpace() as space:
        mapper, member = Interrupted(), Member()
        space.join(mapper, member)
        with pytest.raises(KeyboardInterrupt) as caught:
            space.map_many(pages)
        assert len(mapper.tries) == 5
        assert mapper.mapped == []
        assert space.mappings() == []
        assert isinstance(caught.value.__context__, OSError)
        assert "full" in str(caught.value.__context__.__context__)
        space.leave(mapper, member)
    del caught  # its frames hold memory
    gc.collect()


def test_unmapping_a_batch_ends_at_the_first_that_fails(
    space: AddressSpace, kernel: Kernel, pages: list[mmap.mmap]
) -> None:
    mappings = space.map_many(pages)
    kernel.fail_at, kernel.errno = kernel.calls + 2, errno.EBUSY
    with pytest.raises(vfiopy.VfioError, match="IOMMU_IOAS_UNMAP"):
        space.unmap_many(mappings)
    assert [bool(mapping) for mapping in mappings] == [False, True, True, True]
    space.book.pin(mappings[2].iova, 1, 3)
    with pytest.raises(vfiopy.PinnedError):
        space.unmap_many(mappings[1:])
    assert [bool(mapping) for mapping in mappings] == [False, False, True, True]
    threading.Timer(0.05, space.book.unpin, [mappings[2].iova, 1]).start()
    space.unmap_many(mappings[2:], timeout=5)
    assert kernel.live == 0
    with AddressSpace("other") as other, pytest.raises(ValueError, match="no mapping of this address space"):
        other.unmap_many(mappings)
    with pytest.raises(ValueError, match="no mapping of this address space"):
        space.unmap_many([5])  # type: ignore[list-item]


# --- when the long way is taken --------------------------------------------------------------------------------------


class Mapper:
    """A mapper written in Python."""

    name = "python mapper"
    kernel_target = None

    def __init__(self, kinds: frozenset[MemoryKind] = frozenset({MemoryKind.HOST})) -> None:
        self.mapped: list[int] = []
        self.tries: list[int] = []
        self.kinds = kinds

    def traits(self) -> MapperTraits:
        return MapperTraits(PAGE_SIZE, 0, self.kinds)

    def ranges(self) -> list[IovaRange]:
        return [IovaRange(0, 0xFFFF_FFFF)]

    def map(self, iova: int, memory: Memory, prot: Prot) -> None:
        if iova in self.mapped:
            raise OSError(errno.EEXIST, "mapped already")
        self.mapped.append(iova)

    def unmap(self, iova: int, size: int) -> int:
        self.mapped.remove(iova)
        return size

    def close(self) -> None: ...


class Member:
    def close(self) -> None: ...


def test_a_mapper_in_python_is_called_for_all_of_it(pages: list[mmap.mmap]) -> None:
    with AddressSpace() as space:
        early = space.map(pages[0])
        mapper, member = Mapper(), Member()
        space.join(mapper, member)
        mappings = [early, space.map(pages[1]), *space.map_many(pages[2:])]
        assert sorted(mapper.mapped) == sorted(mapping.iova for mapping in mappings)
        mappings[0].unmap()
        mappings[1].unmap()
        assert sorted(mapper.mapped) == sorted(mapping.iova for mapping in mappings[2:])
        space.unmap_many(mappings[2:])
        assert mapper.mapped == []
        with pytest.raises(ClosedError):
            mappings[0].unmap()
        space.leave(mapper, member)
        late = space.map(pages[0])
        assert mapper.mapped == []
        late.unmap()


def test_a_mapper_that_takes_no_host_memory_is_heard(pages: list[mmap.mmap]) -> None:
    with AddressSpace() as space:
        mapper, member = Mapper(frozenset({MemoryKind.FILE})), Member()
        space.join(mapper, member)
        for use in (lambda: space.map(pages[0]), lambda: space.map_many(pages)):
            with pytest.raises(vfiopy.MemoryKindError, match="python mapper cannot map memory of kind HOST"):
                use()
        space.leave(mapper, member)


def test_files_and_read_only_memory_go_the_long_way(space: AddressSpace, kernel: Kernel) -> None:
    fd = os.memfd_create("test")
    os.ftruncate(fd, PAGE_SIZE)
    with mmap.mmap(fd, PAGE_SIZE, prot=mmap.PROT_READ) as readable:
        mapping = space.map(file_memory(fd, PAGE_SIZE))
        assert mapping.memory.kind is MemoryKind.FILE
        second = space.map(readable, prot=Prot.READ)
        with pytest.raises(vfiopy.MemoryKindError, match=r"read-only.*\n.*prot=Prot.READ"):
            space.map(readable)
        space.unmap_many([mapping, second])
    os.close(fd)
    assert kernel.live == 0


def test_what_finalizers_left_is_cleaned_up_by_the_next_map(space: AddressSpace, pages: list[mmap.mmap]) -> None:
    released: list[str] = []
    for number, use in enumerate((lambda: space.map(pages[0]), lambda: space.map_many(pages[1:]))):
        retire(lambda number=number: released.append(f"leftover {number}"))  # type: ignore[misc]
        use()
        assert released[-1] == f"leftover {number}"


def test_after_close_every_use_says_so(pages: list[mmap.mmap]) -> None:
    space = AddressSpace("short-lived")
    mapping = space.map(pages[0])
    space.close()
    assert not mapping
    for use in (lambda: space.map(pages[0]), lambda: space.map_many(pages)):
        with pytest.raises(ClosedError, match="address space 'short-lived' is closed"):
            use()
    with pytest.raises(ClosedError, match="was unmapped before"):
        mapping.unmap()
    pages[0].close()


def test_a_forked_child_is_refused_everything(space: AddressSpace, kernel: Kernel, pages: list[mmap.mmap]) -> None:
    mapping = space.map(pages[0])
    calls = kernel.calls
    child = os.fork()
    if not child:
        status = 1
        try:
            status = sum(_is_refused(use) for use in _uses(space, mapping, pages)) + 2 * (kernel.calls != calls)
            status = 0 if status == len(_uses(space, mapping, pages)) and "0x" in repr(mapping) else 1
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert mapping
    mapping.unmap()


def _uses(space: AddressSpace, mapping: Mapping, pages: list[mmap.mmap]) -> list[object]:
    return [
        lambda: space.map(pages[1]),
        lambda: space.map_many(pages),
        lambda: space.unmap_many([mapping]),
        mapping.unmap,
        lambda: mapping.memory,
        lambda: bool(mapping),
    ]


def _is_refused(use: object) -> bool:
    try:
        use()  # type: ignore[operator]
    except ForkedError:
        return True
    return False


def test_threads_that_map_and_unmap_batches_at_once(space: AddressSpace, kernel: Kernel) -> None:
    errors: list[BaseException] = []

    def work() -> None:
        try:
            areas = [mmap.mmap(-1, PAGE_SIZE) for _ in range(5)]
            for _ in range(30):
                mappings = space.map_many(areas)
                for found in space.mappings():
                    assert repr(found)
                space.unmap_many(mappings)
            for area in areas:
                area.close()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert kernel.live == 0
    assert space.mappings() == []
    space.book.verify()


def test_a_signal_waits_until_book_and_kernel_agree(pages: list[mmap.mmap]) -> None:
    usleep = ctypes.CDLL(None).usleep  # an ioctl() that takes as many microseconds as its fd says, and is interrupted
    with AddressSpace("slow") as space:
        token = space.book.add_kernel_mapper(MAPPER_IOAS, 200_000, 1, ctypes.cast(usleep, ctypes.c_void_p).value or 0)
        timer = threading.Timer(0.05, signal.pthread_kill, [threading.main_thread().ident, signal.SIGINT])
        timer.start()
        with pytest.raises(KeyboardInterrupt):  # noqa: PT012  it comes at the first bytecode after the call
            space.map_many(pages[:2])
            time.sleep(5)
        timer.join()
        assert len(space.mappings()) == 2
        space.book.verify()
        space.book.remove_kernel_mapper(token)

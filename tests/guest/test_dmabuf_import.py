"""d.5, scenarios 1 to 8 and 16 to 24: a BAR is exported and reached by another device."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from dmabuf_support import BAR_SIZE, PAGE, Peers, export, no_dmabuf_left
from modes import E1000E, EDU, IVSHMEM

import vfiopy
from vfiopy import DmaBuf, ImportState
from vfiopy.backend import Area
from vfiopy.errors import AddressRangeError, AlignmentError, NotSupportedError, OverlapError

Bdf = Callable[..., str]


@pytest.fixture(scope="module")
def bound(bdf: Bdf) -> Iterator[tuple[str, str]]:
    edu, ivshmem = bdf(EDU), bdf(IVSHMEM)
    with vfiopy.bind(edu), vfiopy.bind(ivshmem):
        yield edu, ivshmem


@pytest.fixture
def peers(bound: tuple[str, str]) -> Iterator[Peers]:
    with no_dmabuf_left():
        peers = Peers(*bound)
        yield peers
        peers.close()


def test_01_export(peers: Peers) -> None:
    with export(peers) as whole, export(peers, Area(0x4000, 0x8000)) as part:
        assert whole.size == BAR_SIZE
        assert part.size == 0x8000
        assert whole.exporter == part.exporter == "vfio_pci_core"
        assert whole.inode != part.inode
        assert whole.ranges == (Area(peers.physical, BAR_SIZE),)
        assert part.ranges == (Area(peers.physical + 0x4000, 0x8000),)
        assert whole.name is None
        whole.name = "the BAR"
        assert whole.info.name == "the BAR"
        assert part.info.references == 1


def test_03_dma_write_lands_in_the_bar(peers: Peers) -> None:
    with export(peers, Area(0x10000, 2 * PAGE)) as buffer:
        imported = peers.space.import_dmabuf(buffer, iova=0x400000)
    with imported:
        assert imported.iova == 0x400000
        assert imported.ranges == (Area(peers.physical + 0x10000, 2 * PAGE),)
        peers.check_live(imported)
        peers.bar.write_block(0x10000, bytes(2 * PAGE))
        peers.write_by_dma(imported.iova + PAGE, b"written by edu")
        assert peers.bar.read_block(0x10000 + PAGE, 16, width=1)[:14] == b"written by edu"
        first = peers.physical // PAGE + 0x10
        assert imported.pin() == [first, first + 1]
        peers.space.book.unpin(0x400000, 2 * PAGE)
    assert imported.state is ImportState.LIVE
    assert peers.is_dead(0x400000, 2 * PAGE)


@pytest.mark.parametrize(
    ("areas", "kind", "says"),
    [
        ([Area(1, PAGE)], AlignmentError, "not whole pages"),
        ([Area(0, 100)], AlignmentError, "not whole pages"),
        ([Area(0, 0)], AlignmentError, "not whole pages"),
        ([Area(BAR_SIZE, PAGE)], AddressRangeError, "reach beyond its 0x1000000 bytes"),
        ([Area(0, PAGE), Area(BAR_SIZE - PAGE, 2 * PAGE)], AddressRangeError, "reach beyond"),
    ],
)
def test_02_parts_that_cannot_be_exported(
    peers: Peers, areas: list[Area], kind: type[Exception], says: str
) -> None:
    with pytest.raises(kind, match=says):
        export(peers, *areas)


def test_02_regions_that_cannot_be_exported(peers: Peers) -> None:
    with pytest.raises(NotSupportedError, match="256 bytes, less than a page"):
        DmaBuf.of_bar(peers.exporter.bars[0])
    with pytest.raises(NotSupportedError, match="config space cannot be exported"):
        DmaBuf.of_bar(peers.exporter.region(7))
    with pytest.raises(NotSupportedError, match="this region is no BAR"):
        DmaBuf.of_bar(vfiopy.Region("loose", PAGE))
    device = vfiopy.open("emulated:edu")
    with device, pytest.raises(NotSupportedError, match="emulated devices have no dma-bufs"):
        DmaBuf.of_bar(device.bars[0])


def test_02_what_the_kernel_says_itself(peers: Peers, bdf: Bdf) -> None:
    import fcntl  # noqa: PLC0415

    from vfiopy import uapi  # noqa: PLC0415

    calls = peers.exporter.io.calls  # type: ignore[attr-defined]
    with pytest.raises(AddressRangeError, match="beyond 64 bits"):
        calls.dma_buf(2, [Area((1 << 64) - PAGE, PAGE)])
    with pytest.raises(OSError, match="Bad address"):
        fcntl.ioctl(calls.fileno(), uapi.VFIO_DEVICE_FEATURE, 8)
    layout, item = uapi.vfio_device_feature_dma_buf, uapi.vfio_region_dma_range
    data = layout.new(item.size, region_index=2, open_flags=2, flags=1, nr_ranges=1)
    item.put(data, "length", PAGE, layout.size)
    with pytest.raises(AlignmentError):  # EINVAL: unknown flags
        calls.feature(uapi.VFIO_DEVICE_FEATURE_DMA_BUF, uapi.VFIO_DEVICE_FEATURE_GET, bytes(data))
    card = bdf(E1000E)
    with vfiopy.bind(card), vfiopy.open(card) as device:
        kinds = [one.flags & 0x100 for one in vfiopy.function(card).resources[:3]]  # IORESOURCE_IO
        index = next(one.index for one, io in zip(vfiopy.function(card).resources, kinds, strict=False) if io)
        with pytest.raises(NotSupportedError, match=r"less than a page|I/O BAR"):
            DmaBuf.of_bar(device.bars[index])
        with pytest.raises(vfiopy.VfioError) as caught:
            device.io.calls.dma_buf(index, [Area(0, PAGE)])  # type: ignore[attr-defined]
        assert caught.value.errno == 22


def test_04_dma_read_from_the_bar(peers: Peers) -> None:
    with export(peers, Area(0, PAGE)) as buffer, peers.space.import_dmabuf(buffer, limit=(1 << 28) - 1) as imported:
        peers.bar.write_block(0x20, b"read by edu.....", width=1)
        assert peers.read_by_dma(imported.iova + 0x20, 16) == b"read by edu....."


def test_05_slices_several_and_copies(peers: Peers) -> None:
    space = peers.space
    other = vfiopy.AddressSpace("other IOAS")
    other.add_mapper(space.mappers[0].sibling())
    with other, export(peers, Area(0x2000, 8 * PAGE)) as buffer:
        whole = space.import_dmabuf(buffer)
        part = space.import_dmabuf(buffer, offset=2 * PAGE, size=PAGE, iova=0x800000, prot=vfiopy.Prot.READ)
        assert part.iova == 0x800000
        assert part.ranges == (Area(peers.physical + 0x4000, PAGE),)
        assert peers.reaches(whole.iova, 8 * PAGE, 0x2000)
        assert peers.reaches(part.iova, PAGE, 0x4000, rights=1)
        twin = whole.copy_to(other, iova=0x900000)
        assert twin.iova == 0x900000
        assert twin.ranges == whole.ranges
        with pytest.raises(OverlapError):
            whole.copy_to(other, iova=0x900000 + PAGE)
        assert len(other.book.mappings()) == 1
        again = part.copy_to(space, iova=0xA00000)
        assert peers.reaches(again.iova, PAGE, 0x4000, rights=1)
        peers.exporter.memory_enabled = False
        for one in (whole, part, twin, again):
            assert one.state is ImportState.REVOKED
        peers.exporter.memory_enabled = True
        for one in (whole, part, again):
            one.remap()
            peers.check_live(one)
        twin.remap()
        assert twin.state is ImportState.LIVE
        for one in (whole, part, twin, again):
            one.unmap()
        assert not other.book.mappings()
    with vfiopy.AddressSpace("no IOAS at all") as empty:
        buffer = export(peers, Area(0, PAGE))
        with buffer, space.import_dmabuf(buffer) as imported:
            with pytest.raises(NotSupportedError, match="do not have one IOAS each in the same iommufd") as caught:
                imported.copy_to(empty)
            assert "import_dmabuf(buf)" in caught.value.hint


def test_06_refused_imports_change_nothing(peers: Peers) -> None:
    space = peers.space
    with export(peers, Area(0, 4 * PAGE)) as buffer, space.import_dmabuf(buffer, iova=0x400000) as imported:
        before = buffer.info.references
        with pytest.raises(OverlapError):
            space.import_dmabuf(buffer, iova=0x400000 + 3 * PAGE)
        with pytest.raises(vfiopy.NotMappedError, match="cuts the mapping"):
            space.unmap(0x400000, PAGE)
        with pytest.raises(AddressRangeError, match="reach beyond its 0x4000 bytes"):
            space.import_dmabuf(buffer, offset=PAGE, size=4 * PAGE)
        for offset, size in ((1, PAGE), (0, 100), (0, 0)):
            with pytest.raises(AlignmentError):
                space.import_dmabuf(buffer, offset=offset, size=size)
        with pytest.raises(AlignmentError):
            space.import_dmabuf(buffer, iova=0x800001)
        with pytest.raises(vfiopy.IovaRangeError):
            space.import_dmabuf(buffer, iova=0xFEE00000)
        peers.check_live(imported)
        assert buffer.info.references == before
        assert len(space.book.mappings()) == 1
        ioas = space.mappers[0].ioas
        with pytest.raises(vfiopy.VfioError):  # the kernel itself on what we never ask it for
            ioas.unmap(0x400000, PAGE)
        peers.check_live(imported)


def test_07_two_ranges_are_exported_but_not_imported(peers: Peers) -> None:
    with export(peers, Area(0x4000, PAGE), Area(0, PAGE)) as buffer:
        assert buffer.size == 2 * PAGE
        assert buffer.ranges == (Area(peers.physical + 0x4000, PAGE), Area(peers.physical, PAGE))
        with pytest.raises(NotSupportedError, match="in one range") as caught:
            peers.space.import_dmabuf(buffer)
        assert "each range as a dma-buf of its own" in caught.value.hint
        with pytest.raises(NotSupportedError, match="made of one range"):  # so says the kernel
            peers.space.mappers[0].ioas.map_file(buffer.fileno(), 0, 2 * PAGE)
        with pytest.raises(NotSupportedError, match="several ranges"), buffer.cpu_access("r"):
            pass
    assert not peers.space.book.mappings()


def test_08_a_bar_by_its_address(peers: Peers) -> None:
    with peers.bar.hold(0, PAGE) as hold, pytest.raises(vfiopy.MemoryKindError, match="a BAR") as caught:
        peers.space.mappers[0].ioas.map(hold.address, PAGE)
    assert "export a dma-buf" in caught.value.hint


def test_16_the_fd_may_be_closed(peers: Peers) -> None:
    buffer = export(peers, Area(0, PAGE))
    imported = peers.space.import_dmabuf(buffer, limit=(1 << 28) - 1)
    buffer.close()
    with pytest.raises(vfiopy.ClosedError):
        peers.space.import_dmabuf(buffer)
    peers.write_by_dma(imported.iova, b"still here")
    assert peers.bar.read_block(0, 10, width=1) == b"still here"
    peers.exporter.memory_enabled = False
    peers.check_dead(imported)
    peers.exporter.memory_enabled = True
    imported.remap()
    peers.check_live(imported)


def test_17_the_importer_ends_first(bound: tuple[str, str]) -> None:
    with no_dmabuf_left():
        peers = Peers(*bound)
        with export(peers, Area(0, PAGE)) as buffer:
            imported = peers.space.import_dmabuf(buffer)
        peers.importer.close()
        assert not imported
        assert bool(peers.bar.read32(0) or True)
        peers.exporter.memory_enabled = False  # nobody is left to be told
        peers.exporter.memory_enabled = True
        with pytest.raises(vfiopy.ClosedError):
            imported.check()
        peers.close()


def test_18_a_device_joins_with_stale_and_live_imports(peers: Peers, bdf: Bdf) -> None:
    second = bdf("1b36:0005")  # iommu-testdev
    with export(peers, Area(0, PAGE)) as low, vfiopy.bind(second):
        stale = peers.space.import_dmabuf(low)
        peers.exporter.memory_enabled = False
        peers.exporter.memory_enabled = True
        live = peers.space.import_dmabuf(low)
        with vfiopy.open(second, space=peers.space) as device:
            assert len(peers.space.mappers) == 1
            assert peers.is_dead(stale.mapping.iova, PAGE)
            assert peers.reaches(live.iova, PAGE)
            stale.remap()
            peers.check_live(stale)
            assert device.space is peers.space
        peers.check_live(live)


def test_18_a_mapper_joins_with_stale_and_live_imports(peers: Peers) -> None:
    with export(peers, Area(0, PAGE)) as buffer:
        stale = peers.space.import_dmabuf(buffer)
        peers.exporter.memory_enabled = False
        peers.exporter.memory_enabled = True
        live = peers.space.import_dmabuf(buffer)
        joining = peers.space.mappers[0].sibling()
        peers.space.add_mapper(joining)
        counts = [row[5] for row in peers.space.book.kernel_mappers()]
        assert counts == [2, 1]  # what is stale goes there when it is back
        stale.remap()
        assert [row[5] for row in peers.space.book.kernel_mappers()] == [2, 2]
        assert joining.ioas.unmap(stale.iova, PAGE) == PAGE  # the kernel has it
        assert joining.ioas.map_file(buffer.fileno(), 0, PAGE, iova=stale.iova) == stale.iova
        for one in (stale, live):
            peers.check_live(one)
            one.unmap()


def test_19_detach_and_replace(peers: Peers) -> None:
    with export(peers, Area(0, PAGE)) as buffer, peers.space.import_dmabuf(buffer) as imported:
        calls = peers.importer.io.calls  # type: ignore[attr-defined]
        ioas = peers.space.mappers[0].ioas
        calls.detach_iommufd_pt()
        assert peers.is_dead(imported.iova, PAGE)  # nothing is attached: the device is blocked
        calls.attach_iommufd_pt(ioas.id)
        peers.check_live(imported)
        with peers.space.mappers[0].iommufd.hwpt(peers.importer.io.iommufd_id, ioas) as table:  # type: ignore[attr-defined]
            calls.attach_iommufd_pt(table.id)
            peers.check_live(imported)
            calls.attach_iommufd_pt(ioas.id)
        peers.check_live(imported)


def test_22_access_mode_of_the_fd_is_not_enforced(peers: Peers) -> None:
    import os  # noqa: PLC0415

    calls = peers.exporter.io.calls.dma_buf(2, [Area(0, PAGE)], os.O_RDONLY)  # type: ignore[attr-defined]
    with DmaBuf(calls) as buffer, peers.space.import_dmabuf(buffer, limit=(1 << 28) - 1) as imported:
        peers.write_by_dma(imported.iova, b"read-only? no")  # docs/dmabuf.md says so
    assert peers.bar.read_block(0, 13, width=1) == b"read-only? no"


def test_23_nothing_is_charged(peers: Peers) -> None:
    from vfiopy.iova import charges  # noqa: PLC0415

    before = charges()
    with export(peers) as buffer, peers.space.import_dmabuf(buffer) as imported:
        assert peers.reaches(imported.iova, BAR_SIZE)
        assert charges() == before
        assert sum(row[6] for row in peers.space.book.kernel_mappers()) == 0


def test_24_the_cpu_goes_through_the_device(peers: Peers) -> None:
    with export(peers, Area(0x3000, 2 * PAGE)) as buffer:
        with buffer.cpu_access("rw", dtype="<u4") as array:
            assert array.shape == (2 * PAGE // 4,)
            array[0] = 0x12345678
            array[1024] = 0x9ABCDEF0
            with pytest.raises(vfiopy.BusyError, match="numpy view"):
                peers.bar.close()
        del array
        assert peers.bar.read32(0x3000) == 0x12345678
        assert peers.bar.read32(0x4000) == 0x9ABCDEF0
        with buffer.cpu_access("r", offset=PAGE, size=16) as array:
            assert bytes(array[:4]) == b"\xf0\xde\xbc\x9a"
        del array
        with pytest.raises(AlignmentError, match="items of 8 bytes"), buffer.cpu_access("r", size=12, dtype="u8"):
            pass
        # What the kernel itself says to mmap, and to SYNC of such a dma-buf:
        with pytest.raises(NotSupportedError, match="a dma-buf of a PCI BAR never has") as caught:
            buffer.calls.map(0, PAGE, 3)
        assert "through its device" in caught.value.hint
        with DmaBuf.adopt(buffer.fileno()) as known:
            assert known.origin is buffer.origin  # the same process, the same memory
        peers.exporter.memory_enabled = False
        with pytest.raises(vfiopy.RevokedError, match="decode was switched off") as revoked, buffer.cpu_access("r"):
            pass
        assert "memory_enabled = True" in revoked.value.hint
        peers.exporter.memory_enabled = True


def test_peer_picks_the_road(peers: Peers, bdf: Bdf) -> None:
    with peers.space.peer(peers.bar, offset=0x5000, size=2 * PAGE) as imported:
        peers.check_live(imported)
        assert imported.ranges == (Area(peers.physical + 0x5000, 2 * PAGE),)
        assert [str(path.route.value) for path in imported.paths] == ["they are below the same host bridge"]
        assert "the root complex passes requests" in str(imported.paths[0])
    with pytest.raises(NotSupportedError, match="less than a page"):
        peers.space.peer(peers.exporter.bars[0])
    with pytest.raises(NotSupportedError, match="not the BAR of a device"):
        peers.space.peer(peers.exporter.region(7))
    with pytest.raises(AlignmentError, match="not whole pages"):
        peers.space.peer(peers.bar, offset=5)
    peers.exporter.memory_enabled = False
    with pytest.raises(vfiopy.RevokedError, match="does not decode memory now"):
        peers.space.peer(peers.bar)
    peers.exporter.memory_enabled = True


def test_peer_on_type1_only_when_accepted(peers: Peers, bdf: Bdf) -> None:
    other = bdf(EDU, 1)
    members = [other, bdf("1b36:0005", 1)]
    with vfiopy.bind(members[0]), vfiopy.bind(members[1]), vfiopy.open(other, backend="type1v2") as device:
        with pytest.raises(vfiopy.MemoryKindError, match="never takes back") as caught:
            device.space.peer(peers.bar, size=PAGE)
        assert "never_revoked=True" in caught.value.hint
        with export(peers, Area(0, PAGE)) as buffer, pytest.raises(vfiopy.MemoryKindError, match="cannot import"):
            device.space.import_dmabuf(buffer)
        imported = device.space.peer(peers.bar, size=PAGE, never_revoked=True, iova=0x400000)
        physical = peers.physical // PAGE
        assert imported.pin() == [physical]
        device.space.book.unpin(0x400000, PAGE)
        with pytest.raises(vfiopy.BusyError, match="peer memory of address space"):
            peers.exporter.close()
        peers.exporter.memory_enabled = False  # the kernel leaves such a mapping alone, and so does its state
        assert imported.state is ImportState.LIVE
        peers.exporter.memory_enabled = True
        device.bus_master = True
        from vfiopy.drivers.edu import EduDriver  # noqa: PLC0415

        edu = EduDriver(device)
        peers.bar.write_block(0, bytes(16))
        with device.dma.allocate(PAGE) as source:
            source[:4] = 0x77
            edu.load(source.iova, 4)
        edu.store(imported.iova, 4)
        assert peers.bar.read32(0) == 0x77777777
        imported.unmap()

"""d.5, scenarios 9 to 15, 26 and 27: the exporter takes its memory back. Hardware and library must agree each time.

The judge is the importer's IOMMU page table in debugfs: what the library calls dead must not be in it, what it calls
live must lead to the BAR.
"""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from dmabuf_support import BAR_SIZE, PAGE, Peers, export, no_dmabuf_left
from ioctl_support import wait_for
from modes import EDU, IGB, IVSHMEM, NVME

import vfiopy
from vfiopy import DmaBufMapping, ImportState, RevokedError
from vfiopy.backend import Area, RegionIndex
from vfiopy.errors import NotSupportedError
from vfiopy.kernel import KernelDeviceIo, hot_reset
from vfiopy.pci.capabilities import PowerManagement
from vfiopy.pci.express import PciExpress

Bdf = Callable[..., str]
TESTDEV = "1b36:0005"
CONFIG = RegionIndex.CONFIG
COMMAND = 4
ROUNDS = 10_000 if os.environ.get("VFIOPY_PROFILE") == "nightly" else 1_000


@pytest.fixture(scope="module")
def bound(bdf: Bdf) -> Iterator[tuple[str, str, str]]:
    edu, ivshmem, nvme = bdf(EDU), bdf(IVSHMEM), bdf(NVME)
    with vfiopy.bind(edu), vfiopy.bind(ivshmem), vfiopy.bind(nvme):
        yield edu, ivshmem, nvme


@pytest.fixture
def peers(bound: tuple[str, str, str]) -> Iterator[Peers]:
    with no_dmabuf_left():
        peers = Peers(bound[0], bound[1])
        yield peers
        peers.close()


@pytest.fixture
def nvme_peers(bound: tuple[str, str, str]) -> Iterator[Peers]:
    """The exporter is an NVMe controller's memory buffer: it can be reset and put to sleep."""
    resources = Path(f"/sys/bus/pci/devices/{bound[2]}/resource").read_text().splitlines()
    sizes = [int(end, 16) - int(start, 16) + 1 for start, end, _ in (line.split() for line in resources[:6])]
    with no_dmabuf_left():
        peers = Peers(bound[0], bound[2], bar=next(n for n, size in enumerate(sizes) if size >= BAR_SIZE))
        yield peers
        peers.close()


def make(peers: Peers, iova: int = 0x400000) -> DmaBufMapping:
    with export(peers, Area(0, 2 * PAGE)) as buffer:
        imported = peers.space.import_dmabuf(buffer, iova=iova)
    peers.check_live(imported)
    return imported


def io_of(peers: Peers) -> KernelDeviceIo:
    assert isinstance(peers.exporter.io, KernelDeviceIo)
    return peers.exporter.io


def check_dead_then_back(peers: Peers, imported: DmaBufMapping, reason: str) -> None:
    """It is dead, says why, stays dead, and comes back with remap()."""
    peers.check_dead(imported)
    with pytest.raises(RevokedError, match=reason):
        _ = imported.iova
    with pytest.raises(RevokedError):
        imported.pin()
    with pytest.raises(RevokedError, match="was taken away"):
        peers.space.book.pin(imported.mapping.iova, PAGE, 3, peer=True)
    imported.remap()
    assert imported.iova == 0x400000
    peers.check_live(imported)


WAYS_TO_WRITE = {
    "device": lambda peers, value: peers.exporter.config.write16(COMMAND, value),
    "attribute": lambda peers, value: setattr(peers.exporter.config, "command", value),
    "raw region": lambda peers, value: peers.exporter.region(CONFIG).write16(COMMAND, value),
    "one byte": lambda peers, value: peers.exporter.io.write(CONFIG, COMMAND, bytes([value & 0xFF])),
    "four bytes": lambda peers, value: peers.exporter.io.write(CONFIG, COMMAND, value.to_bytes(4, "little")),
    "unaligned": lambda peers, value: peers.exporter.io.write(CONFIG, COMMAND - 1, b"\0" + value.to_bytes(2, "little")),
    "typed fd": lambda peers, value: peers.exporter.io.calls.pwrite(
        peers.exporter.io.region_info(CONFIG).offset + COMMAND, value.to_bytes(2, "little")
    ),
}


@pytest.mark.parametrize("way", WAYS_TO_WRITE)
def test_09_memory_decode_off(peers: Peers, way: str) -> None:
    write = WAYS_TO_WRITE[way]
    imported = make(peers)
    command = peers.exporter.config.command
    heard: list[tuple[DmaBufMapping, object]] = []
    imported.on_revoked(lambda one: heard.append((one, one.cause)))
    write(peers, command & ~2)
    peers.check_dead(imported)
    assert [one is imported for one, _ in heard] == [True]
    with pytest.raises(RevokedError, match="memory is away: its memory decode was switched off"):
        imported.remap()
    peers.check_dead(imported)
    write(peers, command | 2)
    check_dead_then_back(peers, imported, "its memory decode was switched off")
    assert len(heard) == 1
    imported.unmap()


@pytest.fixture
def virtual_peers(bound: tuple[str, str, str], bdf: Bdf) -> Iterator[Peers]:
    """The exporter is a virtual function."""
    sysfs = Path("/sys/bus/pci/devices") / bdf(IGB)
    (sysfs / "sriov_numvfs").write_text("1")  # under igb, its own driver
    try:
        virtual = (sysfs / "virtfn0").resolve().name
        with vfiopy.bind(virtual), no_dmabuf_left():
            peers = Peers(bound[0], virtual, bar=0)
            yield peers
            peers.close()
    finally:
        (sysfs / "sriov_numvfs").write_text("0")


def test_09_virtual_functions_have_no_memory_bit(virtual_peers: Peers) -> None:
    peers = virtual_peers
    imported = make(peers)
    peers.exporter.config.write16(COMMAND, 0)
    check_dead_then_back(peers, imported, "its memory bit was written as 0")
    imported.unmap()


def test_09_dma_faults_and_changes_nothing(peers: Peers) -> None:
    imported = make(peers)
    peers.bar.write_block(0, b"before..", width=1)
    peers.exporter.memory_enabled = False
    peers.exporter.memory_enabled = True
    peers.write_by_dma(imported.mapping.iova, b"too late")  # whoever goes round the check is stopped by the IOMMU
    assert peers.bar.read_block(0, 8, width=1) == b"before.."
    imported.remap()
    peers.write_by_dma(imported.iova, b"in time.")
    assert peers.bar.read_block(0, 8, width=1) == b"in time."
    imported.unmap()


def test_09_bus_mastering_does_not_matter(peers: Peers) -> None:
    imported = make(peers)
    peers.exporter.bus_master = True
    peers.exporter.bus_master = False
    peers.check_live(imported)
    imported.unmap()


def test_09_a_stale_import_can_be_unmapped(peers: Peers) -> None:
    imported = make(peers)
    peers.exporter.memory_enabled = False
    imported.unmap()
    assert not imported
    with pytest.raises(vfiopy.ClosedError):
        imported.remap()
    with pytest.raises(vfiopy.ClosedError):
        imported.check()
    peers.exporter.memory_enabled = True
    make(peers).unmap()  # the IOVA is free again


def test_10_export_while_decode_is_off(peers: Peers) -> None:
    peers.exporter.memory_enabled = False
    with export(peers, Area(0, PAGE)) as buffer:
        with pytest.raises(RevokedError, match="its memory decode was switched off") as caught:
            peers.space.import_dmabuf(buffer)
        assert caught.value.call == "IOMMU_IOAS_MAP_FILE"
        assert not peers.space.book.mappings()
        peers.exporter.memory_enabled = True
        with peers.space.import_dmabuf(buffer) as imported:
            peers.check_live(imported)


def test_11_function_reset(nvme_peers: Peers) -> None:
    imported = make(nvme_peers)
    nvme_peers.exporter.reset()
    check_dead_then_back(nvme_peers, imported, "it was reset")
    imported.unmap()


def test_11_a_reset_that_cannot_be_done_takes_nothing(peers: Peers) -> None:
    imported = make(peers)
    with pytest.raises(NotSupportedError):
        io_of(peers).calls.reset()  # ivshmem has none; the kernel says EINVAL
    peers.check_live(imported)
    imported.unmap()


def test_12_low_power(nvme_peers: Peers) -> None:
    imported = make(nvme_peers)
    calls = io_of(nvme_peers).calls
    calls.low_power_entry()
    nvme_peers.check_dead(imported)
    with pytest.raises(RevokedError, match="memory is away: it entered low power"):
        imported.remap()
    calls.low_power_exit()
    check_dead_then_back(nvme_peers, imported, "it entered low power")
    imported.unmap()


def test_13_hot_reset_of_a_sibling(bdf: Bdf) -> None:
    sibling, exporter, importer = bdf(EDU, 1), bdf(TESTDEV, 1), bdf(EDU)
    with (
        vfiopy.bind(sibling),
        vfiopy.bind(exporter),
        vfiopy.bind(importer),
        no_dmabuf_left(),
        vfiopy.AddressSpace("behind the bridge") as behind,
        vfiopy.open(sibling, space=behind) as other,
    ):
        peers = Peers(importer, exporter, exporter_space=behind)
        for io in (other.io, peers.exporter.io):
            assert isinstance(io, KernelDeviceIo)
            imported = make(peers)
            hot_reset(io)
            check_dead_then_back(peers, imported, "its bus was reset")
            imported.unmap()
        peers.close()


def test_14_d3hot(nvme_peers: Peers) -> None:
    imported = make(nvme_peers)
    config = nvme_peers.exporter.config
    power = next(one for one in config.capabilities() if isinstance(one, PowerManagement))
    before = config.read16(power.offset + 4)
    config.write16(power.offset + 4, before & ~3 | 3)
    nvme_peers.check_dead(imported)
    with pytest.raises(RevokedError, match="memory is away: it was put into D3hot"):
        imported.remap()
    config.write16(power.offset + 4, before & ~3)
    check_dead_then_back(nvme_peers, imported, "it was put into D3hot")
    imported.unmap()


def test_14_function_level_reset_by_configuration_space(nvme_peers: Peers) -> None:
    imported = make(nvme_peers)
    config = nvme_peers.exporter.config
    express = next(one for one in config.capabilities() if isinstance(one, PciExpress))
    assert express.flr
    config.write16(express.offset + 8, express.device_control | 1 << 15)
    check_dead_then_back(nvme_peers, imported, "it was reset")
    imported.unmap()


def test_15_the_exporter_is_closed(peers: Peers) -> None:
    imported = make(peers)
    buffer = export(peers, Area(0, PAGE))
    heard: list[object] = []
    imported.on_revoked(lambda one: heard.append(one.cause))
    peers.exporter.close()
    peers.check_dead(imported)
    assert len(heard) == 1
    with pytest.raises(RevokedError, match="it was closed") as caught:
        _ = imported.iova
    assert "exported anew" in caught.value.hint
    with pytest.raises(RevokedError, match="it was closed"):
        imported.remap()
    with buffer:
        with pytest.raises(RevokedError, match="it was closed"):
            peers.space.import_dmabuf(buffer)
        with pytest.raises(RevokedError):  # so says the kernel
            peers.space.mappers[0].ioas.map_file(buffer.fileno(), 0, PAGE)
    with vfiopy.open(peers.exporter.name):
        assert imported.state is ImportState.REVOKED  # another life of the same device
    imported.unmap()


def test_26_unbinding_waits_for_the_device_not_for_the_buffer(bound: tuple[str, str, str]) -> None:
    with no_dmabuf_left():
        peers = Peers(bound[0], bound[1])
        imported = make(peers)
        buffer = export(peers, Area(0, PAGE))
        request = peers.exporter.irqs.request.enable()[0]
        driver = Path("/sys/bus/pci/drivers/vfio-pci")
        unbinding = threading.Thread(target=lambda: (driver / "unbind").write_text(bound[1]))
        unbinding.start()
        try:
            request.wait(10)  # the kernel asks for the device
            assert unbinding.is_alive()
            peers.exporter.close()
            unbinding.join(10)
            assert not unbinding.is_alive()
            assert not (driver / bound[1]).exists()
            peers.check_dead(imported)
            assert buffer.info.references == 1
        finally:
            buffer.close()
            imported.unmap()
            peers.close()
            unbinding.join(30)
            (driver / "bind").write_text(bound[1])
            assert wait_for((driver / bound[1]).exists)


@pytest.mark.timeout(400)  # thousands of rounds against a thread that fights for the same lock
def test_27_decode_toggles_while_imports_come_and_go(peers: Peers) -> None:
    stop = threading.Event()
    toggles = 0

    def toggle() -> None:
        nonlocal toggles
        config = peers.exporter.config
        on = config.command | 2
        while not stop.is_set():
            config.write16(COMMAND, on & ~2)
            config.write16(COMMAND, on)
            toggles += 1

    rounds = refused = dead = remapped = 0
    chance = random.Random(27)
    thread = threading.Thread(target=toggle)
    with export(peers, Area(0, 2 * PAGE)) as buffer:
        thread.start()
        try:
            while rounds < ROUNDS:
                rounds += 1
                try:
                    imported = peers.space.import_dmabuf(buffer, iova=0x400000)
                except RevokedError:
                    refused += 1
                    continue
                if chance.random() < 0.3:
                    with suppress(RevokedError):
                        imported.remap()
                        remapped += 1
                dead += imported.state is ImportState.REVOKED
                imported.unmap()
                if rounds % 500 == 0:
                    peers.space.book.verify()
        finally:
            stop.set()
            thread.join(30)
        peers.space.book.verify()
        assert not peers.space.book.mappings()
        assert peers.is_dead(0x400000, 2 * PAGE)
        print(f"rounds {rounds}, refused {refused}, found dead {dead}, remapped {remapped}, toggles {toggles}")
        assert refused
        assert toggles > 100
        # And now, with nobody interfering, both sides still agree.
        with peers.space.import_dmabuf(buffer, iova=0x400000) as imported:
            peers.check_live(imported)

"""The BAR of an emulated device as memory for another emulated device: the road that needs no kernel.

What needs one is in tests/guest/test_dmabuf_*.py.
"""

from __future__ import annotations

import gc
import mmap
import socket
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from emulated_support import Everything

import vfiopy
from vfiopy import ExporterLife, ImportState, Prot, RevokedError
from vfiopy.backend import DeviceWindow
from vfiopy.dma import imports, peer
from vfiopy.dma.imported import ImportedMemory
from vfiopy.dma.peer_memory import ANY_IOVA
from vfiopy.dmabuf.origin import BarOrigin, ForeignOrigin
from vfiopy.drivers.edu import EduDriver
from vfiopy.errors import AlignmentError, NotSupportedError, StateError
from vfiopy.signals import Cause

PAGE = 4096


class Pair:
    def __init__(self) -> None:
        self.importer = vfiopy.open("emulated:edu")
        self.exporter = vfiopy.open(Everything())
        self.importer.bus_master = True
        self.edu = EduDriver(self.importer)
        self.space = self.importer.space
        self.bar = self.exporter.bars[2]


@pytest.fixture
def pair() -> Iterator[Pair]:
    pair = Pair()
    yield pair
    pair.importer.close()
    pair.exporter.close()
    del pair
    gc.collect()  # a callback that knows its import is a circle; later tests count open files


def store(pair: Pair, iova: int, text: bytes) -> None:
    with pair.space.bounce(text) as source:
        pair.edu.load(source.iova, len(text))
    pair.edu.store(iova, len(text))


def test_dma_lands_in_the_bar(pair: Pair) -> None:
    with pair.space.peer(pair.bar, offset=PAGE, size=PAGE) as imported:
        assert imported.state is ImportState.LIVE
        assert imported.ranges is None  # nothing of it is on a bus
        assert imported.paths == ()
        store(pair, imported.iova + 8, b"to a peer")
        assert pair.bar.read_block(PAGE + 8, 9, width=1) == b"to a peer"
    assert not imported


def test_it_dies_with_the_exporters_decode_and_comes_back(pair: Pair) -> None:
    imported = pair.space.peer(pair.bar, size=PAGE, iova=0x40000)
    heard: list[vfiopy.DmaBufMapping] = []
    imported.on_revoked(heard.append)
    pair.exporter.memory_enabled = False
    assert heard == [imported]
    assert (imported.state, imported.cause) == (ImportState.REVOKED, Cause.DECODE)
    with pytest.raises(RevokedError, match="decode was switched off"):
        _ = imported.iova
    with pytest.raises(RevokedError, match="was taken away"):
        pair.space.book.pin(0x40000, PAGE, 3, peer=True)
    store(pair, 0x40000, b"lost")
    assert "was taken away" in pair.importer.io.device.faults[-1].reason  # type: ignore[attr-defined]
    pair.exporter.memory_enabled = True
    assert imported.state is ImportState.REVOKED
    imported.remap()
    imported.remap()  # nothing to do
    assert imported.iova == 0x40000
    store(pair, imported.iova, b"found")
    assert pair.bar.read_block(0, 5, width=1) == b"found"
    pair.exporter.reset()
    assert imported.cause is Cause.RESET
    imported.unmap()
    pair.space.book.verify()


def test_who_asks_late_is_told_at_once(pair: Pair) -> None:
    imported = pair.space.peer(pair.bar, size=PAGE)
    pair.exporter.reset()
    heard: list[vfiopy.DmaBufMapping] = []
    imported.on_revoked(heard.append)
    assert heard == [imported]
    imported.remap()
    imported.on_revoked(heard.append)
    assert len(heard) == 1
    pair.exporter.reset()
    assert len(heard) == 3
    imported.unmap()


def test_it_does_not_come_back_before_the_memory_does(pair: Pair) -> None:
    imported = pair.space.peer(pair.bar, size=PAGE)
    pair.exporter.memory_enabled = False
    with pytest.raises(RevokedError, match="memory is away: its memory decode was switched off"):
        imported.remap()
    assert (imported.state, imported.cause) == (ImportState.REVOKED, Cause.DECODE)
    pair.exporter.memory_enabled = True
    imported.remap()
    imported.unmap()


def test_decode_that_goes_off_while_it_is_mapped(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    def origin(*arguments: Any) -> BarOrigin:
        pair.exporter.memory_enabled = False  # another thread, after peer() has looked
        return BarOrigin(*arguments)

    monkeypatch.setattr(peer, "BarOrigin", origin)
    with pytest.raises(RevokedError, match="decode was switched off"):
        pair.space.peer(pair.bar, size=PAGE)
    assert not pair.bar.holds
    assert not pair.space.book.mappings()


def test_a_copy_tells_of_the_exporters_end_with_no_lock_held(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    here, there = socket.socketpair()
    origin = ForeignOrigin("received")
    locked: list[bool] = []

    def look() -> None:
        free = origin.signals.lock.acquire(timeout=0.5)
        locked.append(not free)
        if free:
            origin.signals.lock.release()

    def heard(_: object) -> None:
        thread = threading.Thread(target=look)
        thread.start()
        thread.join()

    monkeypatch.setattr(imports, "_copier", lambda *_: object())
    with here, there, ExporterLife.of_socket(here) as life, mmap.mmap(-1, PAGE) as pages:
        origin.life = life
        memory = ImportedMemory(origin)
        address = np.frombuffer(pages, dtype="u1").__array_interface__["data"][0]
        window = DeviceWindow(-1, 0, PAGE, here.fileno(), address, memory)
        mapping = pair.space.map_window(window, Prot.RW, iova=None, limit=ANY_IOVA, alignment=0)
        memory.mapped(mapping, pair.space)
        origin.signals.listen(memory)
        imported = vfiopy.DmaBufMapping(pair.space, mapping, memory)
        imported.on_revoked(heard)
        there.close()
        with pytest.raises(RevokedError, match="has ended"):
            imported.copy_to(pair.space)
        imported.unmap()
        del window
    assert locked == [False]


def test_a_callback_may_remap_or_unmap(pair: Pair) -> None:
    imported = pair.space.peer(pair.bar, size=PAGE)
    imported.on_revoked(lambda one: one.remap())
    pair.exporter.reset()
    imported.check()
    other = pair.space.peer(pair.bar, size=PAGE)
    other.on_revoked(lambda one: one.unmap())
    pair.exporter.reset()
    assert not other
    imported.check()
    imported.unmap()


def test_the_exporter_cannot_be_closed_under_it(pair: Pair) -> None:
    imported = pair.space.peer(pair.bar, size=PAGE)
    with pytest.raises(vfiopy.BusyError, match="peer memory of address space"):
        pair.exporter.close()
    assert pair.exporter.memory_enabled
    imported.unmap()
    with pytest.raises(vfiopy.ClosedError):
        imported.check()


def test_an_array_over_the_bar(pair: Pair) -> None:
    imported = pair.space.peer(pair.bar, offset=PAGE, size=PAGE, iova=0x40000)
    array = imported.array("<u4")
    assert isinstance(array, vfiopy.DmaArray)
    assert (array.shape, array.iova, array[4:].iova) == ((PAGE // 4,), 0x40000, 0x40010)
    array[4] = 0x11223344
    assert pair.bar.read32(PAGE + 16) == 0x11223344
    pair.edu.load(array[4:5].iova, 4)
    pair.edu.store(array[8:9].iova, 4)
    assert array[8] == 0x11223344
    with pytest.raises(vfiopy.ClosedError, match="a copy"):
        _ = (array + 1).iova
    pair.exporter.reset()
    with pytest.raises(RevokedError):
        _ = array.iova
    imported.remap()
    assert array.iova == 0x40000
    array.free()
    assert not imported
    with pytest.raises(vfiopy.ClosedError):
        _ = array.iova
    del array


def test_dropped_handles_are_still_told(pair: Pair) -> None:
    pair.space.peer(pair.bar, size=PAGE, iova=0x40000)
    gc.collect()
    pair.exporter.memory_enabled = False
    found = pair.space.book.find(0x40000)
    assert found is not None
    assert found.revoked
    pair.space.unmap(0x40000)
    pair.exporter.memory_enabled = True


def test_refusals(pair: Pair) -> None:
    with pytest.raises(NotSupportedError, match="not the BAR of a device"):
        pair.space.peer(vfiopy.Region("loose", PAGE))
    with pytest.raises(AlignmentError, match="not whole pages"):
        pair.space.peer(pair.bar, size=10)
    with pytest.raises(vfiopy.AddressRangeError, match="reach beyond"):
        pair.space.peer(pair.bar, offset=pair.bar.size, size=PAGE)
    with pytest.raises(vfiopy.AccessError):
        pair.space.peer(pair.importer.bars[0], size=PAGE)  # registers: served by code, not memory
    pair.exporter.memory_enabled = False
    with pytest.raises(RevokedError, match="does not decode memory"):
        pair.space.peer(pair.bar)
    pair.exporter.memory_enabled = True
    with vfiopy.AddressSpace("closed") as space:
        pass
    with pytest.raises((StateError, vfiopy.ClosedError)):
        space.peer(pair.bar)
    assert not pair.bar.holds
    assert not pair.space.book.mappings()

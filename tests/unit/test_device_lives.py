"""How a device ends: refused, interrupted, or gone, closing can be done again and leaves nothing."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from emulated_support import Everything

import vfiopy
from vfiopy.backend import IrqAction, IrqIndex, Window
from vfiopy.dma import AddressSpace
from vfiopy.dma.mappers import MapperSet
from vfiopy.emulated import Edu, EmulatedDeviceIo
from vfiopy.mmio import numpy_view


@pytest.fixture
def device() -> Iterator[vfiopy.Device]:
    with vfiopy.open(Everything(manual=True)) as device:
        yield device


def open_fds() -> int:
    gc.collect()  # or what earlier tests left goes meanwhile
    return len(list(Path("/proc/self/fd").iterdir()))


def interrupted(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, *, after: bool) -> None:
    """Have the next call of a method end in KeyboardInterrupt, before or after it has done its work."""
    real = getattr(owner, name)

    def cut(*arguments: Any, **keywords: Any) -> Any:
        monkeypatch.setattr(owner, name, real)
        if after:
            real(*arguments, **keywords)
        raise KeyboardInterrupt

    monkeypatch.setattr(owner, name, cut)


# --- interrupts --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("after", [False, True])
def test_an_interrupted_enable_leaves_nothing_enabled(
    device: vfiopy.Device, monkeypatch: pytest.MonkeyPatch, after: bool
) -> None:
    fds = open_fds()
    interrupted(monkeypatch, EmulatedDeviceIo, "set_irqs", after=after)
    with pytest.raises(KeyboardInterrupt):
        device.irqs.msix.enable(2)
    assert not device.irqs.msix.enabled
    assert open_fds() == fds
    (vector,) = device.irqs.msi.enable(1)  # another kind: the backend has let go of the first
    vector.trigger()
    assert vector.wait(1) == 1


@pytest.mark.parametrize("after", [False, True])
def test_an_interrupted_replace_leaves_the_old_vector_working(
    device: vfiopy.Device, monkeypatch: pytest.MonkeyPatch, after: bool
) -> None:
    (vector,) = device.irqs.msix.enable(1)
    interrupted(monkeypatch, EmulatedDeviceIo, "set_irqs", after=after)
    with pytest.raises(KeyboardInterrupt):
        device.irqs.msix.replace(0)
    assert device.irqs.msix.vectors == (vector,)
    vector.trigger()
    assert vector.wait(1) == 1


def test_a_disable_can_be_done_again(device: vfiopy.Device, monkeypatch: pytest.MonkeyPatch) -> None:
    (vector,) = device.irqs.msi.enable(1)
    interrupted(monkeypatch, EmulatedDeviceIo, "set_irqs", after=True)
    with pytest.raises(KeyboardInterrupt):
        device.irqs.msi.disable()
    device.irqs.msi.disable()
    assert not vector
    device.irqs.msix.enable(1)


def test_interrupts_that_cannot_be_disabled_do_not_keep_a_device_open(monkeypatch: pytest.MonkeyPatch) -> None:
    device = vfiopy.open(Everything(manual=True))
    vectors = device.irqs.msix.enable(2)

    def gone(*_: Any, **__: Any) -> None:
        raise vfiopy.DeviceGoneError("it is gone", object="emulated:everything")

    monkeypatch.setattr(EmulatedDeviceIo, "set_irqs", gone)
    device.close()
    assert not device
    assert not any(vectors)


def test_disabled_behind_its_back_a_device_can_be_closed(device: vfiopy.Device) -> None:
    device.irqs.msi.enable(1)
    device.io.set_irqs(IrqIndex.MSI, IrqAction.TRIGGER, 0, 0)
    device.close()
    assert not device


# --- regions -----------------------------------------------------------------------------------------------------


def test_two_threads_open_a_region_once(device: vfiopy.Device, monkeypatch: pytest.MonkeyPatch) -> None:
    real = EmulatedDeviceIo.map_region
    both = threading.Barrier(2)

    def slowly(self: EmulatedDeviceIo, index: int, offset: int, size: int) -> Window:
        window = real(self, index, offset, size)
        try:
            both.wait(0.1)  # two threads in here at once would meet
        except threading.BrokenBarrierError:
            return window
        raise AssertionError("the region is opened twice")

    monkeypatch.setattr(EmulatedDeviceIo, "map_region", slowly)
    found: list[object] = []
    threads = [threading.Thread(target=lambda: found.append(device.bars[2])) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 2
    assert found[0] is found[1]


def test_a_refused_close_leaves_the_other_regions_usable() -> None:
    device = vfiopy.open(Everything(manual=True))
    registers, memory = device.bars[0], device.bars[2]
    view = numpy_view(memory, 0, 16)
    with pytest.raises(vfiopy.BusyError, match="numpy view"):
        device.close()
    assert device
    registers.read32(0)
    del view
    gc.collect()
    device.close()
    with pytest.raises(vfiopy.ClosedError):
        registers.read32(0)


# --- open and close ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("where", "step"), [(AddressSpace, "leave"), (MapperSet, "leave"), (MapperSet, "refresh"), (MapperSet, "_close")]
)
@pytest.mark.parametrize("after", [False, True])
def test_an_interrupted_close_can_be_done_again(
    monkeypatch: pytest.MonkeyPatch, where: type, step: str, after: bool
) -> None:
    fds = open_fds()
    device = vfiopy.open("emulated:edu")
    interrupted(monkeypatch, where, step, after=after)
    with pytest.raises(KeyboardInterrupt):
        device.close()
    device.close()
    assert not device
    assert not device.space
    assert open_fds() == fds


@pytest.mark.parametrize("own", [True, False])
def test_an_open_that_is_interrupted_at_its_end_leaves_nothing(monkeypatch: pytest.MonkeyPatch, own: bool) -> None:
    fds = open_fds()
    card = Edu(manual=True)
    with AddressSpace("shared") as space:
        interrupted(monkeypatch, AddressSpace, "join", after=True)
        with pytest.raises(KeyboardInterrupt):
            vfiopy.open(card, space=None if own else space)
        assert space.mappers == ()
        vfiopy.open(card, space=space).close()
    assert open_fds() == fds


def test_a_device_that_fails_to_power_up_can_be_opened_again(monkeypatch: pytest.MonkeyPatch) -> None:
    card = Edu(manual=True)
    interrupted(monkeypatch, Edu, "reset", after=False)
    with pytest.raises(KeyboardInterrupt):
        vfiopy.open(card)
    with monkeypatch.context() as patch:
        patch.setattr(card.config, "place_bars", lambda *_: 1 // 0)
        with pytest.raises(ZeroDivisionError):
            vfiopy.open(card)
    vfiopy.open(card).close()


def test_reset_leaves_memory_decode_as_it_was(device: vfiopy.Device) -> None:
    device.reset()
    assert device.memory_enabled
    device.memory_enabled = False
    device.reset()
    assert not device.memory_enabled


@pytest.mark.parametrize("argument", [{"backend": "iommufd"}, {"device_fd": 0}])
def test_what_means_nothing_for_an_emulated_device_is_refused(argument: dict[str, Any]) -> None:
    for target in ("emulated:edu", Edu()):
        with pytest.raises(vfiopy.NotSupportedError, match="means nothing for an emulated device"):
            vfiopy.open(target, **argument)


def test_a_pci_address_object_is_a_target() -> None:
    with pytest.raises(vfiopy.DeviceNotFoundError, match=r"fffe:00:00\.0"):
        vfiopy.open(vfiopy.PciAddress.parse("fffe:00:00.0"))

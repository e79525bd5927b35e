"""Interrupts of an open device: what is refused, and that a refusal leaves no eventfd behind."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest

import vfiopy
from vfiopy.emulated import Bar, Edu, Identity, MsiX, PciDevice


@pytest.fixture
def edu() -> Iterator[vfiopy.Device]:
    with vfiopy.open("emulated:edu") as device:
        yield device


def descriptors() -> set[str]:
    return set(os.listdir("/proc/self/fd"))  # noqa: PTH208


def test_msi_and_intx_exclude_each_other(edu: vfiopy.Device) -> None:
    (vector,) = edu.irqs.msi.enable()
    with pytest.raises(vfiopy.BusyError, match=r"INTx: MSI is enabled.*\n  hint: call irqs.msi.disable\(\) first"):
        edu.irqs.intx.enable()
    with pytest.raises(vfiopy.BusyError, match="1 vectors are enabled already"):
        edu.irqs.msi.enable()
    edu.irqs.msi.disable()
    edu.irqs.msi.disable()
    assert not vector
    assert edu.irqs.intx.enable()[0]


def test_what_the_device_does_not_have(edu: vfiopy.Device) -> None:
    with pytest.raises(vfiopy.NotSupportedError, match=r"the device has no MSI-X\n  hint: it has INTx, MSI"):
        edu.irqs.msix.enable()
    with pytest.raises(vfiopy.AddressRangeError, match="2 vectors are asked for, it has 1"):
        edu.irqs.msi.enable(2)
    with pytest.raises(vfiopy.AddressRangeError):
        edu.irqs.msi.enable(0)


def test_masking(edu: vfiopy.Device) -> None:
    with pytest.raises(vfiopy.StateError, match=r"INTx is not enabled; call enable\(\) first"):
        edu.irqs.intx.mask()
    (vector,) = edu.irqs.intx.enable()
    edu.irqs.intx.mask()
    edu.bars[0].write32(0x60, 1)
    assert vector.take() == 0
    edu.irqs.intx.unmask()
    assert vector.wait(1) == 1
    edu.irqs.intx.disable()
    edu.irqs.msi.enable()
    with pytest.raises(vfiopy.NotSupportedError, match=r"MSI cannot be masked through VFIO\n.*mask register"):
        edu.irqs.msi.mask()


def test_replacing_one_vector(edu: vfiopy.Device) -> None:
    edu.bus_master = True
    (old,) = edu.irqs.msi.enable()
    new = edu.irqs.msi.replace(0)
    assert not old
    assert edu.irqs.msi[0] is new
    edu.bars[0].write32(0x60, 1)
    assert new.wait(1) == 1
    with pytest.raises(vfiopy.AddressRangeError, match="there is no vector 1; 0 to 0 are enabled"):
        edu.irqs.msi.replace(1)


@pytest.mark.parametrize("step", range(1, 6))
def test_a_failure_at_any_step_leaves_nothing(
    edu: vfiopy.Device, step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fail the n-th of all eventfd() and SET_IRQS calls while vectors are enabled and one is replaced."""
    calls = 0

    def counted(work: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == step:
                raise OSError(24, "no more")
            return work(*args, **kwargs)

        return call

    before = descriptors()
    monkeypatch.setattr(os, "eventfd", counted(os.eventfd))
    monkeypatch.setattr(edu.io, "set_irqs", counted(edu.io.set_irqs))

    def script() -> None:
        edu.irqs.msi.enable()
        edu.irqs.msi.replace(0)
        edu.irqs.msi.disable()

    with pytest.raises(OSError, match="no more"):
        script()
    monkeypatch.undo()
    edu.irqs.disable_all()
    assert descriptors() == before
    assert edu.irqs.msi.enable()[0].take() == 0


def test_closing_the_device_closes_its_vectors() -> None:
    before = descriptors()
    device = vfiopy.open(Edu())
    (vector,) = device.irqs.msi.enable()
    device.close()
    assert not vector
    assert descriptors() == before


class ManyVectors(PciDevice):
    """A function with eight MSI-X vectors and one BAR for their table."""

    identity = Identity(vendor=0x1234, device=0x0001, class_code=0xFF0000)
    bars = {0: Bar(0x2000, shared=True)}  # noqa: RUF012  declared ClassVar by the base
    capabilities = (MsiX(vectors=8, table_bar=0, table_offset=0, pba_bar=0, pba_offset=0x800),)


def test_vectors_are_told_apart() -> None:
    with vfiopy.open(ManyVectors()) as device:
        vectors = device.irqs.msix.enable(5)
        vectors[3].trigger()
        vectors[3].trigger()
        vectors[0].trigger()
        assert [vector.take() for vector in vectors] == [1, 0, 0, 2, 0]
        fresh = device.irqs.msix.replace(3)
        fresh.trigger()
        assert (fresh.wait(1), vectors[2].take()) == (1, 0)
        assert device.bars[0].windows == ((0x1000, 0x1000),), "the pages of the table are left out"

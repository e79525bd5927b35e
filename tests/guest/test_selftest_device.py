"""The kernel's vfio_pci_device_test, vfio_pci_driver_test and vfio_pci_device_init_perf_test by scenario.

ioat and dsa, the two engines that the kernel's suite drives, have no emulation; edu copies memory and sends MSIs too.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from modes import E1000E, EDU, IGB, IVSHMEM, MODES, NVME

import vfiopy
from vfiopy.backend import RegionFlag
from vfiopy.drivers.edu import EduDriver

Lookup = Callable[..., str]
ALL = [EDU, NVME, IVSHMEM, IGB, E1000E]
NAMES = ["edu", "nvme", "ivshmem", "igb", "e1000e"]


@pytest.fixture(params=["type1v2", "iommufd"])
def road(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=MODES)
def edu(request: pytest.FixtureRequest, bound_edu: str) -> Iterator[vfiopy.Device]:
    with vfiopy.open(bound_edu, backend=request.param) as device:
        yield device


@pytest.mark.parametrize("ids", ALL, ids=NAMES)
def test_config_space_read_write(ids: str, road: str, bdf: Lookup) -> None:
    address = bdf(ids)
    with vfiopy.bind(address), vfiopy.open(address, backend=road) as device:
        sysfs = Path("/sys/bus/pci/devices") / address
        assert device.config.vendor == int((sysfs / "vendor").read_text(), 16)
        assert device.config.device == int((sysfs / "device").read_text(), 16)
        assert not device.bus_master
        device.bus_master = True
        assert device.bus_master
        device.bus_master = False
        assert not device.bus_master


@pytest.mark.parametrize("ids", ALL, ids=NAMES)
def test_validate_bars(ids: str, road: str, bdf: Lookup) -> None:
    address = bdf(ids)
    with vfiopy.bind(address), vfiopy.open(address, backend=road) as device:
        seen = 0
        for index in range(6):
            info = device.bars.info(index)
            if not info.size:
                assert index not in device.bars
                with pytest.raises(vfiopy.NotSupportedError, match=f"no BAR {index}"):
                    device.bars[index]
                continue
            seen += 1
            assert device.bars[index].size == info.size
        assert seen
        for index in range(6):
            if RegionFlag.MMAP in device.bars.info(index).flags:
                assert device.bars[index].windows, "mappable, and nothing of it is mapped"


@pytest.mark.parametrize("ids", ALL, ids=NAMES)
def test_reset(ids: str, road: str, bdf: Lookup) -> None:
    address = bdf(ids)
    with vfiopy.bind(address), vfiopy.open(address, backend=road) as device:
        if not device.can_reset:
            with pytest.raises(vfiopy.NotSupportedError, match="no function reset"):
                device.reset()
            return
        device.bus_master = True
        device.reset()
        assert not device.bus_master
        assert device.memory_enabled


@pytest.mark.parametrize(
    ("ids", "kind"), [(EDU, "msi"), (IGB, "msix"), (NVME, "msix"), (E1000E, "msi"), (E1000E, "msix"), (EDU, "intx")]
)
def test_irq_enable_trigger_disable(ids: str, kind: str, road: str, bdf: Lookup) -> None:
    address = bdf(ids)
    with vfiopy.bind(address), vfiopy.open(address, backend=road) as device:
        interrupt = getattr(device.irqs, kind)
        for _ in range(2):
            for vector in interrupt.enable(min(interrupt.count, 16)):
                assert vector.take() == 0
                vector.trigger()
                assert vector.wait(2) == 1
                assert vector.take() == 0
            interrupt.disable()


def test_irq_errors_name_the_interrupt(bdf: Lookup) -> None:
    address = bdf(EDU)
    with vfiopy.bind(address), vfiopy.open(address) as device:
        with pytest.raises(vfiopy.NotSupportedError, match=r"no MSI-X\n.*INTx, MSI"):
            device.irqs.msix.enable()
        with pytest.raises(vfiopy.AddressRangeError, match="2 vectors are asked for, it has 1"):
            device.irqs.msi.enable(2)
        device.irqs.msi.enable()
        with pytest.raises(vfiopy.BusyError, match=r"irqs.msi.disable\(\) first"):
            device.irqs.intx.enable()


# --- vfio_pci_driver_test, with edu in the place of ioat and dsa ---------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_driver_init_remove(bound_edu: str, mode: str) -> None:
    for _ in range(10):
        with vfiopy.open(bound_edu, backend=mode) as device:
            assert EduDriver(device).invert(0x12345678) == 0xEDCBA987


@pytest.fixture
def driver(edu: vfiopy.Device) -> EduDriver:
    edu.bus_master = True
    return EduDriver(edu)


def copy(driver: EduDriver) -> None:
    buffer = driver.device.dma.allocate(2048)
    buffer[:1024] = [n % 251 for n in range(1024)]
    driver.load(buffer.iova, 1024)
    driver.store(buffer[1024:].iova, 1024)
    assert bytes(buffer[:1024]) == bytes(buffer[1024:])
    buffer.free()


def test_driver_memcpy_success(driver: EduDriver) -> None:
    copy(driver)


@pytest.mark.parametrize("direction", ["from", "to"])
def test_driver_memcpy_unmapped_iova(driver: EduDriver, direction: str) -> None:
    """DMA at an IOVA that is not mapped: the IOMMU blocks it, and the device works afterwards."""
    buffer = driver.device.dma.allocate(4096)
    hole = buffer.iova
    buffer.fill(0x55)
    buffer.free()
    move = driver.load if direction == "from" else driver.store
    move(hole, 1024)
    assert bytes(buffer) == b"\x55" * 4096
    copy(driver)


def test_driver_send_msi(driver: EduDriver) -> None:
    vector = driver.enable_interrupts("msi")
    driver.raise_interrupt(1)
    assert vector.wait(2) == 1
    assert driver.device.bars[0].read32(0x24) == 1
    assert vector.take() == 0
    driver.disable_interrupts()


@pytest.mark.parametrize("mode", MODES)
def test_driver_mix_and_match(bound_edu: str, mode: str) -> None:
    for _ in range(3):
        with vfiopy.open(bound_edu, backend=mode) as device:
            device.bus_master = True
            driver = EduDriver(device)
            copy(driver)
            driver.enable_interrupts("msi")
            driver.raise_interrupt(2)
            assert driver.wait_interrupt(2, timeout=2) == 2
            driver.load(0x0F00_0000, 64)
            copy(driver)


def test_device_init_perf(bdf: Lookup) -> None:
    """Several devices opened in parallel threads; the times are printed, not judged."""
    addresses = [bdf(IVSHMEM), bdf(EDU), bdf(E1000E)]
    bindings = [vfiopy.bind(address) for address in addresses]
    try:

        def opened(address: str) -> float:
            begin = time.perf_counter()
            with vfiopy.open(address):
                return time.perf_counter() - begin

        with ThreadPoolExecutor(len(addresses)) as pool:
            times = list(pool.map(opened, addresses))
        print({address: f"{seconds * 1000:.1f} ms" for address, seconds in zip(addresses, times, strict=True)})
    finally:
        for binding in bindings:
            binding.undo()

"""Region on BARs of the kernel's making: widths, huge mappings, and memory that goes away under an access."""

from __future__ import annotations

import resource
import threading
import time
from collections.abc import Callable, Iterator

import pytest
from modes import IVSHMEM

import vfiopy
from vfiopy.device.config_space import COMMAND_MEMORY
from vfiopy.mmio import Region, fault_count, numpy_view

COMMAND = 0x04
MIB = 1 << 20
Lookup = Callable[..., str]


@pytest.fixture(params=["type1v2", "iommufd"])
def device(request: pytest.FixtureRequest, bdf: Lookup) -> Iterator[vfiopy.Device]:
    address = bdf(IVSHMEM)
    with vfiopy.bind(address), vfiopy.open(address, backend=request.param) as device:
        yield device


@pytest.fixture
def memory(device: vfiopy.Device) -> Region:
    """BAR 2 of ivshmem: plain shared memory of 16 MiB."""
    return device.bars[2]


def set_decode(device: vfiopy.Device, *, on: bool) -> None:
    command = device.config.read16(COMMAND)
    device.config.write16(COMMAND, command | COMMAND_MEMORY if on else command & ~COMMAND_MEMORY)


def test_every_width_and_kind(memory: Region) -> None:
    for width in (1, 2, 4, 8):
        value = int.from_bytes(bytes(range(0xA1, 0xA1 + width)), "little")
        for suffix in ("", "_relaxed"):
            getattr(memory, f"write{8 * width}{suffix}")(64, value)
            assert getattr(memory, f"read{8 * width}{suffix}")(64) == value
        data = bytes(range(256)) * 4
        memory.write_block(4096, data, width)
        assert memory.read_block(4096, len(data) // width, width) == data
        assert memory.read_fifo(4096 + 8, 3, width) == data[8 : 8 + width] * 3
        memory.write_fifo(8, data[: 4 * width], width)
        assert getattr(memory, f"poll{8 * width}")(8, 0xFF, data[3 * width], 1.0, 0.001) & 0xFF == data[3 * width]
    array = numpy_view(memory, 4096, 1024, "u1")
    assert bytes(array) == data
    with pytest.raises(vfiopy.BusyError, match="numpy view of uint8 at 0x1000"):
        memory.close()
    del array


def test_large_bars_are_mapped_with_large_pages(memory: Region) -> None:
    """The address is congruent to the offset, so the kernel needs one fault for 2 MiB, not one for 4 KiB."""
    with memory.hold() as hold:
        assert hold.address % memory.size == 0
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for offset in range(0, memory.size, 4096):
        memory.read8(offset)
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    assert faults <= memory.size // (2 * MIB) + 20, f"{faults} page faults for {memory.size // MIB} MiB"


USES: dict[str, Callable[[Region], object]] = {
    **{f"read{bits}": lambda region, bits=bits: getattr(region, f"read{bits}")(0) for bits in (8, 16, 32, 64)},
    **{f"write{bits}": lambda region, bits=bits: getattr(region, f"write{bits}")(0, 1) for bits in (8, 16, 32, 64)},
    "read_block": lambda region: region.read_block(0, 100),
    "write_block": lambda region: region.write_block(0, bytes(400)),
    "read_fifo": lambda region: region.read_fifo(0, 100),
    "write_fifo": lambda region: region.write_fifo(0, bytes(400)),
    "poll32": lambda region: region.poll32(4, 1, 0, 1.0),
}


def test_memory_decode_off_under_every_access(device: vfiopy.Device, memory: Region) -> None:
    memory.write64(0, 0)
    set_decode(device, on=False)
    try:
        for name, use in USES.items():
            before = fault_count()
            with pytest.raises(vfiopy.DeviceGoneError, match="decode") as caught:
                use(memory)
            assert memory.name in str(caught.value), name
            assert fault_count() <= before + 1, name
    finally:
        set_decode(device, on=True)
    for use in USES.values():
        use(memory)


def test_memory_decode_goes_off_in_the_middle(device: vfiopy.Device, memory: Region) -> None:
    """A poll and a burst are under way in other threads, without the GIL, when the memory goes."""
    memory.write32(0, 0)
    ended: list[type[BaseException]] = []

    def poll() -> None:
        memory.poll32(0, 1, 1, timeout=60.0)

    def burst() -> None:
        while True:
            memory.read_fifo(0, 100_000)

    def run(call: Callable[[], None]) -> None:
        try:
            call()
        except BaseException as error:
            ended.append(type(error))

    threads = [threading.Thread(target=run, args=(call,)) for call in (poll, burst)]
    for thread in threads:
        thread.start()
    time.sleep(0.1)
    set_decode(device, on=False)
    for thread in threads:
        thread.join(30)
    set_decode(device, on=True)
    assert ended == [vfiopy.DeviceGoneError] * 2
    assert memory.read32(0) == 0

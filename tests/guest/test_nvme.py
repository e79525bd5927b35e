"""The NVMe driver on QEMU's controller: the kernel's own driver is the judge of what lies on the disk."""

from __future__ import annotations

import asyncio
import hashlib
import importlib.util
import os
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from modes import EDU, NVME

import vfiopy
from vfiopy.drivers import nvme
from vfiopy.drivers.nvme import commands

Lookup = Callable[..., str]
ROADS = ("iommufd", "type1v2")
EXAMPLE = Path(__file__).parents[2] / "examples" / "nvme_read.py"
ZONE = 8 << 20
"""From this byte on the tests write; the example's patterns lie below."""


def noise(size: int, seed: int) -> bytes:
    return hashlib.shake_128(f"guest {seed}".encode()).digest(size)


@pytest.fixture(params=ROADS)
def road(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def address(bdf: Lookup) -> str:
    """The controller without a controller memory buffer."""
    return bdf(NVME, 1)


@pytest.fixture
def device(address: str, road: str) -> Iterator[vfiopy.Device]:
    with vfiopy.bind(address), vfiopy.open(address, backend=road) as device:
        yield device
        assert not device.bus_master


def in_use(device: vfiopy.Device) -> dict[str, Any]:
    """What the space has in use, without what its book keeps for the next mappings."""
    return {name: figure for name, figure in device.space.stats().items() if name != "book_memory"}


@pytest.fixture
def controller(device: vfiopy.Device) -> Iterator[nvme.Controller]:
    before = in_use(device)
    with nvme.Controller(device, queues=2) as controller:
        yield controller
    assert in_use(device) == before, "DMA memory was left behind"


@pytest.fixture(scope="session")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("nvme_read", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def kernel_disk(example: ModuleType) -> Callable[[str], Path]:
    """The block device that the kernel's driver makes of a controller."""
    return example.kernel_disk  # type: ignore[no-any-return]


def kernel_writes(disk: Path, offset: int, data: bytes) -> None:
    fd = os.open(disk, os.O_RDWR | os.O_CLOEXEC)
    try:
        assert os.pwrite(fd, data, offset) == len(data)
        os.fsync(fd)
    finally:
        os.close(fd)


def kernel_reads(disk: Path, offset: int, size: int) -> bytes:
    fd = os.open(disk, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.pread(fd, size, offset)
    finally:
        os.close(fd)


# --- the example -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("interrupts", ["msix", "intx", "polling"])
def test_example(
    address: str, road: str, interrupts: str, example: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    seed = str(zlib.crc32(f"{road} {interrupts}".encode()))
    words = [address, "--yes", "--kib", "512", "--seed", seed, "--backend", road, "--interrupts", interrupts]
    # other seeds left their patterns: the example refuses that, and --force overrules it
    assert example.main([*words, "--force"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(f"by {road}, {interrupts}" in line for line in lines)
    assert [line.split("  ")[-1].strip() for line in lines if line.startswith("ok")] == [
        "we read the kernel's pattern: 512 KiB, every byte",
        "we read back our pattern: 512 KiB, every byte",
        "the kernel read its own pattern: 512 KiB, every byte",
        "the kernel read our pattern: 512 KiB, every byte",
    ]


def test_example_sees_a_wrong_byte(
    address: str, example: ModuleType, kernel_disk: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    words = [address, "--yes", "--force", "--kib", "64", "--seed", "5"]
    assert example.main([*words, "--only", "prepare"]) == 0
    offset = (1 << 20) + 12345
    disk = kernel_disk(address)
    byte = kernel_reads(disk, offset, 1)[0]
    kernel_writes(disk, offset, bytes([byte ^ 1]))
    assert example.main([*words, "--only", "run"]) == 1
    assert "1 of 65536 bytes are wrong, the first at 0x3039" in capsys.readouterr().err


def test_example_leaves_other_peoples_data_alone(
    bdf: Lookup, example: ModuleType, kernel_disk: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    address = bdf(NVME, 0)
    disk = kernel_disk(address)
    old = kernel_reads(disk, 0, 4096)
    words = [address, "--yes", "--kib", "64"]
    try:
        kernel_writes(disk, 1024, b"data")
        assert example.main(words) == 1
        assert "is not blank: its first MiB holds data" in capsys.readouterr().err
        kernel_writes(disk, 0, old)
        kernel_writes(disk, (1 << 20) + 70000, b"data")
        assert example.main(words) == 1
        assert "is not blank at byte 1114112" in capsys.readouterr().err
        holder = os.open(disk, os.O_RDONLY | os.O_EXCL)
        try:
            assert example.main(words) == 1
        finally:
            os.close(holder)
        assert "cannot be opened: Device or resource busy" in capsys.readouterr().err
    finally:
        kernel_writes(disk, 0, old)
        kernel_writes(disk, (1 << 20) + 65536, bytes(65536))
    assert example.main([bdf(EDU, 0), "--yes"]) == 1
    assert "not an NVMe controller" in capsys.readouterr().err


# --- what it says of itself --------------------------------------------------------------------------------------


def test_identify_agrees_with_the_kernel(
    address: str, road: str, kernel_disk: Callable[[str], Path]
) -> None:
    sysfs = Path("/sys/class/block") / kernel_disk(address).name
    kernel = {name: (sysfs / "device" / name).read_text().strip() for name in ("model", "serial", "firmware_rev")}
    sectors = int((sysfs / "size").read_text())
    block_size = int((sysfs / "queue" / "logical_block_size").read_text())
    with (
        vfiopy.bind(address),
        vfiopy.open(address, backend=road) as device,
        nvme.Controller(device) as controller,
    ):
        info = controller.info
        assert {"model": info.model, "serial": info.serial, "firmware_rev": info.firmware} == kernel
        assert info.serial == "vfiopy-plain"
        assert controller.admin.active_namespaces() == [1]
        disk = controller.namespace(1)
        assert (disk.info.size, disk.block_size) == (sectors * 512, block_size)
        assert controller.capabilities.queue_entries >= 64
        smart = controller.admin.smart_log()
        assert 273 < smart["composite_temperature"] < 400


# --- data --------------------------------------------------------------------------------------------------------


def test_data_goes_both_ways_between_the_two_drivers(
    address: str, road: str, kernel_disk: Callable[[str], Path]
) -> None:
    size = 3 << 20
    theirs, ours = noise(size, 1), noise(size, 2)
    kernel_writes(kernel_disk(address), ZONE, theirs)
    with (
        vfiopy.bind(address),
        vfiopy.open(address, backend=road) as device,
        nvme.Controller(device, queues=2) as controller,
    ):
        disk = controller.namespace(1)
        lba, blocks = ZONE // disk.block_size, size // disk.block_size
        assert controller.max_transfer < size, "this is to be split"
        with device.dma.allocate(size + 8192) as buffer:
            # off the page by a dword: PRP lists whose first page is not whole
            part = buffer[4100 : 4100 + size]
            disk.read(lba, into=part)
            assert part.tobytes() == theirs
            assert not buffer[:4100].any()
            assert not buffer[4100 + size :].any()
            part[:] = np.frombuffer(ours, np.uint8)
            disk.write(lba + blocks, part, queue=controller.queues[1])
        disk.flush()
        assert disk.read(lba + blocks + 7, 100).tobytes() == ours[7 * disk.block_size : 107 * disk.block_size]
        assert all(queue.missed_interrupts == 0 for queue in controller.queues)
    assert kernel_reads(kernel_disk(address), ZONE + size, size) == ours


def test_prp_shapes(controller: nvme.Controller) -> None:
    """One page, two, a list; from the start of a page, from the middle, from its last dword."""
    shapes = [(0, 1), (0, 8), (512, 8), (4092, 1), (0, 16), (4, 16), (0, 1024), (3584, 1023)]
    disk = controller.namespace(1)
    lba = ZONE // 512
    for offset, blocks in shapes:
        size = blocks * 512
        expected = noise(size, offset + blocks)
        with controller.device.dma.allocate(offset + size + 4096) as buffer:
            part = buffer[offset : offset + size]
            part[:] = np.frombuffer(expected, np.uint8)
            disk.write(lba, part)
            buffer[:] = 0xA5
            disk.read(lba, into=part)
            assert part.tobytes() == expected, f"{blocks} blocks at offset {offset} of a page"
            assert (buffer[:offset] == 0xA5).all()
            assert (buffer[offset + size :] == 0xA5).all()


def test_write_zeroes_and_deallocate(controller: nvme.Controller) -> None:
    disk = controller.namespace(1)
    lba = ZONE // 512
    disk.write(lba, b"\xff" * 64 * 512)
    disk.write_zeroes(lba + 8, 16)
    blocks = disk.read(lba, 64).reshape(64, 512)
    assert np.flatnonzero(~blocks.any(axis=1)).tolist() == list(range(8, 24))
    assert (blocks[np.r_[0:8, 24:64]] == 0xFF).all()
    if controller.info.dataset_management:
        disk.deallocate((lba + 32, 8), (lba + 48, 8))
        blocks = disk.read(lba, 64).reshape(64, 512)
        assert (blocks[np.r_[0:8, 24:32, 40:48, 56:64]] == 0xFF).all()


# --- interrupts --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("interrupts", ["msix", "intx", "polling"])
def test_every_way_to_wait(device: vfiopy.Device, interrupts: nvme.signals.InterruptKind) -> None:
    with nvme.Controller(device, queues=2, interrupts=interrupts, timeout=20.0) as controller:
        disk = controller.namespace(1)
        for number, queue in enumerate(controller.queues):
            for turn in range(10):
                data = noise(512, number * 100 + turn)
                disk.write(ZONE // 512 + number, data, queue=queue)
                assert disk.read(ZONE // 512 + number, 1, queue=queue).tobytes() == data
            assert queue.missed_interrupts == 0
        if interrupts == "msix":
            # A completion that is found without waiting leaves its event in the eventfd.
            came = [vector.total + vector.take() for vector in device.irqs.msix.vectors]
            assert len(came) == 3
            assert all(came), came


def test_await(controller: nvme.Controller) -> None:
    disk = controller.namespace(1)
    data = noise(64 * 512, 3)
    disk.write(ZONE // 512, data)

    async def main() -> bytes:
        ticks = 0

        async def tick() -> None:
            nonlocal ticks
            while True:
                ticks += 1
                await asyncio.sleep(0)

        ticker = asyncio.create_task(tick())
        parts = await asyncio.gather(
            *(disk.read_async(ZONE // 512 + n, 4, queue=controller.queues[n // 4 % 2]) for n in range(0, 64, 4))
        )
        ticker.cancel()
        assert ticks > 3, "the loop stood still"
        return b"".join(part.tobytes() for part in parts)

    assert asyncio.run(main()) == data


# --- what goes wrong ---------------------------------------------------------------------------------------------


def test_errors_have_names(controller: nvme.Controller) -> None:
    beyond = controller.info.namespaces + 1
    with pytest.raises(nvme.NvmeError, match="Invalid Namespace or Format") as caught:
        controller.namespace(beyond)
    assert (caught.value.sct, caught.value.sc) == (0, 0x0B)
    with pytest.raises(nvme.NvmeError, match="Invalid Namespace or Format"):
        controller.queues[0].execute(commands.flush(beyond))
    with pytest.raises(vfiopy.NotSupportedError, match="namespace 9 is not active"):
        controller.namespace(9)
    disk = controller.namespace(1)
    with controller.device.dma.allocate(512) as buffer:
        with pytest.raises(nvme.NvmeError, match="LBA Out of Range"):
            controller.queues[0].execute(commands.read(1, disk.blocks, 1), buffer)
        with pytest.raises(nvme.NvmeError, match="Invalid Command Opcode"):
            controller.queues[1].execute(nvme.Command("Nonsense", 0x7F, nsid=1), buffer)
    with pytest.raises(nvme.NvmeError, match=r"Invalid Log Page|Invalid Field in Command"):
        controller.admin.log_page(0xBF, 512)
    assert controller.failure is None
    assert disk.read(0, 1).nbytes == 512


@pytest.mark.parametrize("interrupts", ["msix", "polling"])
def test_timeout_is_an_error_and_reset_brings_back(
    device: vfiopy.Device, interrupts: nvme.signals.InterruptKind
) -> None:
    with nvme.Controller(device, interrupts=interrupts) as controller:
        disk = controller.namespace(1)
        disk.write(ZONE // 512, noise(512, 4))
        # An event request is completed when an event happens: now, never.
        begin = time.monotonic()
        with pytest.raises(nvme.NvmeTimeoutError, match=r"Asynchronous Event Request.*not completed within 0.3 s"):
            controller.admin.request_event().wait(timeout=0.3)
        assert time.monotonic() - begin < 10
        assert not device.bars[0].read32(0x1C) & 1, "the controller is still ready"
        with pytest.raises(nvme.ControllerFailedError, match=r"reset\(\) brings it back"):
            disk.read(0, 1)
        controller.reset()
        assert disk.read(ZONE // 512, 1).tobytes() == noise(512, 4)


@pytest.mark.parametrize("function", [False, True], ids=["controller", "function"])
def test_reset_in_the_middle(controller: nvme.Controller, function: bool) -> None:
    device = controller.device
    disk = controller.namespace(1)
    disk.write(ZONE // 512, noise(512, 5))
    with device.dma.allocate(512 << 10) as buffer:
        event = controller.admin.request_event()
        requests = [queue.submit(commands.read(1, 0, 1024), buffer) for queue in controller.queues for _ in range(4)]
        controller.reset(function=function)
        with pytest.raises(nvme.CommandAbortedError, match="when the controller was reset"):
            event.wait()
        for request in requests:
            if request.error is not None:
                with pytest.raises(nvme.CommandAbortedError):
                    request.wait()
        for queue in controller.queues:
            assert disk.read(ZONE // 512, 1, queue=queue).tobytes() == noise(512, 5)
            assert queue.missed_interrupts == 0


def test_event_of_a_crossed_temperature(controller: nvme.Controller) -> None:
    admin = controller.admin
    request = admin.request_event()
    assert admin.wait_event(request, 0.2) is None
    assert controller.failure is None
    threshold = admin.get_feature(nvme.Feature.TEMPERATURE_THRESHOLD)
    admin.set_feature(nvme.Feature.ASYNC_EVENTS, 0xFF)
    admin.set_feature(nvme.Feature.TEMPERATURE_THRESHOLD, 200)
    event = admin.wait_event(request, 10.0)
    assert event is not None
    assert str(event) == "health: temperature threshold crossed"
    assert admin.smart_log()["critical_warning"] & 2
    admin.set_feature(nvme.Feature.TEMPERATURE_THRESHOLD, threshold)


def test_bus_mastering_taken_away_is_a_timeout(device: vfiopy.Device) -> None:
    with nvme.Controller(device) as controller:
        device.bus_master = False
        with pytest.raises(nvme.NvmeTimeoutError):
            controller.queues[0].execute(commands.flush(1), timeout=0.3)


def test_memory_decode_off_is_an_error_not_a_crash(device: vfiopy.Device) -> None:
    before = in_use(device)
    controller = nvme.Controller(device)
    device.memory_enabled = False
    with pytest.raises(vfiopy.DeviceGoneError):
        controller.namespace(1)
    with pytest.raises(vfiopy.DeviceGoneError):
        controller.close()
    assert not controller
    assert not device.bus_master
    assert in_use(device) == before
    device.memory_enabled = True
    with nvme.Controller(device) as again:
        assert again.namespace(1).read(0, 1).nbytes == 512


def test_failed_bring_up_leaves_nothing(device: vfiopy.Device) -> None:
    before = in_use(device)
    with pytest.raises(vfiopy.NotSupportedError, match="no msi interrupt"):
        nvme.Controller(device, interrupts="msi")
    assert in_use(device) == before
    assert not device.bus_master
    with nvme.Controller(device, queues=0) as controller:
        assert controller.queues == ()


def test_closing_gives_the_device_back_in_order(
    address: str, road: str, kernel_disk: Callable[[str], Path]
) -> None:
    with vfiopy.bind(address):
        for turn in range(2):
            with vfiopy.open(address, backend=road) as device:
                controller = nvme.Controller(device)
                controller.namespace(1).write(ZONE // 512, noise(4096, turn))
                controller.close()
                controller.close()
                assert not device.bars[0].read32(0x14) & 1
                assert not device.bus_master
                assert in_use(device)["mappings"] == 0
    assert kernel_reads(kernel_disk(address), ZONE, 4096) == noise(4096, 1)

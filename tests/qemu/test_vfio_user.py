"""A real QEMU, without a guest, uses our served devices as its hardware (vfio-user-pci)."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from _lab.qemu import Qemu
from emulated_support import Everything, Patchwork, wait_for
from qtest import PLAIN, SHARED, Machine

import vfiopy
from vfiopy.emulated import Edu, PciDevice
from vfiopy.emulated.nvme import Namespace, Nvme

ROOT = Path(__file__).resolve().parents[2]
SLOT = (0, 5)
BAR0, BAR2 = 0xE000_0000, 0xE010_0000
MEMORY_AND_BUS_MASTER = 6
SOURCE, DESTINATION, COUNT, COMMAND = 0x80, 0x88, 0x90, 0x98
MESSAGE = 0x30_0000  # an "interrupt controller" that is plain memory: what arrives can be read
PAGE = 4096


class Bench:
    """Devices behind servers, and machines that have them."""

    def __init__(self, qemu: Qemu, folder: Path, stack: ExitStack) -> None:
        self.qemu, self.folder, self.stack = qemu, folder, stack
        self.machine: Machine

    def serve(self, device: PciDevice, name: str = "device") -> vfiopy.vfio_user.Server:
        server = self.stack.enter_context(vfiopy.serve(device, self.folder / f"{name}.sock"))
        server.start()
        return server

    def boot(self, server: vfiopy.vfio_user.Server, *more: str, memory: tuple[str, ...] = PLAIN) -> Machine:
        option = json.loads(server.qemu_option) | {"addr": "5"}
        arguments = [*memory, *more, "-device", json.dumps(option)]
        self.machine = self.stack.enter_context(Machine(self.qemu, self.folder, arguments))
        return self.machine

    def switch_on(self, bars: dict[int, int], where: tuple[int, int] = SLOT) -> None:
        for register, address in bars.items():
            self.machine.set_config(where, 0x10 + 4 * register, address)
        self.machine.set_config(where, 4, MEMORY_AND_BUS_MASTER, 2)


@pytest.fixture
def bench(qemu: Qemu) -> Iterator[Bench]:
    with tempfile.TemporaryDirectory(prefix="vfiopy-") as folder, ExitStack() as stack:
        yield Bench(qemu, Path(folder), stack)


@pytest.fixture(params=[PLAIN, SHARED], ids=["messages", "shared memory"])
def edu(bench: Bench, request: pytest.FixtureRequest) -> tuple[Machine, Edu]:
    card = Edu(delay=(0.0, 0.001))
    machine = bench.boot(bench.serve(card), memory=request.param)
    bench.switch_on({0: BAR0})
    return machine, card


def test_qemu_finds_the_device_and_places_its_bar(bench: Bench) -> None:
    machine = bench.boot(bench.serve(Edu()))
    assert machine.config(SLOT, 0) == 0x11E81234
    assert machine.config(SLOT, 8) == 0x00FF0010
    machine.set_config(SLOT, 0x10, 0xFFFF_FFFF)
    assert machine.config(SLOT, 0x10) == 0xFFF0_0000
    bench.switch_on({0: BAR0})
    assert machine.config(SLOT, 0x10) == BAR0
    assert machine.read(BAR0) == 0x010000ED


def test_registers_and_posted_writes(edu: tuple[Machine, Edu]) -> None:
    machine, _ = edu
    for value in range(100):
        machine.write(BAR0 + 4, value)
    assert machine.read(BAR0 + 4) == 0xFFFF_FFFF - 99
    machine.write(BAR0 + 8, 10)
    wait_for(lambda: not machine.read(BAR0 + 0x20) & 1)
    assert machine.read(BAR0 + 8) == 3628800


def dma(machine: Machine, source: int, destination: int, count: int, command: int) -> None:
    for register, value in ((SOURCE, source), (DESTINATION, destination), (COUNT, count), (COMMAND, command)):
        machine.write(BAR0 + register, value, 8)
    wait_for(lambda: not machine.read(BAR0 + COMMAND, 8) & 1)


def test_dma_both_ways(edu: tuple[Machine, Edu]) -> None:
    machine, card = edu
    data = bytes(number * 7 & 0xFF for number in range(1000))
    machine.set_memory(0x10_0000, data)
    dma(machine, 0x10_0000, 0x40000, 1000, 1)
    dma(machine, 0x40000, 0x20_0FFF, 1000, 3)  # across a page
    assert machine.memory(0x20_0FFF, 1000) == data
    assert machine.memory(0x20_0FFE, 1) == machine.memory(0x20_0FFF + 1000, 1) == b"\0"
    dma(machine, 0x0FE0_0000, 0x40000, 4, 1)  # no memory there
    assert [fault.iova for fault in card.faults] == [0x0FE0_0000]


def test_an_msi_arrives(edu: tuple[Machine, Edu]) -> None:
    machine, card = edu
    machine.set_config(SLOT, 0x44, MESSAGE)
    machine.set_config(SLOT, 0x48, 0)
    machine.set_config(SLOT, 0x4C, 0x4321, 2)
    machine.set_config(SLOT, 0x42, machine.config(SLOT, 0x42, 2) | 1, 2)
    wait_for(lambda: card.config.msi_enabled)
    machine.write(BAR0 + 0x60, 1)
    wait_for(lambda: machine.memory(MESSAGE, 2) == b"\x21\x43")


def test_msix_and_a_mapped_bar(bench: Bench) -> None:
    device = Everything()
    machine = bench.boot(bench.serve(device))
    bench.switch_on({0: BAR0, 2: BAR2, 3: 0})
    assert machine.read(BAR0 + 8) == 0x5566_7788
    machine.write(BAR2 + 0x10, 0xDEAD_BEEF)
    assert device.memories[2].view[0x10:0x14] == b"\xef\xbe\xad\xde"
    device.memories[2].view[0x1000:0x1004] = b"1234"
    assert machine.read(BAR2 + 0x1000) == int.from_bytes(b"1234", "little")
    control = next(offset for offset in capabilities(machine) if machine.config(SLOT, offset, 1) == 0x11) + 2
    entry = BAR2 + 0x2000 + 16 * 3
    for offset, value in ((0, MESSAGE), (4, 0), (8, 0xABCD), (12, 0)):
        machine.write(entry + offset, value)
    machine.set_config(SLOT, control, 0x8000, 2)
    wait_for(lambda: device.config.msix_enabled)
    device.interrupt(3)
    wait_for(lambda: machine.memory(MESSAGE, 2) == b"\xcd\xab")
    assert all(access[1] == 0 for access in device.accesses)  # BAR 2 has no handlers


def test_a_bar_that_is_mapped_in_parts(bench: Bench) -> None:
    device = Patchwork()
    machine = bench.boot(bench.serve(device))
    bench.switch_on({2: BAR2})
    machine.write(BAR2 + 0x1010, 0xDEAD_BEEF)
    machine.write(BAR2 + 0x6FFC, 0x1234_5678)
    assert machine.read(BAR2 + 0x1010) == 0xDEAD_BEEF
    assert device.memories[2].view[0x1010:0x1014] == b"\xef\xbe\xad\xde"
    assert device.memories[2].view[0x6FFC:0x7000] == b"\x78\x56\x34\x12"
    assert not device.accesses  # QEMU has them mapped
    machine.write(BAR2 + 0x20, 5, 2)
    assert machine.read(BAR2 + 0x3000) == 0x1234
    assert machine.read(BAR2 + 0x7FFC) == 0x1234
    wanted = [("write", 2, 0x20, 2, 5), ("read", 2, 0x3000, 4), ("read", 2, 0x7FFC, 4)]
    assert device.accesses == wanted


def capabilities(machine: Machine) -> Iterator[int]:
    offset = machine.config(SLOT, 0x34, 1)
    while offset:
        yield offset
        offset = machine.config(SLOT, offset + 1, 1)


def test_a_system_reset_resets_the_function(bench: Bench) -> None:
    device = Everything()
    machine = bench.boot(bench.serve(device))
    before = device.resets
    machine.qmp("system_reset")
    wait_for(lambda: device.resets > before)
    assert machine.config(SLOT, 0) == 0x00FE1B36


def test_shared_memory_is_mapped_once(bench: Bench) -> None:
    server = bench.serve(Edu())
    bench.boot(server, memory=SHARED)
    files = server._space.files
    assert len(files) == 1
    (window,) = files._windows.values()
    assert window.size == 128 << 20


def test_a_server_that_dies_and_one_that_is_added(bench: Bench) -> None:
    first = bench.serve(Edu())
    machine = bench.boot(first, "-device", "pcie-root-port,id=rp1,addr=6,chassis=1")
    bench.switch_on({0: BAR0})
    assert machine.read(BAR0) == 0x010000ED
    first.close()
    assert machine.read(BAR0) == 0xFFFF_FFFF
    machine.write(BAR0 + 4, 1)
    assert machine.read(BAR0 + 4) == 0xFFFF_FFFF
    assert machine.qmp("query-status")["status"]  # it lives
    second = bench.serve(Edu(), "second")
    machine.qmp("device_add", **json.loads(second.qemu_option), bus="rp1", id="second")
    port, behind = (0, 6), (1, 0)
    machine.set_config(port, 0x18, 0x00010100)
    machine.set_config(port, 0x20, 0xE0F0_E000)  # its memory window
    machine.set_config(port, 4, MEMORY_AND_BUS_MASTER, 2)
    wait_for(lambda: machine.config(behind, 0) == 0x11E81234)
    bench.switch_on({0: 0xE000_0000 + (2 << 20)}, behind)
    machine.write(BAR0 + (2 << 20) + 4, 0x12345678)
    assert machine.read(BAR0 + (2 << 20) + 4) == 0xEDCBA987


def test_a_server_that_is_killed_with_work_to_do(bench: Bench) -> None:
    """What is unread in its socket then must not end QEMU, nor the guest."""
    path = bench.folder / "edu.sock"
    command = [sys.executable, "-m", "vfiopy", "serve", "edu", "--socket", str(path)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL) as process:
        try:
            wait_for(path.exists, timeout=20)
            option = {"driver": "vfio-user-pci", "addr": "5", "socket": {"path": str(path), "type": "unix"}}
            arguments = [*PLAIN, "-device", json.dumps(option)]
            machine = bench.machine = bench.stack.enter_context(Machine(bench.qemu, bench.folder, arguments))
            bench.switch_on({0: BAR0})
            assert machine.read(BAR0) == 0x010000ED
            process.send_signal(signal.SIGSTOP)
            for value in range(10):
                machine.write(BAR0 + 4, value)
        finally:
            process.kill()
    assert machine.read(BAR0) == 0xFFFF_FFFF
    assert machine.qmp("query-status")["running"]


def test_a_machine_that_is_killed_leaves_the_server_ready(bench: Bench) -> None:
    card = Edu()
    server = bench.serve(card)
    machine = bench.boot(server, memory=SHARED)
    machine.process.kill()
    wait_for(lambda: not server.connected)
    assert len(server._space.book) == 0
    with vfiopy.open(f"vfio-user:{server.path}") as device:
        assert device.bars[0].read32(0) == 0x010000ED


def test_no_complaints(bench: Bench) -> None:
    machine = bench.boot(bench.serve(Edu()), memory=SHARED)
    bench.switch_on({0: BAR0})
    machine.read(BAR0)
    machine.qmp("system_reset")
    machine.read(BAR0)
    assert machine.said() == ""


@pytest.mark.parametrize("memory", [PLAIN, SHARED], ids=["messages", "shared memory"])
def test_an_nvme_controller_identifies_itself(bench: Bench, memory: tuple[str, ...]) -> None:
    """Its registers by messages, its queues and data by DMA, its completion by MSI-X."""
    disk = Nvme([Namespace.memory(1 << 20)], serial="over-a-socket")
    bench.stack.callback(disk.close)
    machine = bench.boot(bench.serve(disk), memory=memory)
    table = next(offset for offset in capabilities(machine) if machine.config(SLOT, offset, 1) == 0x11)
    where = machine.config(SLOT, table + 4)
    bench.switch_on({0: BAR0, 1: 0, where & 7: BAR2})
    for offset, value in ((0, MESSAGE), (4, 0), (8, 0x77), (12, 0)):
        machine.write(BAR2 + (where & ~7) + offset, value)
    machine.set_config(SLOT, table + 2, 0x8000, 2)
    assert machine.read(BAR0 + 8) >> 16 == 2  # VS: a controller of NVMe 2
    submissions, completions, data = 0x10_0000, 0x10_1000, 0x10_2000
    machine.write(BAR0 + 0x24, 0x0007_0007)  # AQA: 8 entries each
    for register, address in ((0x28, submissions), (0x30, completions)):
        machine.write(BAR0 + register, address)
        machine.write(BAR0 + register + 4, 0)
    machine.write(BAR0 + 0x14, 0x0046_0001)  # CC: entries of 64 and 16 bytes, enable
    wait_for(lambda: machine.read(BAR0 + 0x1C) == 1)
    identify = bytearray(64)
    identify[0], identify[2], identify[40] = 6, 0x21, 1  # opcode, command id, CNS: the controller
    identify[24:32] = data.to_bytes(8, "little")
    machine.set_memory(submissions, bytes(identify))
    machine.write(BAR0 + 0x1000, 1)  # the admin queue's tail
    wait_for(lambda: machine.memory(MESSAGE, 1) == b"\x77")
    assert machine.memory(completions + 12, 4) == b"\x21\0\1\0"  # command id, phase, success
    assert machine.memory(data + 4, 20).rstrip() == b"over-a-socket"

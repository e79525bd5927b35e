"""The emulated NVMe controller under our own driver: bring-up, queues, data, shutdown."""

from __future__ import annotations

import os
import time

import numpy as np
import pytest
from emulated_support import read32, wait_for, write32
from nvme_support import driven, noise, refused
from ways import WAYS, reach

import vfiopy
from vfiopy import emulated
from vfiopy.drivers import nvme
from vfiopy.drivers.nvme import commands
from vfiopy.drivers.nvme.signals import VectorSignal
from vfiopy.emulated.nvme import Namespace, Nvme
from vfiopy.errors import VfioTimeoutError
from vfiopy.nvme_spec import registers as reg
from vfiopy.nvme_spec.status import Code

both_ways = pytest.mark.parametrize("way", WAYS)


# --- what it is ------------------------------------------------------------------------------------------------------


def test_it_opens_by_name() -> None:
    with vfiopy.open("emulated:nvme") as device, nvme.Controller(device) as controller:
        assert controller.namespace(1).info.size == 64 << 20
        assert controller.interrupts == "msix"
        assert controller.info.version == "2.0"


@both_ways
def test_it_says_what_it_is(way: str) -> None:
    disk = Nvme({1: Namespace.memory(1 << 20), 3: Namespace.memory(4 << 20, block_size=4096)}, serial="S1", mdts=5)
    with driven(disk, way) as (_, controller):
        info = controller.info
        assert (info.serial, info.model) == ("S1", "vfiopy emulated NVMe controller")
        assert info.subsystem_name.startswith("nqn.2014-08.org.nvmexpress:uuid:")
        assert controller.max_transfer == 128 << 10
        assert info.capacity == 5 << 20
        assert [(one.nsid, one.block_size, one.blocks) for one in controller.namespaces()] == [
            (1, 512, 2048),
            (3, 4096, 1024),
        ]
        # 2 exists, and is not active; 33 does not
        assert controller.admin.identify_namespace(2).blocks == 0
        assert refused(controller, commands.identify(0, 33), controller.device.dma.allocate(4096)) == (
            Code.INVALID_NAMESPACE
        )


def test_namespaces_have_identities_that_last() -> None:
    found = []
    for serial in ("A", "A", "B"):
        with driven(Nvme(serial=serial)) as (_, controller):
            found.append(controller.admin.identify(3, 1)[:25])
    assert found[0] == found[1] != found[2]
    assert found[0][:2] == b"\3\x10"  # a UUID
    assert found[0][20:25] == b"\4\1\0\0\0"  # the NVM command set


@pytest.mark.parametrize(("cns", "code"), [(0x04, Code.INVALID_FIELD), (0xFF, Code.INVALID_FIELD)])
def test_identify_of_what_it_does_not_have(cns: int, code: int) -> None:
    with driven() as (_, controller):
        assert refused(controller, commands.identify(cns, 1), controller.device.dma.allocate(4096)) == code


def test_the_lists_of_command_sets() -> None:
    with driven() as (_, controller):
        every = nvme.Command("sets", 0x06, cdw10=0xFFFF << 16 | 0x1C)
        buffer = controller.device.dma.allocate(4096)
        controller.admin.execute(every, buffer)
        assert buffer.tobytes() == b"\1" + bytes(4095)
        assert refused(controller, nvme.Command("sets", 0x06, cdw10=7 << 16 | 0x1C), buffer) == Code.INVALID_FIELD
        controller.admin.execute(nvme.Command("active", 0x06, cdw10=7), buffer)
        assert buffer.tobytes() == b"\1" + bytes(4095)
        other = nvme.Command("key value", 0x06, 1, cdw10=5, cdw11=1 << 24)
        assert refused(controller, other, buffer) == Code.INVALID_COMMAND_SET
        controller.admin.execute(nvme.Command("ready", 0x06, 1, cdw10=8), buffer)
        assert buffer[14] == 1


# --- data ------------------------------------------------------------------------------------------------------------


@both_ways
@pytest.mark.parametrize("block_size", [512, 4096])
@pytest.mark.parametrize("interrupts", ["msix", "intx", "polling"])
def test_data_go_to_and_fro(way: str, block_size: int, interrupts: str) -> None:
    disk = Nvme([Namespace.memory(8 << 20, block_size=block_size)])
    with driven(disk, way, interrupts=interrupts) as (_, controller):
        space = controller.namespace(1)
        data = noise(3 << 20)
        space.write(7, data)
        space.flush()
        assert (space.read(7, len(data) // block_size) == data).all()
        assert not space.read(0, 7).any()
        space.write_zeroes(8, 2)
        assert not space.read(8, 2).any()
        assert (space.read(7, 1) == data[:block_size]).all()
        space.deallocate((10, 1), (12, 2))
        assert not space.read(12, 2).any()
        assert (space.read(11, 1) == data[4 * block_size : 5 * block_size]).all()


def test_messages_by_msi() -> None:
    with driven(Nvme(messages="msi"), interrupts="msi", queues=2) as (_, controller):
        controller.namespace(1).write(0, noise(4096))
        assert (controller.namespace(1).read(0, 8) == noise(4096)).all()


@both_ways
def test_slow_commands_complete_out_of_order(way: str) -> None:
    with driven(Nvme(delay=(0.0, 0.003), seed=3), way, depth=32) as (_, controller):
        space = controller.namespace(1)
        buffers = [controller.device.dma.allocate(512) for _ in range(16)]
        for lba in range(16):
            space.write(lba, noise(512, lba))
        requests = [
            controller.queues[0].submit(commands.read(1, lba, 1), buffer) for lba, buffer in enumerate(buffers)
        ]
        for request in requests:
            request.wait()
        assert all((buffer == noise(512, lba)).all() for lba, buffer in enumerate(buffers))


def test_compare_and_verify() -> None:
    with driven(clean=False) as (disk, controller):
        space, queue = controller.namespace(1), controller.queues[0]
        data = noise(8192)
        space.write(0, data)
        with controller.device.dma.allocate(8192) as buffer:
            buffer[:] = data
            queue.execute(blocks(0x05, 0, 16), buffer)
            buffer[8191] ^= 1
            assert refused(controller, blocks(0x05, 0, 16), buffer, io=True) == Code.COMPARE_FAILURE
            assert refused(controller, blocks(0x05, 131072, 1), buffer[:512], io=True) == Code.LBA_OUT_OF_RANGE
        assert disk.logs.media_errors == 0
        queue.execute(blocks(0x0C, 0, 4096))  # more than a command could move
        assert refused(controller, blocks(0x0C, 131071, 2), io=True) == Code.LBA_OUT_OF_RANGE
        os.ftruncate(disk.namespaces[1].backing.fd, 3 << 20)
        assert refused(controller, blocks(0x0C, 4096, 4096), io=True) == Code.UNRECOVERED_READ_ERROR
        queue.execute(blocks(0x0C, 2048, 4096))


def blocks(opcode: int, lba: int, count: int) -> nvme.Command:
    return nvme.Command(f"{opcode:#x}", opcode, 1, cdw10=lba, cdw12=count - 1)


@pytest.mark.parametrize("messages", ["msi", None])
def test_masked_interrupts(messages: str | None) -> None:
    with driven(Nvme(messages=messages)) as (_, controller):
        registers, queue = controller.device.bars[0], controller.queues[0]
        registers.write32(reg.INTMS, 0xFFFF_FFFF)
        request = queue.submit(commands.flush(1))
        wait_for(lambda: queue.completions.poll(0.0))
        assert isinstance(queue.signal, VectorSignal)
        vector = queue.signal._vector
        with pytest.raises(VfioTimeoutError):
            vector.wait(timeout=0.05)
        registers.write32(reg.INTMC, 0xFFFF_FFFF)
        vector.wait(timeout=5.0)
        if messages is None:  # INTx is masked once it is signalled; the driver's own wait would undo that
            controller.device.irqs.intx.unmask()
        request.wait()
        assert queue.missed_interrupts == 0
        controller.namespace(1).flush()


IO_REFUSALS = [
    (commands.read(1, 2048, 1), Code.LBA_OUT_OF_RANGE),
    (commands.read(1, 2047, 2), Code.LBA_OUT_OF_RANGE),
    (commands.read(1, (1 << 64) - 1, 1), Code.LBA_OUT_OF_RANGE),
    (commands.write(1, 2048, 1), Code.LBA_OUT_OF_RANGE),
    (commands.write_zeroes(1, 2048, 1), Code.LBA_OUT_OF_RANGE),
    (commands.read(2, 0, 1), Code.INVALID_NAMESPACE),
    (commands.flush(7), Code.INVALID_NAMESPACE),
    (nvme.Command("unknown", 0x55, 1), Code.INVALID_OPCODE),
    (commands.read(1, 0, 257), Code.INVALID_FIELD),  # more than MDTS
]


@pytest.mark.parametrize(("command", "code"), IO_REFUSALS, ids=lambda value: getattr(value, "name", None))
def test_io_commands_that_are_refused(command: nvme.Command, code: int) -> None:
    with driven(Nvme([Namespace.memory(1 << 20)], mdts=5)) as (disk, controller):
        before = disk.logs.error_count
        assert refused(controller, command, controller.device.dma.allocate(4096), io=True) == code
        assert disk.logs.error_count == before + 1
        assert controller.admin.identify_controller()  # and it lives on


@both_ways
def test_data_that_are_not_mapped(way: str) -> None:
    with driven(None, way, clean=False) as (disk, controller):
        command = nvme.Command("Read", 0x02, 1, prp1=0x1234_0000)
        assert refused(controller, command, io=True) == Code.DATA_TRANSFER_ERROR
        assert disk.faults[0].iova == 0x1234_0000
        assert not disk.errors


# --- queues ----------------------------------------------------------------------------------------------------------


def queue_refusals() -> list[tuple[nvme.Command, int]]:
    create_cq, create_sq = commands.create_cq, commands.create_sq
    page = 0x10000
    return [
        (create_cq(0, 16, page, 0), Code.INVALID_QUEUE_ID),
        (create_cq(5, 16, page, 0), Code.INVALID_QUEUE_ID),
        (create_cq(1, 16, page, 0), Code.INVALID_QUEUE_ID),  # it exists
        (create_cq(2, 1, page, 0), Code.INVALID_QUEUE_SIZE),
        (create_cq(2, 65, page, 0), Code.INVALID_QUEUE_SIZE),
        (create_cq(2, 16, page, 5), Code.INVALID_INTERRUPT_VECTOR),
        (create_cq(2, 16, page + 64, 0), Code.PRP_OFFSET_INVALID),
        (nvme.Command("scattered", 0x05, cdw10=15 << 16 | 2, prp1=page), Code.INVALID_FIELD),
        (create_sq(0, 16, page, 1), Code.INVALID_QUEUE_ID),
        (create_sq(5, 16, page, 1), Code.INVALID_QUEUE_ID),
        (create_sq(1, 16, page, 1), Code.INVALID_QUEUE_ID),  # it exists
        (create_sq(2, 16, page, 0), Code.INVALID_QUEUE_ID),
        (create_sq(2, 16, page, 5), Code.INVALID_QUEUE_ID),
        (create_sq(2, 16, page, 3), Code.CQ_INVALID),
        (create_sq(2, 1, page, 1), Code.INVALID_QUEUE_SIZE),
        (create_sq(2, 65, page, 1), Code.INVALID_QUEUE_SIZE),
        (create_sq(2, 16, page + 64, 1), Code.PRP_OFFSET_INVALID),
        (nvme.Command("scattered", 0x01, cdw10=15 << 16 | 2, cdw11=1 << 16, prp1=page), Code.INVALID_FIELD),
        (commands.delete_sq(0), Code.INVALID_QUEUE_ID),
        (commands.delete_sq(2), Code.INVALID_QUEUE_ID),
        (commands.delete_cq(0), Code.INVALID_QUEUE_ID),
        (commands.delete_cq(2), Code.INVALID_QUEUE_ID),
        (commands.delete_cq(1), Code.INVALID_QUEUE_DELETION),
        (nvme.Command("unknown", 0x55), Code.INVALID_OPCODE),
    ]


def test_queue_commands_that_are_refused() -> None:
    with driven(Nvme(queues=4, entries=64)) as (disk, controller):
        for command, code in queue_refusals():
            assert refused(controller, command) == code, command
        assert set(disk.queues.submissions) == set(disk.queues.completions) == {0, 1}
        assert controller.namespace(1).read(0, 1).size == 512


def test_more_commands_than_completions_fit() -> None:
    """A completion queue that nobody empties stops its submission queues, and nothing is lost."""
    with driven(Nvme(), depth=4, interrupts="polling") as (_, controller):
        big = controller.device.dma.allocate(64, nvme_sqe(), alignment=4096)
        controller.admin.execute(commands.create_sq(2, 64, big.iova, 1))
        for number in range(40):
            big[number]["opcode"], big[number]["cid"], big[number]["nsid"] = 0, 100 + number, 1
        controller.device.bars[0].write32(reg.doorbell(2, 4, completion=False), 40)
        queue, seen = controller.queues[0], []
        for _ in range(40):
            wait_for(lambda: (one := queue.completions.take()) is not None and not seen.append(one.cid))
            controller.device.bars[0].write32(reg.doorbell(1, 4, completion=True), queue.completions.head)
        assert seen == list(range(100, 140))
        controller.admin.execute(commands.delete_sq(2))
        big.free()


def nvme_sqe() -> np.dtype[np.void]:
    from vfiopy.nvme_spec.structures import SQE  # noqa: PLC0415

    return SQE


# --- registers, reset, shutdown --------------------------------------------------------------------------------------


@both_ways
def test_registers(way: str) -> None:
    with reach(Nvme(stride=2, entries=256, ready_seconds=3.0), way) as io:
        cap = int.from_bytes(io.read(0, reg.CAP, 8), "little")
        found = reg.Capabilities.decode(cap)
        assert (found.queue_entries, found.doorbell_stride, found.ready_timeout) == (256, 16, 3.0)
        assert (found.contiguous_queues, found.page_min, found.page_max) == (True, 4096, 65536)
        assert (found.has_nvm_commands, found.ready_modes, found.memory_buffer) == (True, 1, False)
        assert read32(io, reg.VS) == 0x20000
        assert read32(io, reg.CRTO) == 6
        io.write(0, reg.ASQ, (0x1234_5678_9ABC_DEF0).to_bytes(8, "little"))
        assert io.read(0, reg.ASQ, 8) == (0x1234_5678_9ABC_D000).to_bytes(8, "little")
        write32(io, reg.INTMS, 0b110)
        write32(io, reg.INTMC, 0b010)
        assert read32(io, reg.INTMS) == read32(io, reg.INTMC) == 0b100
        write32(io, reg.CAP, 0)
        assert io.read(0, reg.CAP, 8) == cap.to_bytes(8, "little")


@pytest.mark.parametrize(
    ("control", "aqa"), [(0x460011, 0x1F001F), (0x460281 | 5 << 7, 0x1F001F), (0x460801, 0x1F001F), (0x460001, 0)]
)
def test_a_configuration_that_it_cannot_have_is_fatal(control: int, aqa: int) -> None:
    disk = Nvme()
    with emulated.connect(disk)[0] as io:
        write32(io, reg.AQA, aqa)
        write32(io, reg.CC, control)
        wait_for(lambda: read32(io, reg.CSTS) & reg.CSTS_CFS)
        assert not read32(io, reg.CSTS) & reg.CSTS_RDY
        write32(io, reg.CC, 0)
        wait_for(lambda: not read32(io, reg.CSTS))
    assert disk.errors


def test_queues_out_of_reach_are_fatal() -> None:
    with driven(clean=False) as (disk, controller):
        controller.admin.execute(commands.create_cq(2, 16, 0x7000_0000, None))
        controller.admin.execute(commands.create_sq(2, 16, 0x7000_1000, 2))
        registers = controller.device.bars[0]
        registers.write32(reg.doorbell(2, 4, completion=False), 1)
        wait_for(lambda: registers.read32(reg.CSTS) & reg.CSTS_CFS)
        assert "out of reach" in disk.errors[0].text
        controller.reset()
        assert controller.namespace(1).read(0, 1).size == 512


@both_ways
def test_reset_in_the_middle_of_commands(way: str) -> None:
    with driven(Nvme(), way) as (disk, controller):
        disk.inject(admin=False, opcode=2, delay=0.1, count=20)
        buffer = controller.device.dma.allocate(4096)
        requests = [controller.queues[0].submit(commands.read(1, lba, 1), buffer[:512]) for lba in range(20)]
        controller.reset()
        assert all(request.done for request in requests)
        buffer[:] = 0xAA
        controller.namespace(1).write(0, noise(4096))
        assert (controller.namespace(1).read(0, 8) == noise(4096)).all()
        time.sleep(0.15)
        assert (buffer == 0xAA).all(), "DMA after the reset"


def test_function_reset() -> None:
    with driven() as (_, controller):
        controller.namespace(1).write(0, noise(512))
        controller.reset(function=True)
        assert (controller.namespace(1).read(0, 1) == noise(512)).all()


def test_a_shutdown_that_is_announced_and_one_that_is_not() -> None:
    disk = Nvme()
    with driven(disk):
        pass
    assert (disk.logs.power_cycles, disk.logs.unsafe_shutdowns) == (1, 0)
    with vfiopy.open(disk) as device, nvme.Controller(device) as controller:
        controller.fail("as if power were lost")
    assert (disk.logs.power_cycles, disk.logs.unsafe_shutdowns) == (2, 1)


# --- settings -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"serial": "x" * 21}, {"serial": "ü"}, {"queues": 0}, {"entries": 1}, {"mdts": 16}, {"stride": 9},
        {"memory_buffer": 5000}, {"memory_buffer": 1 << 32}, {"most_namespaces": 0},
        {"messages": "both"}, {"event_requests": 0}, {"interrupt_pin": 5},
    ],
)  # fmt: skip
def test_settings_out_of_range(options: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        Nvme(**{"serial": "S", **options})  # type: ignore[arg-type]


def test_namespaces_out_of_range() -> None:
    with pytest.raises(ValueError, match="identifiers 1 to 32, not 33"):
        Nvme({33: Namespace.memory(4096)})
    with pytest.raises(ValueError, match="512 or 4096 bytes, not 520"):
        Namespace.memory(5200, block_size=520)

"""What the emulated NVMe controller does wrong when it is told to."""

from __future__ import annotations

import time

import pytest
from emulated_support import wait_for
from nvme_support import driven, noise, refused

from vfiopy.drivers import nvme
from vfiopy.drivers.nvme import commands
from vfiopy.emulated.nvme import Nvme
from vfiopy.nvme_spec import registers as reg
from vfiopy.nvme_spec.opcodes import AdminOpcode, IoOpcode
from vfiopy.nvme_spec.status import Code


def test_a_status() -> None:
    with driven() as (disk, controller):
        space = controller.namespace(1)
        space.write(0, noise(512))
        rule = disk.inject(admin=False, opcode=IoOpcode.WRITE, status=Code.WRITE_FAULT, after=1, count=2)
        space.write(0, noise(512, 1))
        for _ in range(2):
            with pytest.raises(nvme.NvmeError, match="Write Fault"):
                space.write(0, noise(512, 2))
        assert (space.read(0, 1) == noise(512, 1)).all(), "a command that failed has written"
        space.write(0, noise(512, 3))
        assert rule.seen == 2
        assert not disk.inject.rules
        assert disk.logs.media_errors == 2


def test_bad_blocks() -> None:
    with driven() as (disk, controller):
        space = controller.namespace(1)
        rule = disk.inject(nsid=1, blocks=range(100, 102), status=Code.UNRECOVERED_READ_ERROR, count=None)
        for lba, count in ((99, 2), (100, 1), (101, 8), (0, 200)):
            with pytest.raises(nvme.NvmeError, match="Unrecovered Read Error"):
                space.read(lba, count)
        assert controller.admin.error_log(1)[0]["lba"] == 0
        for lba, count in ((0, 100), (102, 50)):
            space.read(lba, count)
        space.flush()
        disk.inject.rules.remove(rule)
        space.read(99, 4)


def test_admin_commands_too() -> None:
    with driven() as (disk, controller):
        disk.inject(admin=True, opcode=AdminOpcode.IDENTIFY, status=Code.INTERNAL_ERROR)
        buffer = controller.device.dma.allocate(4096)
        assert refused(controller, commands.identify(1), buffer) == Code.INTERNAL_ERROR
        controller.admin.identify_controller()


def test_a_delay() -> None:
    with driven() as (disk, controller):
        disk.inject(opcode=IoOpcode.FLUSH, admin=False, delay=0.1)
        begin = time.monotonic()
        controller.namespace(1).flush()
        assert time.monotonic() - begin > 0.09
        begin = time.monotonic()
        controller.namespace(1).flush()
        assert time.monotonic() - begin < 0.09


@pytest.mark.parametrize("how", ["drop", "hang"])
def test_a_command_that_never_ends(how: str) -> None:
    with driven() as (disk, controller):
        space = controller.namespace(1)
        disk.inject(opcode=IoOpcode.WRITE, admin=False, **{how: True})  # type: ignore[arg-type]
        with pytest.raises(nvme.NvmeTimeoutError):
            space.write(0, noise(512), timeout=0.1)
        controller.reset()
        assert (space.read(0, 1) == noise(512)).all() == (how == "drop")


def test_a_fatal_error() -> None:
    with driven(clean=False) as (disk, controller):
        disk.inject(opcode=IoOpcode.FLUSH, admin=False, fatal=True)
        with pytest.raises(nvme.NvmeTimeoutError, match="reports a fatal error"):
            controller.namespace(1).flush(timeout=0.1)
        controller.reset()
        controller.namespace(1).flush()
        disk.fail("by hand")
        assert controller.device.bars[0].read32(reg.CSTS) == reg.CSTS_CFS | reg.CSTS_RDY
        controller.reset()
        controller.namespace(1).flush()


def test_a_wrong_identifier() -> None:
    with driven() as (disk, controller):
        disk.inject(admin=False, cid=0x7777)
        with pytest.raises(nvme.CommandAbortedError, match="command 30583 of queue 1, which is not under way"):
            controller.namespace(1).flush()
        controller.reset()
        controller.namespace(1).flush()


def test_counters_of_all_devices() -> None:
    with driven(clean=False) as (disk, controller):
        space = controller.namespace(1)
        disk.inject.lost_interrupts = 1
        space.flush(timeout=0.2)
        assert controller.queues[0].missed_interrupts == 1
        disk.inject.lost_work = 1
        with pytest.raises(nvme.NvmeTimeoutError):
            space.flush(timeout=0.1)
        controller.reset()
        # the entry cannot be read: the queue is out of reach
        disk.inject.dma_faults = 1
        with pytest.raises(nvme.NvmeTimeoutError, match="reports a fatal error"):
            space.flush(timeout=0.1)
        wait_for(lambda: not disk.inject.dma_faults)
        controller.reset()
        space.flush()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "say what is to go wrong"),
        ({"opcode": 1}, "say what is to go wrong"),
        ({"status": 0}, "type << 8"),
        ({"status": 0x800}, "type << 8"),
        ({"cid": 1 << 16}, "16 bits"),
        ({"drop": True, "count": 0}, "count is at least 1"),
        ({"drop": True, "after": -1}, "not negative"),
        ({"delay": -1.0}, "not negative"),
    ],
)
def test_rules_that_mean_nothing(options: dict[str, object], message: str) -> None:
    disk = Nvme()
    with pytest.raises(ValueError, match=message):
        disk.inject(**options)  # type: ignore[arg-type]
    assert not disk.inject.rules

"""Shadow doorbells of the emulated NVMe controller."""

from __future__ import annotations

from typing import Any

import pytest
from emulated_support import wait_for
from nvme_support import RawQueue, driven, raw_queue
from ways import WAYS

from vfiopy.dma import DmaArray
from vfiopy.drivers import nvme
from vfiopy.nvme_spec import registers as reg

both_ways = pytest.mark.parametrize("way", WAYS)


class Shadow:
    """The host's end: a queue's doorbells are entries in memory, and registers only when EventIdx is passed."""

    def __init__(self, controller: nvme.Controller, queue: RawQueue, shadow: DmaArray, events: DmaArray) -> None:
        self.queue, self.shadow, self.events = queue, shadow, events
        self.rings = 0

    def _publish(self, index: int, value: int) -> bool:
        old, self.shadow[index] = int(self.shadow[index]), value
        event = int(self.events[index])
        return (value - event - 1) & 0xFFFF < (value - old) & 0xFFFF

    def submit(self, **fields: Any) -> None:
        if self._publish(2 * self.queue.number, self.queue.put(**fields)):
            self.rings += 1
            self.queue.ring()

    def wait(self) -> int:
        cid = self.queue.wait().cid
        if self._publish(2 * self.queue.number + 1, self.queue.completions.head):
            self.queue.take()
        return cid


@both_ways
def test_shadow_doorbells(way: str) -> None:
    with driven(None, way) as (_, controller):
        shadow, events = (controller.device.dma.allocate(1024, "<u4", alignment=4096) for _ in range(2))
        configure(controller, shadow.iova, events.iova)
        with raw_queue(controller) as queue:
            host = Shadow(controller, queue, shadow, events)
            for turn in range(5):
                for _ in range(13):
                    host.submit(opcode=0, nsid=1)
                assert [host.wait() for _ in range(13)] == [(13 * turn + number) % 16 for number in range(13)]
                wait_for(lambda: events[4] == queue.tail)
            assert host.rings >= 5


def test_a_busy_controller_is_not_rung() -> None:
    with driven() as (disk, controller):
        shadow, events = (controller.device.dma.allocate(1024, "<u4", alignment=4096) for _ in range(2))
        configure(controller, shadow.iova, events.iova)
        with raw_queue(controller) as queue:
            host = Shadow(controller, queue, shadow, events)
            with disk.lock:  # it is busy
                for _ in range(10):
                    host.submit(opcode=0, nsid=1)
            assert [host.wait() for _ in range(10)] == list(range(10))
            assert host.rings == 1
            shadow[4] = 16  # no tail of this queue's
            request = controller.admin.request_event()
            queue.ring(0)
            event = controller.admin.wait_event(request, 5.0)
            assert (event.type, event.information) == (0, 1)
            shadow[4] = queue.tail


def test_a_command_that_comes_while_the_controller_goes_to_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    with driven() as (disk, controller):
        shadow, events = (controller.device.dma.allocate(1024, "<u4", alignment=4096) for _ in range(2))
        configure(controller, shadow.iova, events.iova)
        with raw_queue(controller) as queue:
            host, expect = Shadow(controller, queue, shadow, events), disk._shadow._expect

            def late(index: int, value: int) -> None:
                if index == 4 and value == 1:
                    host.submit(opcode=0, nsid=1)  # EventIdx is still that of before: no ring
                expect(index, value)

            monkeypatch.setattr(disk._shadow, "_expect", late)
            host.submit(opcode=0, nsid=1)
            # nobody says what was taken: that would ring, too
            assert [queue.wait().cid, queue.wait().cid] == [0, 1]
            assert host.rings == 1


def test_shadow_doorbells_that_are_refused_or_out_of_reach() -> None:
    with driven(clean=False) as (disk, controller):
        table = controller.device.dma.allocate(1024, "<u4", alignment=4096)
        for shadow, events in ((table.iova + 64, table.iova), (table.iova, table.iova + 8)):
            with pytest.raises(nvme.NvmeError, match="Invalid Field"):
                configure(controller, shadow, events)
        with pytest.raises(nvme.NvmeError, match="Data Transfer Error"):
            configure(controller, 0x7000_0000, 0x7000_1000)
        configure(controller, table.iova, table.iova)
        table.free()
        controller.device.bars[0].write32(reg.doorbell(1, 4, completion=False), 1)
        wait_for(lambda: disk.registers.status & reg.CSTS_CFS)
        controller.reset()
        assert controller.namespace(1).read(0, 1).size == 512, "a reset ends shadow doorbells"


def configure(controller: nvme.Controller, shadow: int, events: int) -> None:
    """Doorbell Buffer Config; the driver's own queues have their doorbells there from then on."""
    queue = controller.admin.queue
    cid = queue._free.pop()
    command = nvme.Command("Doorbell Buffer Config", 0x7C)
    request = nvme.Request(queue, command, cid, None)
    tail = queue.submissions.put(command, cid, shadow, events)
    queue._inflight[cid] = request
    controller.device.bars[0].write32(reg.doorbell(0, 4, completion=False), tail)
    request.wait()

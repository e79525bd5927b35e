"""Features, log pages, asynchronous events and Abort of the emulated NVMe controller."""

from __future__ import annotations

import time

import numpy as np
import pytest
from emulated_support import wait_for
from nvme_support import driven, noise, raw_queue, refused
from ways import WAYS

from vfiopy.drivers import nvme
from vfiopy.drivers.nvme import commands
from vfiopy.emulated.nvme import Namespace, Nvme
from vfiopy.nvme_spec import registers as reg
from vfiopy.nvme_spec.opcodes import AdminOpcode, Feature, IoOpcode, LogPage
from vfiopy.nvme_spec.status import Code

both_ways = pytest.mark.parametrize("way", WAYS)
CURRENT, DEFAULT, SAVED, CAPABILITIES = range(4)
ALL = 0xFFFF_FFFF


# --- features ----------------------------------------------------------------------------------------------------


def test_a_feature_has_four_values() -> None:
    with driven() as (_, controller):
        admin, feature = controller.admin, Feature.ARBITRATION
        assert [admin.get_feature(feature, select=select) for select in range(4)] == [7, 7, 7, 0b101]
        admin.set_feature(feature, 0x01020303)
        assert [admin.get_feature(feature, select=select) for select in range(3)] == [0x01020303, 7, 7]
        controller.reset()
        assert admin.get_feature(feature) == 7
        admin.set_feature(feature, 2, save=True)
        controller.reset()
        assert [admin.get_feature(feature, select=select) for select in range(3)] == [2, 7, 2]
        assert refused(controller, commands.get_features(feature, select=4)) == Code.INVALID_FIELD


FEATURE_REFUSALS = [
    (commands.set_features(0x03, 0), Code.INVALID_FIELD),  # there is no such feature
    (commands.set_features(0x7F, 0), Code.INVALID_FIELD),
    (commands.get_features(0x7F), Code.INVALID_FIELD),
    (commands.set_features(Feature.ARBITRATION, 8), Code.INVALID_FIELD),
    (commands.set_features(Feature.POWER_MANAGEMENT, 1), Code.INVALID_FIELD),
    (commands.set_features(Feature.VOLATILE_WRITE_CACHE, 2), Code.INVALID_FIELD),
    (commands.set_features(Feature.NUMBER_OF_QUEUES, 0x10001), Code.COMMAND_SEQUENCE_ERROR),  # they exist
    (commands.set_features(Feature.NUMBER_OF_QUEUES, 0, save=True), Code.FEATURE_NOT_SAVEABLE),
    (commands.set_features(Feature.INTERRUPT_VECTOR, 17), Code.INVALID_FIELD),
    (commands.get_features(Feature.INTERRUPT_VECTOR, value=17), Code.INVALID_FIELD),
    (commands.set_features(Feature.TEMPERATURE_THRESHOLD, 1 << 16 | 300), Code.INVALID_FIELD),  # sensor 1
    (commands.set_features(Feature.TEMPERATURE_THRESHOLD, 2 << 20 | 300), Code.INVALID_FIELD),
    (commands.set_features(Feature.ASYNC_EVENTS, 1 << 30), Code.INVALID_FIELD),
    (commands.set_features(Feature.COMMAND_SET_PROFILE, 1), Code.COMMAND_SET_REJECTED),
    (commands.set_features(Feature.ARBITRATION, 1, nsid=1), Code.FEATURE_NOT_OF_NAMESPACE),
    (commands.set_features(Feature.ERROR_RECOVERY, 1), Code.INVALID_NAMESPACE),
    (commands.get_features(Feature.ERROR_RECOVERY, nsid=ALL), Code.INVALID_NAMESPACE),
]


@pytest.mark.parametrize(("command", "code"), FEATURE_REFUSALS)
def test_features_that_are_refused(command: nvme.Command, code: int) -> None:
    with driven() as (_, controller):
        assert refused(controller, command) == code
        assert controller.admin.error_log(1)[0]["parameter_location"] in (4, 40, 44, 46, 0xFFFF)


def test_a_feature_of_each_namespace() -> None:
    with driven(Nvme([Namespace.memory(4096), Namespace.memory(4096)])) as (_, controller):
        admin, feature = controller.admin, Feature.ERROR_RECOVERY
        admin.execute(commands.set_features(feature, 5, nsid=2))
        assert [admin.execute(commands.get_features(feature, nsid=nsid)) for nsid in (1, 2)] == [0, 5]
        admin.execute(commands.set_features(feature, 7, nsid=ALL, save=True))
        controller.reset()
        assert [admin.execute(commands.get_features(feature, nsid=nsid)) for nsid in (1, 2)] == [7, 7]


def test_number_of_queues() -> None:
    with driven(Nvme(queues=3), queues=0) as (_, controller):
        for wanted in (0, 0xFFFE, 0xFFFE << 16):
            assert controller.admin.set_feature(Feature.NUMBER_OF_QUEUES, wanted) == 0x20002
        for wanted in (0xFFFF, 0xFFFF << 16):
            command = commands.set_features(Feature.NUMBER_OF_QUEUES, wanted)
            assert refused(controller, command) == Code.INVALID_FIELD
        assert controller.admin.get_feature(Feature.NUMBER_OF_QUEUES) == 0x20002


@both_ways
def test_the_timestamp(way: str) -> None:
    with driven(None, way) as (_, controller):
        buffer = controller.device.dma.allocate(8)

        def get(select: int = CURRENT) -> tuple[int, int]:
            controller.admin.execute(commands.get_features(Feature.TIMESTAMP, select=select), buffer)
            return int.from_bytes(buffer[:6].tobytes(), "little"), int(buffer[6])

        assert get()[0] < 60_000
        assert get()[1] == 0
        buffer[:] = np.frombuffer((1_700_000_000_000).to_bytes(8, "little"), np.uint8)
        controller.admin.execute(commands.set_features(Feature.TIMESTAMP, 0), buffer)
        time.sleep(0.01)
        milliseconds, origin = get()
        assert 5 <= milliseconds - 1_700_000_000_000 < 60_000
        assert origin == 2
        assert get(DEFAULT) == (0, 0)


def test_without_a_write_cache_each_write_is_on_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    synced = []
    with driven() as (disk, controller):
        monkeypatch.setattr(disk.namespaces[1], "sync", lambda: synced.append(1))
        space = controller.namespace(1)
        space.write(0, noise(512))
        assert not synced
        space.write(0, noise(512), fua=True)
        assert len(synced) == 1
        controller.admin.set_feature(Feature.VOLATILE_WRITE_CACHE, 0)
        space.write(0, noise(512))
        space.write_zeroes(0, 1)
        assert len(synced) == 3
        space.flush()
        assert len(synced) == 4
        controller.queues[0].execute(commands.flush(ALL))
        assert len(synced) == 5


def test_interrupt_coalescing() -> None:
    with driven(queues=2) as (_, controller):
        space, (queue, other) = controller.namespace(1), controller.queues
        controller.admin.set_feature(Feature.INTERRUPT_COALESCING, 200 << 8 | 3)  # 20 ms, or more than 3
        controller.admin.set_feature(Feature.INTERRUPT_VECTOR, 1 << 16 | 2)  # not for vector 2
        assert controller.admin.get_feature(Feature.INTERRUPT_VECTOR, value=2) == 1 << 16 | 2
        assert controller.admin.get_feature(Feature.INTERRUPT_VECTOR, value=1) == 1
        begin = time.monotonic()
        space.flush(queue=queue)
        assert time.monotonic() - begin > 0.015, "the interrupt came at once"
        assert queue.missed_interrupts == 0
        begin = time.monotonic()
        for _ in range(5):
            space.flush(queue=other)
        assert time.monotonic() - begin < 0.05 * 5
        # four at once are enough
        controller.admin.set_feature(Feature.INTERRUPT_COALESCING, 255 << 8 | 3)
        begin = time.monotonic()
        requests = [queue.submit(commands.flush(1)) for _ in range(4)]
        for request in requests:
            request.wait()
        assert queue.missed_interrupts == 0


# --- log pages ---------------------------------------------------------------------------------------------------


def test_pages_that_there_are_and_commands() -> None:
    with driven() as (_, controller):
        admin = controller.admin
        pages = np.frombuffer(admin.log_page(LogPage.SUPPORTED, 1024), "<u4")
        assert np.flatnonzero(pages & 1).tolist() == [0, 1, 2, 3, 4, 5, 0x12]
        for page in np.flatnonzero(pages):
            assert admin.log_page(int(page), 512)
        effects = np.frombuffer(admin.log_page(LogPage.COMMAND_EFFECTS, 4096), "<u4")
        assert np.flatnonzero(effects[:256]).tolist() == sorted(AdminOpcode)
        assert np.flatnonzero(effects[256:512]).tolist() == sorted(IoOpcode)
        assert np.flatnonzero(effects[256:512] & 2).tolist() == [1, 8, 9]
        features = np.frombuffer(admin.log_page(LogPage.FEATURE_EFFECTS, 1024), "<u4")
        for number in np.flatnonzero(features & 1):
            admin.get_feature(int(number), select=CAPABILITIES)
        firmware = admin.log_page(LogPage.FIRMWARE, 512)
        assert (firmware[0], firmware[8:16]) == (1, b"1.0     ")


def test_parts_of_pages() -> None:
    with driven(Nvme(mdts=1)) as (_, controller):
        whole = controller.admin.log_page(LogPage.COMMAND_EFFECTS, 4096)
        assert controller.admin.log_page(LogPage.COMMAND_EFFECTS, 64, offset=1020) == whole[1020:1084]
        assert controller.admin.log_page(LogPage.COMMAND_EFFECTS, 16, offset=4096) == bytes(16)
        buffer = controller.device.dma.allocate(4096)
        for page, size, offset, code in (
            (LogPage.COMMAND_EFFECTS, 16, 4100, Code.INVALID_FIELD),
            (LogPage.COMMAND_EFFECTS, 16, 2, Code.INVALID_FIELD),
            (LogPage.COMMAND_EFFECTS, 16384, 0, Code.INVALID_FIELD),
            (0x70, 512, 0, Code.INVALID_LOG_PAGE),
        ):
            assert refused(controller, commands.get_log_page(page, size, offset=offset), buffer) == code
        command = commands.get_log_page(LogPage.SMART, 512, nsid=1)
        assert refused(controller, command, buffer) == Code.INVALID_FIELD


@both_ways
def test_smart_counts(way: str) -> None:
    with driven(None, way) as (_, controller):
        space = controller.namespace(1)
        space.write(0, noise(1 << 20))
        space.read(0, 100)
        log = controller.admin.smart_log()
        figures = {
            name: int.from_bytes(bytes(log[name]).ljust(16, b"\0"), "little")
            for name in ("data_units_read", "data_units_written", "host_read_commands", "host_write_commands")
        }
        assert figures == {
            "data_units_read": 1,
            "data_units_written": 3,
            "host_read_commands": 1,
            "host_write_commands": 1,
        }
        assert (log["composite_temperature"], log["available_spare"], log["critical_warning"]) == (310, 100, 0)


def test_the_error_log_has_the_newest_first() -> None:
    with driven() as (_, controller), raw_queue(controller) as queue:
        for lba in range(70):
            assert queue.run(opcode=2, nsid=1, cdw10=1 << 31, cdw12=lba % 256) == Code.LBA_OUT_OF_RANGE
        log = controller.admin.error_log(64)
        assert log["error_count"].tolist() == list(range(70, 6, -1))
        assert set(log["sqid"]) == {2}
        assert set(log["lba"]) == {1 << 31}
        assert log[0]["parameter_location"] == 40


# --- events ------------------------------------------------------------------------------------------------------


@both_ways
def test_a_wrong_doorbell_is_told_once_until_the_log_is_read(way: str) -> None:
    with driven(None, way, clean=False) as (disk, controller):
        admin, registers = controller.admin, controller.device.bars[0]
        requests = [admin.request_event() for _ in range(4)]
        assert refused(controller, commands.async_event_request()) == Code.EVENT_LIMIT_EXCEEDED
        registers.write32(reg.doorbell(9, 4, completion=False), 1)
        event = admin.wait_event(requests[0], 5.0)
        assert (event.type, event.information, event.log_page) == (0, 0, LogPage.ERRORS)
        for offset, value in (
            (reg.doorbell(1, 4, completion=False), 64),
            (reg.doorbell(1, 4, completion=True), 5),
        ):
            registers.write32(offset, value)
        assert admin.wait_event(requests[1], 0.05) is None, "not before the log was read"
        admin.log_page(LogPage.ERRORS, 64, keep=True)
        assert admin.wait_event(requests[1], 0.05) is None
        admin.log_page(LogPage.ERRORS, 64)
        event = admin.wait_event(requests[1], 5.0)
        assert (event.type, event.information) == (0, 1)
        assert len(disk.errors) == 3
        assert controller.namespace(1).read(0, 1).size == 512
        assert not requests[2].done
        assert admin.abort(requests[2])
        with pytest.raises(nvme.NvmeError, match="Command Abort Requested"):
            requests[2].wait()


@both_ways
def test_warnings_of_health(way: str) -> None:
    with driven(None, way) as (disk, controller):
        admin = controller.admin
        request = admin.request_event()
        disk.set_health(temperature=360)
        assert admin.wait_event(request, 0.05) is None, "nobody asked for it"
        assert admin.smart_log()["critical_warning"] == 2
        admin.set_feature(Feature.ASYNC_EVENTS, 0xF)
        event = admin.wait_event(request, 5.0)
        assert (event.type, event.information, event.log_page) == (1, 1, LogPage.SMART)
        request = admin.request_event()
        disk.set_health(spare=5, used=101)
        assert admin.wait_event(request, 0.05) is None
        log = admin.smart_log()
        assert (log["critical_warning"], log["available_spare"], log["percentage_used"]) == (3, 5, 101)
        event = admin.wait_event(request, 5.0)
        assert (event.type, event.information) == (1, 2)
        request = admin.request_event()
        admin.smart_log()
        admin.set_feature(Feature.TEMPERATURE_THRESHOLD, 370)
        assert admin.smart_log()["critical_warning"] == 1
        disk.set_health(spare=100, reliability_degraded=True)
        event = admin.wait_event(request, 5.0)
        assert (event.type, event.information) == (1, 0)
        admin.set_feature(Feature.TEMPERATURE_THRESHOLD, 1 << 20 | 365)  # too cold below that
        assert admin.smart_log()["critical_warning"] == 6


@pytest.mark.parametrize("what", [{"temperature": -1}, {"temperature": 1 << 16}, {"spare": 101}, {"used": 256}])
def test_health_that_the_log_cannot_say(what: dict[str, int]) -> None:
    with driven() as (disk, controller):
        with pytest.raises(ValueError, match=next(iter(what))):
            disk.set_health(**what)  # type: ignore[arg-type]
        assert controller.admin.smart_log()["critical_warning"] == 0


@both_ways
def test_namespaces_that_come_and_go(way: str) -> None:
    with driven(None, way) as (disk, controller):
        admin = controller.admin
        admin.set_feature(Feature.ASYNC_EVENTS, 1 << 8)
        request = admin.request_event()
        disk.set_namespace(5, Namespace.memory(1 << 20, block_size=4096))
        event = admin.wait_event(request, 5.0)
        assert (event.type, event.information, event.log_page) == (2, 0, LogPage.CHANGED_NAMESPACES)
        assert admin.active_namespaces() == [1, 5]
        changed = np.frombuffer(admin.log_page(LogPage.CHANGED_NAMESPACES, 4096), "<u4")
        assert changed[:2].tolist() == [5, 0]
        assert not any(admin.log_page(LogPage.CHANGED_NAMESPACES, 4096))
        assert controller.namespace(5).read(0, 256).size == 1 << 20
        old = disk.namespaces[1]
        disk.set_namespace(1, None)
        assert admin.active_namespaces() == [5]
        with pytest.raises(nvme.NvmeError, match="Invalid Namespace"):
            controller.queues[0].execute(commands.flush(1))
        old.close()
        with pytest.raises(ValueError, match="identifiers 1 to 32"):
            disk.set_namespace(40, Namespace.memory(4096))
        with pytest.raises(ValueError, match="no namespace 1 to take away"):
            disk.set_namespace(1, None)
        assert not any(admin.log_page(LogPage.CHANGED_NAMESPACES, 4096)[4:]), "1 was told, and nothing else"


# --- abort -------------------------------------------------------------------------------------------------------


def test_abort() -> None:
    with driven() as (disk, controller):
        disk.inject(admin=False, opcode=IoOpcode.FLUSH, hang=True)
        request = controller.queues[0].submit(commands.flush(1))
        wait_for(lambda: disk.queues.submissions[1].under_way)
        assert controller.admin.abort(request)
        with pytest.raises(nvme.NvmeError, match="Command Abort Requested"):
            request.wait()
        assert not controller.admin.abort(request), "it is over"
        assert controller.admin.execute(commands.abort(7, 0)) == 1, "no such queue"


def test_deleting_a_queue_ends_its_commands() -> None:
    with driven() as (disk, controller), raw_queue(controller) as queue:
        disk.inject(admin=False, hang=True, count=None)
        for _ in range(3):
            queue.put(opcode=0, nsid=1)
        queue.ring()
        wait_for(lambda: len(disk.queues.submissions[2].under_way) == 3)
        controller.admin.execute(commands.delete_sq(2))
        found = [queue.wait() for _ in range(3)]
        assert [(one.cid, one.status >> 1 & 0x7FF) for one in found] == [
            (cid, Code.ABORTED_SQ_DELETION) for cid in range(3)
        ]
        controller.admin.execute(commands.create_sq(2, queue.depth, queue.sq.iova, 2))

"""The whole driver against the emulated controller: strict, out of order, and able to go wrong."""

from __future__ import annotations

import asyncio
import gc
import hashlib
import os
import signal
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from nvme_support import Watched, content, fill

import vfiopy
from vfiopy.drivers import nvme
from vfiopy.drivers.nvme import commands
from vfiopy.errors import (
    AddressRangeError,
    AlignmentError,
    ClosedError,
    DeviceGoneError,
    ForkedError,
    MemoryKindError,
    NotSupportedError,
    VfioTimeoutError,
)
from vfiopy.nvme_spec import registers as reg
from vfiopy.nvme_spec.status import Code

FAST = (0.0, 0.0005)
MSI_ONLY: dict[str, Any] = {"messages": "msi"}
INTX_ONLY: dict[str, Any] = {"messages": None}
SILENT: dict[str, Any] = {"messages": None, "interrupt_pin": 0}


def noise(size: int, seed: int = 0) -> bytes:
    return hashlib.shake_128(bytes([seed])).digest(size)


def in_use(device: vfiopy.Device) -> dict[str, Any]:
    """What the space has in use, without what its book keeps for the next mappings."""
    return {name: figure for name, figure in device.space.stats().items() if name != "book_memory"}


@contextmanager
def driven(target: Watched | None = None, **options: Any) -> Iterator[tuple[Watched, nvme.Controller]]:
    """Open and drive a device; in the end it must have nothing to complain about."""
    target = target if target is not None else Watched(delay=FAST)
    options.setdefault("timeout", 5.0)
    with vfiopy.open(target) as device:
        before = in_use(device)
        with nvme.Controller(device, **options) as controller:
            yield target, controller
        gc.collect()
        assert in_use(device) == before, "DMA memory was left behind"
        assert not device.bus_master
        assert not any(interrupt.enabled for interrupt in device.irqs.all())
    assert not target.errors
    assert not target.faults


# --- coming up and going down ------------------------------------------------------------------------------------


def test_bring_up_and_shut_down() -> None:
    with driven() as (target, controller):
        assert target.registers.status == 1
        assert controller.interrupts == "msix"
        assert (controller.info.serial, controller.info.model) == ("SERIAL-1", "vfiopy emulated NVMe controller")
        assert controller.max_transfer == 128 << 10
        assert controller.admin.active_namespaces() == [1, 3]
        assert [space.block_size for space in controller.namespaces()] == [512, 4096]
        assert controller.failure is None
        controller.close()
        controller.close()
        assert target.logs.unsafe_shutdowns == 0
        assert target.registers.control & 1 == 0
        assert not controller
        with pytest.raises(ClosedError, match="NVMe controller emulated:nvme is closed"):
            controller.namespace(1)


def test_a_controller_that_another_driver_left_enabled_is_disabled_first() -> None:
    target = Watched(delay=FAST)
    with vfiopy.open(target) as device:
        device.bars[0].write32(reg.AQA, 0x1F001F)
        device.bars[0].write32(reg.CC, 0x460001)
        device.bars[0].poll32(reg.CSTS, 1, 1, 5.0)
        with nvme.Controller(device) as controller:
            assert controller.namespace(1).read(0, 1).nbytes == 512
    assert not target.errors


def test_what_is_no_nvme_controller_is_refused() -> None:
    with vfiopy.open("emulated:edu") as device:
        with pytest.raises(NotSupportedError, match="class code is 00ff00, an NVMe controller has 010802"):
            nvme.Controller(device)
        assert not device.bus_master


def test_a_controller_that_is_gone() -> None:
    target = Watched()
    target.registers._fixed.update({reg.CAP: 0xFFFFFFFF, reg.CAP + 4: 0xFFFFFFFF})
    with vfiopy.open(target) as device, pytest.raises(DeviceGoneError, match="read as all ones"):
        nvme.Controller(device)


@pytest.mark.parametrize("trouble", ["never_ready", "fatal", "identify", "create"])
def test_failed_bring_up_leaves_nothing(trouble: str) -> None:
    target = Watched(delay=FAST)
    expected: type[Exception] = nvme.NvmeError
    if trouble == "never_ready":
        target = Watched(delay=FAST, ready_seconds=0.5)
        target.never_ready = True
        expected = VfioTimeoutError
    elif trouble == "fatal":
        target.fatal = True
        expected = nvme.ControllerFailedError
    else:
        target.inject(admin=True, opcode=6 if trouble == "identify" else 1, status=Code.INTERNAL_ERROR, count=None)
    with vfiopy.open(target) as device:
        before = in_use(device)
        with pytest.raises(expected):
            nvme.Controller(device, queues=2, timeout=2.0)
        gc.collect()
        assert in_use(device) == before
        assert not device.bus_master
        assert not device.irqs.msix.enabled
        assert target.registers.control & 1 == 0
        # and nothing stands in the way of another try
        target.never_ready = False
        target.inject.clear()
        if trouble != "fatal":
            with nvme.Controller(device, timeout=2.0) as controller:
                assert controller.namespace(1).blocks == 8192
    assert not target.faults


def test_closing_the_device_first() -> None:
    target = Watched(delay=FAST)
    with vfiopy.AddressSpace("mine") as space:
        device = vfiopy.open(target, space=space)
        controller = nvme.Controller(device)
        device.close()
        controller.close()
        assert space.stats()["mappings"] == 0


def test_closing_the_device_and_its_space_first() -> None:
    device = vfiopy.open(Watched(delay=FAST))
    controller = nvme.Controller(device)
    request = controller.admin.request_event()
    device.close()
    controller.close()
    with pytest.raises(nvme.CommandAbortedError):
        request.wait()
    del controller, request
    gc.collect()


def test_any_step_of_bring_up_may_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each DMA allocation, and then each admin command, fails once: nothing stays behind, and another try works."""
    target = Watched(delay=FAST)
    with vfiopy.open(target) as device:
        before = in_use(device)
        allocate, submit = vfiopy.device.DeviceDma.allocate, nvme.QueuePair.submit

        def failing(original: Any, error: BaseException) -> Any:
            def call(*arguments: Any, **options: Any) -> Any:
                nonlocal left
                left -= 1
                if not left:
                    raise error
                return original(*arguments, **options)

            return call

        for owner, name, original, error in (
            (vfiopy.device.DeviceDma, "allocate", allocate, vfiopy.NoSpaceError("no more")),
            (nvme.QueuePair, "submit", submit, KeyboardInterrupt()),
        ):
            for step in range(1, 100):
                left = step
                monkeypatch.setattr(owner, name, failing(original, error))
                try:
                    controller = nvme.Controller(device, queues=2)
                except type(error):
                    pass
                else:
                    monkeypatch.setattr(owner, name, original)
                    controller.close()
                    break
                finally:
                    monkeypatch.setattr(owner, name, original)
                assert in_use(device) == before, f"{name} call {step}"
                assert not device.bus_master
                assert not device.irqs.msix.enabled
                assert not target.registers.control & 1
            assert 5 < step < 99, f"{step} calls of {name}"
    assert not target.faults
    assert not target.errors


@pytest.mark.parametrize("interrupts", ["msix", "polling"])
def test_ctrl_c_in_a_wait(interrupts: nvme.signals.InterruptKind) -> None:
    with driven(interrupts=interrupts) as (target, controller):
        disk = controller.namespace(1)
        target.delay = (0.5, 0.5)
        with controller.device.dma.allocate(4096) as buffer:
            request = controller.queues[0].submit(commands.read(1, 0, 8), buffer)
            old = signal.signal(signal.SIGALRM, signal.default_int_handler)
            signal.setitimer(signal.ITIMER_REAL, 0.05)
            try:
                with pytest.raises(KeyboardInterrupt):
                    request.wait()
            finally:
                signal.signal(signal.SIGALRM, old)
            assert not request.done
            assert request.wait() == 0, "the interrupted wait lost the completion"
        target.delay = FAST
        disk.flush()


def test_a_forked_child_is_kept_out() -> None:
    with driven() as (_, controller):
        disk = controller.namespace(1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # 3.12: the process has threads
            child = os.fork()
        if not child:
            code = 1
            try:
                disk.flush()
            except ForkedError:
                controller.close()
                code = 0
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        disk.flush()


# --- reading and writing -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("stride", [0, 2])
@pytest.mark.parametrize("interrupts", ["msix", "polling"])
def test_write_and_read_back(interrupts: nvme.signals.InterruptKind, stride: int) -> None:
    with driven(Watched(delay=FAST, stride=stride), interrupts=interrupts) as (target, controller):
        disk = controller.namespace(1)
        data = noise(24 * 512)
        disk.write(100, data)
        disk.flush()
        assert content(target)[51200 : 51200 + len(data)] == data
        read = disk.read(100, 24)
        assert type(read) is np.ndarray
        assert read.tobytes() == data


@pytest.mark.parametrize(("options", "best"), [(MSI_ONLY, "msi"), (INTX_ONLY, "intx"), (SILENT, "polling")])
def test_other_interrupts(options: dict[str, Any], best: str) -> None:
    with driven(Watched(delay=FAST, **options), queues=3) as (_, controller):
        assert controller.interrupts == best
        disk = controller.namespace(1)
        for number, queue in enumerate(controller.queues):
            disk.write(64 * number, noise(64 * 512, number), queue=queue)
        for number, queue in enumerate(reversed(controller.queues)):
            assert disk.read(64 * number, 64, queue=queue).tobytes() == noise(64 * 512, number)
        assert all(queue.missed_interrupts == 0 for queue in controller.queues)


def test_an_interrupt_that_the_function_does_not_have() -> None:
    with vfiopy.open(Watched(**MSI_ONLY)) as device, pytest.raises(NotSupportedError, match="no msix interrupt"):
        nvme.Controller(device, interrupts="msix")


@pytest.mark.parametrize(
    ("offset", "blocks"), [(0, 8), (512, 8), (4092, 1), (3584, 9), (0, 16), (4, 255), (0, 256), (100, 257), (0, 2000)]
)
def test_sizes_that_need_prp_lists_and_splitting(offset: int, blocks: int) -> None:
    with driven() as (target, controller):
        disk = controller.namespace(1)
        fill(target, noise(4 << 20))
        with controller.device.dma.allocate(offset + blocks * 512 + 4096) as buffer:
            buffer[:] = 0xA5
            part = buffer[offset : offset + blocks * 512]
            assert disk.read(37, into=part) is part
            assert part.tobytes() == content(target)[37 * 512 : (37 + blocks) * 512]
            assert (buffer[:offset] == 0xA5).all()
            assert (buffer[offset + blocks * 512 :] == 0xA5).all()
            disk.write(5000, part)
            assert content(target)[5000 * 512 : (5000 + blocks) * 512] == part.tobytes()


def test_large_commands_chain_prp_lists() -> None:
    with driven(Watched(delay=FAST, mdts=0), max_transfer=4 << 20) as (target, controller):
        disk = controller.namespace(1)
        fill(target, noise(4 << 20))
        with controller.device.dma.allocate((4 << 20) + 4) as buffer:
            part = buffer[4:]
            disk.read(0, into=part)
            assert part.tobytes() == content(target)
        assert target.commands.count((1, 2)) == 1


def test_many_more_commands_than_the_queue_holds() -> None:
    with driven(Watched(delay=FAST, entries=4)) as (target, controller):
        assert controller.queues[0].depth == 4
        disk = controller.namespace(3)
        queue = controller.queues[0]
        queue.max_transfer = 4096
        disk.write(0, noise(1 << 20))
        assert content(target, 3) == noise(1 << 20)
        assert disk.read(0, 256).tobytes() == noise(1 << 20)
        assert target.commands.count((1, 1)) == 256
        assert queue.free == 3


def test_write_zeroes_and_deallocate() -> None:
    with driven() as (target, controller):
        disk = controller.namespace(1)
        fill(target, b"\xff" * (4 << 20))
        disk.write_zeroes(10, 5)
        disk.deallocate((100, 3), (8191, 1))
        zero = np.flatnonzero(np.frombuffer(content(target), np.uint8).reshape(-1, 512).sum(axis=1) == 0)
        assert zero.tolist() == [*range(10, 15), *range(100, 103), 8191]


def test_log_page_that_is_larger_than_the_admin_buffer() -> None:
    with driven() as (_, controller):
        for _ in range(64):
            with pytest.raises(nvme.NvmeError):
                controller.admin.execute(nvme.Command("Nonsense", 0x7F))
        page = controller.admin.log_page(1, 3 * 4096)
        assert page[:4096] == controller.admin.log_page(1, 4096)
        assert [page[64 * number] for number in range(64)] == list(range(64, 0, -1))
        assert page[4096:] == bytes(8192)


# --- what is refused ---------------------------------------------------------------------------------------------


def test_bad_requests_are_refused_before_the_controller_sees_them() -> None:
    with driven() as (target, controller):
        disk, dma, queue = controller.namespace(1), controller.device.dma, controller.queues[0]
        count = len(target.commands)
        with pytest.raises(AddressRangeError, match="2 blocks at LBA 8191 are not inside its 8192 blocks of 512 bytes"):
            disk.read(8191, 2)
        with pytest.raises(AddressRangeError):
            disk.read(-1, 1)
        with pytest.raises(AddressRangeError):
            disk.write_zeroes(0, 0)
        with pytest.raises(nvme.TransferSizeError, match="513 bytes, which is not whole blocks of 512"):
            disk.write(0, bytes(513))
        with pytest.raises(nvme.TransferSizeError, match="neither a number of blocks nor a buffer"):
            disk.read(0)
        with pytest.raises(MemoryKindError, match="contiguous DMA buffer"):
            disk.read(0, into=np.zeros(512, np.uint8))  # type: ignore[arg-type]
        with dma.allocate(8192) as buffer:
            with pytest.raises(nvme.TransferSizeError, match="4096 bytes, which is not 4 blocks"):
                disk.read(0, 4, into=buffer[:4096])
            with pytest.raises(MemoryKindError, match="contiguous"):
                disk.read(0, into=buffer[::2])
            with pytest.raises(AlignmentError, match="not aligned to 4 bytes"):
                disk.read(0, into=buffer[1:513])
            with pytest.raises(MemoryKindError, match="contiguous DMA buffer"):
                queue.submit(commands.read(1, 0, 1), bytes(512))  # type: ignore[arg-type]
        with dma.allocate(1 << 20) as buffer, pytest.raises(nvme.TransferSizeError, match="1 to 131072 can be moved"):
            queue.submit(commands.read(1, 0, 2048), buffer)
        assert len(target.commands) == count
        assert queue.free == queue.depth - 1


def test_errors_have_names_and_do_no_harm() -> None:
    with driven() as (_, controller):
        words = r"Invalid Namespace or Format \(generic, SCT 0h SC 0Bh, do not retry\)"
        with pytest.raises(nvme.NvmeError, match=words) as caught:
            controller.namespace(77)
        assert (caught.value.sct, caught.value.sc) == (0, 0x0B)
        assert caught.value.object == "emulated:nvme admin queue"
        with pytest.raises(NotSupportedError, match="namespace 2 is not active"):
            controller.namespace(2)
        with pytest.raises(nvme.NvmeError, match="LBA Out of Range"):
            controller.queues[0].execute(commands.write_zeroes(1, 1 << 40, 1))
        with pytest.raises(nvme.NvmeError, match="Invalid Command Opcode"):
            controller.queues[0].execute(nvme.Command("Nonsense", 0x7F))
        assert controller.failure is None
        assert controller.namespace(1).read(0, 1).nbytes == 512


def test_one_failure_of_many_settles_the_others_first() -> None:
    with driven() as (target, controller):
        disk = controller.namespace(1)
        target.inject(admin=False, opcode=2, status=Code.UNRECOVERED_READ_ERROR, count=None)
        with controller.device.dma.allocate(2 << 20) as buffer:
            with pytest.raises(nvme.NvmeError, match="Unrecovered Read Error"):
                disk.read(0, into=buffer)
            assert controller.queues[0].under_way == ()
        assert target.commands.count((1, 2)) == 16


def test_a_full_queue_says_so() -> None:
    with driven(Watched(delay=FAST, entries=4)) as (target, controller):
        queue = controller.queues[0]
        target.delay = (0.4, 0.4)
        requests = [queue.submit(commands.flush(1)) for _ in range(3)]
        with pytest.raises(nvme.QueueFullError, match="3 commands are under way"):
            queue.submit(commands.flush(1))
        assert [request.wait() for request in requests] == [0, 0, 0]
        target.delay = FAST


# --- queues ------------------------------------------------------------------------------------------------------


def test_several_queues_each_with_its_vector_and_thread() -> None:
    with driven(queues=4) as (target, controller):
        assert [queue.number for queue in controller.queues] == [1, 2, 3, 4]
        assert len({queue.signal.vector for queue in controller.queues}) == 4
        disk = controller.namespace(1)
        failures: list[BaseException] = []

        def work(queue: nvme.QueuePair) -> None:
            try:
                for turn in range(5):
                    data = noise(40 * 512, queue.number * 10 + turn)
                    disk.write(queue.number * 100, data, queue=queue)
                    assert disk.read(queue.number * 100, 40, queue=queue).tobytes() == data
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=work, args=(queue,)) for queue in controller.queues]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures
        assert {number for number, _ in target.commands} == {0, 1, 2, 3, 4}


def test_delete_and_create() -> None:
    with driven(queues=2) as (target, controller):
        first, second = controller.queues
        controller.delete_queue(first)
        assert set(target.queues.submissions) == {0, 2}
        assert controller.namespace(1).read(0, 1, queue=second).nbytes == 512
        again = controller.create_queue(depth=8)
        assert (again.number, again.depth) == (1, 8)
        third, fourth = controller.create_queue(), controller.create_queue()
        # more queues than vectors: they share
        assert [queue.signal.vector for queue in controller.queues] == [1, 2, 1, 2]
        with pytest.raises(NotSupportedError, match="allows 4 I/O queue pairs"):
            controller.create_queue()
        for queue in (third, fourth):
            assert controller.namespace(1).read(0, 1, queue=queue).nbytes == 512
        for _ in range(20):
            controller.namespace(1).read(0, 1)


def test_fewer_queues_than_asked_for() -> None:
    with driven(Watched(delay=FAST, queues=2), queues=4) as (_, controller):
        assert len(controller.queues) == 2


def test_no_queues_at_all() -> None:
    with driven(queues=0) as (_, controller):
        disk = controller.namespace(1)
        with pytest.raises(NotSupportedError, match="no I/O queue"):
            disk.read(0, 1)


# --- asyncio -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, INTX_ONLY, SILENT])
def test_many_tasks_on_one_queue(options: dict[str, Any]) -> None:
    with driven(Watched(delay=FAST, **options)) as (target, controller):
        disk = controller.namespace(1)
        fill(target, noise(4 << 20))

        async def one(lba: int) -> bytes:
            return (await disk.read_async(lba, 3)).tobytes()

        async def main() -> None:
            got = await asyncio.gather(*(one(lba) for lba in range(0, 300, 3)))
            assert b"".join(got) == content(target)[: 300 * 512]
            await disk.write_async(0, noise(512, 9))
            assert await controller.queues[0].submit(commands.flush(1)) == 0
            with pytest.raises(nvme.NvmeError, match="LBA Out of Range"):
                await controller.queues[0].submit(commands.write_zeroes(1, 1 << 40, 1))

        asyncio.run(main())
        assert content(target)[:512] == noise(512, 9)
        asyncio.run(main())  # another loop


def test_more_tasks_than_the_queue_holds() -> None:
    with driven(Watched(delay=FAST, entries=4)) as (target, controller):
        disk = controller.namespace(3)
        fill(target, noise(1 << 20), 3)

        async def main() -> list[Any]:
            return await asyncio.gather(*(disk.read_async(lba, 1) for lba in range(60)))

        got = asyncio.run(main())
        assert b"".join(each.tobytes() for each in got) == noise(1 << 20)[: 60 * 4096]


def test_cancelled_read_leaves_no_dma_behind() -> None:
    with driven() as (target, controller):
        disk = controller.namespace(1)
        target.delay = (0.4, 0.41)

        async def main() -> None:
            task = asyncio.create_task(disk.read_async(0, 1000))
            await asyncio.sleep(0.02)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert controller.queues[0].under_way == ()

        asyncio.run(main())
        target.delay = FAST


def test_timeout_in_a_loop() -> None:
    with driven() as (target, controller):
        target.inject(admin=False, opcode=2, hang=True, count=None)

        async def main() -> None:
            with pytest.raises(nvme.NvmeTimeoutError, match="Read of 1 blocks at LBA 0"):
                await controller.namespace(1).read_async(0, 1, timeout=0.1)

        asyncio.run(main())
        assert controller.failure is not None


# --- failing and coming back -------------------------------------------------------------------------------------


@pytest.mark.parametrize("interrupts", ["msix", "polling"])
def test_timeout_disables_and_reset_brings_back(interrupts: nvme.signals.InterruptKind) -> None:
    with driven(queues=2, interrupts=interrupts) as (target, controller):
        disk = controller.namespace(1)
        disk.write(0, noise(512))
        target.inject(admin=False, opcode=2, hang=True, count=None)
        buffer = controller.device.dma.allocate(512)
        other = controller.queues[1].submit(commands.read(1, 0, 1), buffer)
        with pytest.raises(nvme.NvmeTimeoutError) as caught:
            disk.read(0, 1, timeout=0.1)
        assert str(caught.value) == (
            "emulated:nvme I/O queue 1: Read of 1 blocks at LBA 0: it was not completed within 0.1 s; "
            "the controller says that it is ready (CSTS 0x1) [ETIMEDOUT: Connection timed out]\n"
            "  hint: the controller was disabled, so that it cannot write the buffer any more; reset() brings it back"
        )
        assert isinstance(caught.value, TimeoutError)
        assert target.registers.control & 1 == 0
        with pytest.raises(nvme.CommandAbortedError, match="under way when Read of 1 blocks"):
            other.wait()
        with pytest.raises(nvme.ControllerFailedError, match=r"was disabled: Read of 1 blocks .*\n.*reset"):
            disk.read(0, 1)
        target.inject.clear()
        controller.reset()
        assert controller.failure is None
        for queue in controller.queues:
            assert disk.read(0, 1, queue=queue).tobytes() == noise(512)
        buffer.free()


def test_a_controller_that_does_not_obey_loses_the_bus() -> None:
    target = Watched(delay=FAST, ready_seconds=0.5)
    with vfiopy.open(target) as device:
        controller = nvme.Controller(device, timeout=5.0)
        target.inject(admin=False, opcode=0, hang=True, count=None)
        target.never_stops = True
        with pytest.raises(nvme.NvmeTimeoutError):
            controller.namespace(1).flush(timeout=0.05)
        assert not device.bus_master
        with pytest.raises(VfioTimeoutError, match=r"disabling \(CC.EN = 0\) did not happen within 0.5 s"):
            controller.reset()
        target.inject.clear()
        controller.reset(function=True)
        assert target.registers.control & 1
        assert controller.namespace(1).read(0, 1).nbytes == 512
        with pytest.raises(VfioTimeoutError, match="disabling"):
            controller.close()
        assert not controller
        assert not device.bus_master
        assert device.space.stats()["mappings"] == 0


def test_reset_in_the_middle() -> None:
    with driven(queues=2) as (target, controller):
        disk = controller.namespace(1)
        disk.write(9, noise(512))
        target.inject(admin=False, opcode=0, hang=True, count=None)
        requests = [queue.submit(commands.flush(1)) for queue in controller.queues for _ in range(3)]
        controller.reset()
        for request in requests:
            with pytest.raises(nvme.CommandAbortedError, match="when the controller was reset"):
                request.wait()
        assert disk.read(9, 1, queue=controller.queues[1]).tobytes() == noise(512)


def test_a_completion_for_nobody_stops_the_controller() -> None:
    with driven() as (target, controller):
        disk = controller.namespace(1)
        target.inject(admin=False, cid=0x7777)
        with pytest.raises(nvme.CommandAbortedError, match="command 30583 of queue 1, which is not under way"):
            disk.flush()
        assert target.registers.control & 1 == 0
        controller.reset()
        disk.flush()


def test_a_lost_interrupt_is_no_lost_command() -> None:
    with driven() as (target, controller):
        disk = controller.namespace(1)
        target.inject.lost_interrupts = 1
        disk.flush(timeout=1.0)
        assert controller.queues[0].missed_interrupts == 1
        assert controller.failure is None


def test_a_dma_fault_is_a_timeout_not_a_hang() -> None:
    target = Watched(delay=FAST)
    with vfiopy.open(target) as device, nvme.Controller(device) as controller:
        disk = controller.namespace(1)
        target.inject.dma_faults = 1
        with pytest.raises(nvme.NvmeTimeoutError):
            disk.read(0, 1, timeout=0.1)
        controller.reset()
        disk.read(0, 1)


def test_events() -> None:
    with driven() as (target, controller):
        request = controller.admin.request_event()
        assert controller.admin.wait_event(request, 0.05) is None
        assert controller.failure is None
        controller.namespace(1).flush()
        controller.admin.set_feature(nvme.Feature.ASYNC_EVENTS, 2)
        target.set_health(temperature=400)
        event = controller.admin.wait_event(request, 5.0)
        assert event is not None
        assert event.log_page == 2
        left_open = controller.admin.request_event()
        controller.close()
        with pytest.raises(nvme.CommandAbortedError, match="when the controller was closed"):
            left_open.wait()

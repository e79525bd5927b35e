"""How open devices end on a real kernel: twice, in any order, under exceptions, in a forked child."""

from __future__ import annotations

import gc
import mmap
import os
import signal
import threading
import time
from collections.abc import Callable

import pytest
from modes import IVSHMEM, MODES

import vfiopy
from vfiopy.dma.memory import PAGE_SIZE
from vfiopy.lives import drain_finalizers

Lookup = Callable[..., str]


@pytest.fixture(params=MODES)
def mode(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def address(bound_edu: str) -> str:
    return bound_edu


def test_use_after_close_and_double_close(address: str, mode: str) -> None:
    device = vfiopy.open(address, backend=mode)
    bar = device.bars[0]
    vector = device.irqs.msi.enable()[0]
    buffer = device.dma.allocate(64)
    device.close()
    device.close()
    for use in (
        lambda: bar.read32(0),
        lambda: device.bus_master,
        lambda: vector.wait(0),
        lambda: buffer.iova,
        lambda: device.space.allocate(8),
    ):
        with pytest.raises(vfiopy.ClosedError, match=r"closed|freed|unmapped"):
            use()
    buffer.free()
    with vfiopy.open(address, backend=mode) as again:
        assert again.bars[0].read32(0) & 0xFF == 0xED


def test_bus_master_is_off_before_memory_goes(address: str, mode: str) -> None:
    """After an exception too; the next opener finds it off, and the IOMMU saw no fault (the dmesg check)."""

    def script() -> None:
        with vfiopy.open(address, backend=mode) as device:
            device.bus_master = True
            buffer = device.dma.allocate(4096)
            raise ZeroDivisionError(buffer.iova)

    with pytest.raises(ZeroDivisionError):
        script()
    with vfiopy.open(address, backend=mode) as device:
        assert not device.bus_master


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_dropped_without_close(address: str, mode: str) -> None:
    device = vfiopy.open(address, backend=mode)
    _ = device.bars[0], device.dma.allocate(64), device.irqs.msi.enable()
    del device, _
    count = 0
    for _ in range(2):  # a buffer in the queue keeps its space, and that its devices, until it is drained
        gc.collect()
        count += drain_finalizers()
    assert count > 1
    with vfiopy.open(address, backend=mode) as again:
        assert again.dma.allocate(8).iova


def test_live_views_of_a_bar_keep_the_device_open(bdf: Lookup) -> None:
    found = bdf(IVSHMEM)
    with vfiopy.bind(found), vfiopy.open(found) as device:
        with device.bars[2].hold() as hold:
            assert hold.address
            with pytest.raises(vfiopy.BusyError, match="BAR 2"):
                device.close()
        assert device, "a refused close leaves it open"


def test_keyboard_interrupt_in_a_wait(address: str) -> None:
    with vfiopy.open(address) as device:
        (vector,) = device.irqs.msi.enable()
        main = threading.main_thread().ident
        assert main is not None
        timer = threading.Timer(0.3, signal.pthread_kill, [main, signal.SIGINT])
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            vector.wait(20)
        timer.join()
        vector.trigger()
        assert vector.wait(2) == 1


def test_keyboard_interrupt_anywhere_leaves_book_and_kernel_in_agreement(address: str, mode: str) -> None:
    with vfiopy.open(address, backend=mode) as device, mmap.mmap(-1, PAGE_SIZE) as page:
        stop = threading.Event()
        main = threading.main_thread().ident
        assert main is not None

        def interrupt() -> None:
            while not stop.is_set():
                signal.pthread_kill(main, signal.SIGINT)
                time.sleep(0.004)

        thread = threading.Thread(target=interrupt)
        rounds = interrupted = 0
        deadline = time.monotonic() + 1.5
        previous = signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            thread.start()
            while time.monotonic() < deadline:
                try:
                    device.space.map(page).unmap()
                    rounds += 1
                except KeyboardInterrupt:
                    interrupted += 1
        except KeyboardInterrupt:
            interrupted += 1
        finally:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            stop.set()
            thread.join()
            signal.signal(signal.SIGINT, previous)
        assert interrupted
        device.space.book.verify()
        left = device.space.mappings()
        # What the book has, the kernel has, and the other way round: unmapping it all and mapping again works.
        assert device.space.unmap_all() == len(left) * PAGE_SIZE
        for item in left:
            device.space.map(page, iova=item.iova).unmap()


def test_a_forked_child_cannot_touch_the_parents_device(address: str, mode: str) -> None:
    with vfiopy.open(address, backend=mode) as device:
        buffer = device.dma.allocate(4096)
        bar = device.bars[0]
        reader, writer = os.pipe()
        child = os.fork()
        if not child:
            raised = []
            for use in (lambda: bar.read32(0), lambda: device.bus_master, lambda: device.dma.allocate(8)):
                try:
                    use()
                    raised.append("nothing")
                except vfiopy.ForkedError:
                    raised.append("ForkedError")
                except BaseException as error:  # a child must not run on into the parent's tests
                    raised.append(repr(error))
            device.close()
            del device, buffer, bar
            gc.collect()
            drain_finalizers()
            os.write(writer, ",".join(raised).encode())
            os._exit(0)
        os.close(writer)
        os.waitpid(child, 0)
        with os.fdopen(reader, "rb") as answer:
            assert answer.read() == b"ForkedError,ForkedError,ForkedError"
        assert device.space.find(buffer.iova)
        assert bar.read32(0) & 0xFF == 0xED
        buffer.free()


def test_unmap_against_map_and_lookups(address: str, mode: str) -> None:
    """Four threads in one book, with real ioctls between reserve and commit."""
    with vfiopy.open(address, backend=mode) as device:
        space = device.space
        failures: list[BaseException] = []
        deadline = time.monotonic() + 1.5

        pages = [mmap.mmap(-1, PAGE_SIZE) for _ in range(3)]

        def churn(page: mmap.mmap) -> None:
            while time.monotonic() < deadline and not failures:
                try:
                    mapping = space.map(page)
                    assert space.find(mapping.iova) is not None
                    mapping.unmap()
                except BaseException as error:
                    failures.append(error)

        def look() -> None:
            while time.monotonic() < deadline and not failures:
                try:
                    for mapping in space.mappings():
                        assert mapping.size == PAGE_SIZE
                except vfiopy.ClosedError:
                    pass
                except BaseException as error:
                    failures.append(error)

        threads = [threading.Thread(target=churn, args=[page]) for page in pages] + [threading.Thread(target=look)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert failures == []
        assert space.mappings() == []
        space.book.verify()
        for page in pages:
            page.close()

"""The client against our server: memory both ways, time limits, a server that dies, comes back or was never one."""

from __future__ import annotations

import asyncio
import gc
import mmap
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from emulated_support import BUS_MASTER, MEMORY, Everything, wait_for
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from vfio_user_support import PAGE, FakeServer, Script, greet, nothing_left, open_fds, plain, reply, serving

import vfiopy
from vfiopy import emulated, vfio_user
from vfiopy.backend import DeviceWindow, Prot, RemoteMemory
from vfiopy.drivers.edu import BUFFER_SIZE, EduDriver
from vfiopy.emulated import Edu
from vfiopy.vfio_user import wire
from vfiopy.vfio_user.channel import Channel, Message
from vfiopy.vfio_user.served import ServedDevice
from vfiopy.vfio_user.version import Capabilities, encode_version
from vfiopy.vfio_user.wire import Command

ROOT = Path(__file__).parents[2]


@pytest.fixture
def device() -> Everything:
    return Everything()


@pytest.fixture(autouse=True)
def _nothing_left(device: Everything) -> Iterator[None]:
    with nothing_left(wait_for):
        yield


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "device.sock"


@pytest.fixture(params=[True, False], ids=["twin socket", "one socket"])
def edu(path: Path, request: pytest.FixtureRequest) -> Iterator[tuple[EduDriver, Edu]]:
    """An edu's driver and the card itself, with and without a socket for the server's requests."""
    card = Edu(delay=(0.0, 0.0005))
    space = vfiopy.AddressSpace("test")
    with serving(card, path), space:
        io, mapper = vfio_user.connect(path, twin=request.param)
        with vfiopy.Device(io, mapper, space, owns_space=False) as device:
            device.bus_master = True
            yield EduDriver(device), card


# --- memory ----------------------------------------------------------------------------------------------------------


def round_trip(driver: EduDriver, buffer: np.ndarray, iova: int) -> None:
    buffer[:BUFFER_SIZE] = np.arange(BUFFER_SIZE) % 251
    driver.load(iova, BUFFER_SIZE)
    driver.store(iova + BUFFER_SIZE, 100, offset=50)
    assert np.array_equal(buffer[BUFFER_SIZE : BUFFER_SIZE + 100], buffer[50:150])
    assert not buffer[BUFFER_SIZE + 100 :].any()


def test_buffers_are_shared_with_the_server(edu: tuple[EduDriver, Edu]) -> None:
    driver, card = edu
    with driver.device.dma.allocate(2 * BUFFER_SIZE) as buffer:
        round_trip(driver, buffer, buffer.iova)
        with card.host.access(buffer.iova, 4, Prot.RW) as views:  # its own mapping of the same memory
            views[0][:] = b"seen"
            assert bytes(buffer[:4]) == b"seen"


def test_other_memory_is_served_by_messages(edu: tuple[EduDriver, Edu]) -> None:
    driver, _ = edu
    with mmap.mmap(-1, 2 * PAGE) as memory:
        mapping = driver.device.dma.map(memory)
        view = np.frombuffer(memory, dtype="u1")
        round_trip(driver, view, mapping.iova)
        mapping.unmap()
        del view


def test_a_large_access_by_messages(edu: tuple[EduDriver, Edu]) -> None:
    driver, card = edu
    size = 3 << 20
    with mmap.mmap(-1, size) as memory:
        mapping = driver.device.dma.map(memory)
        memory[-4:] = b"last"
        assert card.host.read(mapping.iova, size)[-4:] == b"last"
        card.host.write(mapping.iova + 1, bytes([7]) * (size - 2))
        assert memory[:2] == b"\0\7"
        assert memory[-2:] == b"\7t"
        mapping.unmap()


def test_a_bar_of_another_device_by_messages(edu: tuple[EduDriver, Edu], device: Everything) -> None:
    driver, _ = edu
    with vfiopy.open(device) as peer:
        hold = peer.bars[2].hold(0, PAGE)
        window = DeviceWindow(2, 0, PAGE, -1, hold.address, peer)
        mapping = driver.device.space.map(window, limit=(1 << 28) - 1)
        peer.bars[2].write_block(16, b"from the other device...")
        driver.load(mapping.iova + 16, 24)
        driver.store(mapping.iova + 512, 24)
        assert peer.bars[2].read_block(512, 6) == b"from the other device..."
        mapping.unmap()
        hold.release()


def test_memory_that_is_elsewhere(edu: tuple[EduDriver, Edu]) -> None:
    class Elsewhere(RemoteMemory):
        def read(self, offset: int, size: int) -> bytes:
            return bytes((offset + number) & 0xFF for number in range(size))

        def write(self, offset: int, data: bytes | bytearray) -> None:
            written.append((offset, bytes(data)))

    written: list[tuple[int, bytes]] = []
    driver, _ = edu
    mapping = driver.device.space.map(Elsewhere(PAGE, True), limit=(1 << 28) - 1)
    driver.load(mapping.iova + 8, 4)
    driver.store(mapping.iova + 32, 4)
    assert written == [(32, bytes((8, 9, 10, 11)))]
    mapping.unmap()


def test_protection_and_unmapping(edu: tuple[EduDriver, Edu]) -> None:
    driver, card = edu
    with mmap.mmap(-1, PAGE) as memory:
        mapping = driver.device.dma.map(memory, prot=Prot.READ)
        driver.store(mapping.iova, 4)
        mapping.unmap()
        driver.load(mapping.iova, 4)
    assert [(fault.iova, fault.write) for fault in card.faults] == [(mapping.iova, True), (mapping.iova, False)]


def test_the_clients_own_table_refuses_what_is_not_mapped(edu: tuple[EduDriver, Edu]) -> None:
    driver, _ = edu
    mapper = driver.device._mapper
    assert isinstance(mapper, vfio_user.VfioUserMapper)
    with mmap.mmap(-1, 2 * PAGE) as memory:
        mapping = driver.device.dma.map(memory, prot=Prot.READ)

        def ask(command: Command, address: int, size: int, data: bytes = b"") -> int:
            try:
                mapper.serve(command, bytearray(wire.DMA_ACCESS.pack(address, size) + data))
            except vfiopy.VfioError as error:
                return error.errno or 0
            return 0

        at = mapping.iova
        assert ask(Command.DMA_READ, at, 2 * PAGE) == 0
        assert ask(Command.DMA_READ, at + 2 * PAGE - 4, 5) == 14
        assert ask(Command.DMA_READ, at - 1, 4) == 14
        assert ask(Command.DMA_READ, (1 << 64) - 1, 4) == 14
        assert ask(Command.DMA_READ, at, (1 << 20) + 1) == 22
        assert ask(Command.DMA_WRITE, at, 4, b"1234") == 14
        assert ask(Command.DMA_WRITE, at, 5, b"1234") == 22
        mapping.unmap()
        assert ask(Command.DMA_READ, at, 4) == 14


def test_buffers_that_share_an_arena_are_zeroed_and_reused(edu: tuple[EduDriver, Edu]) -> None:
    driver, _ = edu
    dma = driver.device.dma
    before = len(open_fds())
    for _ in range(20):
        with dma.allocate(70 << 20) as large, dma.allocate(3 * PAGE, dtype="u4") as small:
            assert not large[:: 1 << 20].any()
            assert not small.any()
            large[:: 1 << 20] = small[:] = 0xEE
        del large, small
    gc.collect()
    assert len(open_fds()) <= before + 3


def test_an_array_outlives_its_device(path: Path) -> None:
    with serving(Edu(), path):
        with vfiopy.open(f"vfio-user:{path}") as device:
            buffer = device.dma.allocate(PAGE)
            buffer[:] = 3
        assert int(buffer.sum()) == 3 * PAGE


def test_a_space_with_two_kinds_of_devices(path: Path) -> None:
    near, far = Edu(delay=(0.0, 0.0)), Edu(delay=(0.0, 0.0))
    with vfiopy.AddressSpace("both") as space, serving(far, path), vfiopy.open(near, space=space) as first:
        early = space.allocate(2 * PAGE, limit=(1 << 28) - 1)  # anonymous memory: it is announced later, without fd
        with vfiopy.open(f"vfio-user:{path}", space=space) as second:
            late = space.allocate(2 * PAGE, limit=(1 << 28) - 1)
            for device in (first, second):
                device.bus_master = True
                for buffer in (early, late):
                    buffer[:] = 0
                    round_trip(EduDriver(device), buffer, buffer.iova)
        late.free()
        early.free()


def test_requests_are_served_while_others_wait(edu: tuple[EduDriver, Edu]) -> None:
    """Threads that read registers, and a device that reads memory by messages, at the same time."""
    driver, card = edu
    bar = driver.device.bars[0]
    stop = threading.Event()
    errors: list[Exception] = []

    def read() -> None:
        while not stop.is_set():
            if bar.read32(0) != 0x010000ED:
                errors.append(ValueError("a wrong answer"))

    def dma() -> None:
        while not stop.is_set():
            if card.host.read(mapping.iova, PAGE) != bytes(memory):
                errors.append(ValueError("wrong memory"))

    with mmap.mmap(-1, PAGE) as memory:
        memory[:] = bytes(range(256)) * 16
        mapping = driver.device.dma.map(memory)
        threads = [threading.Thread(target=work) for work in (read, read, dma, dma)]
        for thread in threads:
            thread.start()
        time.sleep(0.5)
        stop.set()
        for thread in threads:
            thread.join(10)
        mapping.unmap()
    assert not errors
    assert not card.faults


# --- registers -------------------------------------------------------------------------------------------------------


def test_posted_writes_are_done_in_order_and_before_the_end(path: Path, device: Everything) -> None:
    with serving(device, path):
        with vfiopy.open(f"vfio-user:{path}") as opened:
            for value in range(200):
                opened.bars[0].write32(0, value)
        assert [access[-1] for access in device.accesses] == list(range(200))


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[Command]:
    """The writes that the server has got, by message."""
    found: list[Command] = []
    for name in ("region_write", "region_write_multi"):
        method = getattr(ServedDevice, f"_{name}")

        def noting(self: ServedDevice, *arguments: Any, name: str = name, method: Any = method) -> Any:
            found.append(Command[name.upper()])
            return method(self, *arguments)

        monkeypatch.setattr(ServedDevice, f"_{name}", noting)
    return found


def test_bursts_are_few_messages(path: Path, device: Everything, sent: list[Command]) -> None:
    values = struct.pack("=20000I", *range(20000))
    with serving(device, path), vfiopy.open(f"vfio-user:{path}") as driver:
        bar = driver.bars[0]
        bar.write_fifo(0x10, values, 4)
        bar.write_block(0x20, values[:40], 2)
        bar.read32(0)
        writes = [access for access in device.accesses if access[0] == "write"]
        assert writes[:20000] == [("write", 0, 0x10, 4, number) for number in range(20000)]
        expected = struct.unpack("=20H", values[:40])
        assert writes[20000:] == [("write", 0, 0x20 + 2 * at, 2, value) for at, value in enumerate(expected)]
        assert sent.count(Command.REGION_WRITE_MULTI) < 6
        driver.memory_enabled = False
        with pytest.raises(vfiopy.DeviceGoneError):
            bar.write_fifo(0x10, values, 4)
        driver.memory_enabled = True
        device.accesses.clear()
        assert driver.io.connection.peer.write_multiple  # type: ignore[attr-defined]
        driver.io.connection.peer = Capabilities(max_data_xfer_size=200)  # type: ignore[attr-defined]
        sent.clear()
        bar.write_fifo(0x10, values[:80], 4)  # to a server that cannot
        driver.io.connection.peer = Capabilities(max_data_xfer_size=200, write_multiple=True)  # type: ignore[attr-defined]
        bar.write_fifo(0x10, values[:80], 4)
        bar.read32(0)
        assert [access[-1] for access in device.accesses[:40]] == [*range(20), *range(20)]
        assert sent == [Command.REGION_WRITE_MULTI] * 3  # single ones take the native road


def test_a_burst_that_is_waited_for(path: Path, device: Everything) -> None:
    with serving(device, path):
        io, mapper = vfio_user.connect(path)
        window = io.map_region(2, 0, PAGE)  # so that nothing is posted
        io.write_burst(0, 0, 4, 4, struct.pack("=100I", *range(100)))
        writes = [access for access in device.accesses if access[0] == "write"]
        window.close()
        assert writes == [("write", 0, 4 * number, 4, number) for number in range(100)]
        with pytest.raises(vfiopy.AddressRangeError):
            io.write_burst(0, 0xF00, 4, 4, bytes(0x104))
        io.write_burst(0, 0, 4, 4, b"")
        io.close()
        mapper.close()


def test_a_write_that_nobody_takes_is_an_error(path: Path) -> None:
    with serving(Edu(), path), vfiopy.open(f"vfio-user:{path}") as device:
        bar = device.bars[0]
        bar.write32(4, 1)
        bar.write32(4, 2)  # posted
        device.memory_enabled = False
        for _ in range(2):
            with pytest.raises(vfiopy.DeviceGoneError):
                bar.write32(4, 3)
        with pytest.raises(vfiopy.DeviceGoneError):
            bar.read32(4)
        device.memory_enabled = True
        bar.write32(4, 4)
        assert bar.read32(4) == 0xFFFF_FFFB


def test_more_posted_writes_than_the_socket_takes(path: Path, device: Everything) -> None:
    with serving(device, path):
        io, mapper = vfio_user.connect(path)
        io.write(0, 0, bytes(4))
        with device.lock:  # the server cannot go on
            values = [struct.pack("=I", number) for number in range(20000)]
            done = threading.Thread(target=lambda: [io.write(0, 0, value) for value in values])
            done.start()
            time.sleep(0.2)
            assert done.is_alive()
        done.join(20)
        io.read(0, 0, 4)
        assert len(device.accesses) == 20002
        io.close()
        mapper.close()


def test_large_accesses_are_cut_and_whole(path: Path, device: Everything) -> None:
    with serving(device, path):
        io, mapper = vfio_user.connect(path)
        data = os.urandom(0x1000)
        io.write(2, 0, data)
        assert io.read(2, 0, 0x1000) == data
        assert io.read(2, 0, 0) == b""
        io.connection.peer = Capabilities(max_data_xfer_size=100)
        io.write(2, 0x1000, data)
        assert io.read(2, 0x1000, 0x1000) == data
        io.close()
        mapper.close()


def test_a_server_that_starts_like_a_device_after_power_on(path: Path) -> None:
    device = Everything()
    near, mapper = emulated.connect(device)
    for bar in range(6):
        near.write(7, 0x10 + 4 * bar, bytes(4))
    near.write(7, 0x04, struct.pack("=H", BUS_MASTER | 0x400))
    device.config.write(0x44, b"\3")  # D3hot
    with vfio_user.Server(near, mapper, path) as server:
        server.start()
        with vfiopy.open(f"vfio-user:{path}") as opened:
            assert opened.config.command == MEMORY
            bars = [opened.config.read32(0x10 + 4 * bar) for bar in range(4)]
            assert bars[0] >= 0x8000_0000
            assert bars[2] >= 0x8000_0000
            assert bars[0] & 0xFFF == 0
            assert bars[2] & 0xF == 0xC
            assert bars[0] & ~0xFFF != bars[2] & ~0x3FFF
            assert opened.bars[0].read32(0) == 0x55667788


def test_reset_at_open(path: Path, device: Everything) -> None:
    with serving(device, path):
        before = device.resets
        with vfiopy.open(f"vfio-user:{path}"):
            pass
        assert device.resets == before + 1


# --- time limits and ends --------------------------------------------------------------------------------------------


def test_a_server_that_hangs(path: Path, device: Everything) -> None:
    with serving(device, path), vfiopy.open(f"vfio-user:{path}") as opened:
        opened.io.timeout = 0.2  # type: ignore[attr-defined]
        with device.lock, pytest.raises(vfiopy.VfioTimeoutError, match=r"did not answer within 0\.2 s"):
            opened.bars[0].read32(0)
        opened.io.timeout = 10.0  # type: ignore[attr-defined]
        assert opened.bars[0].read32(4) == 0x55667788  # the late answer is not taken for this one


@pytest.mark.parametrize("twin", [True, False], ids=["twin socket", "one socket"])
def test_control_c_while_waiting_for_a_register(path: Path, device: Everything, twin: bool) -> None:
    with serving(device, path):
        io, mapper = vfio_user.connect(path, twin=twin)
        for _ in range(3):
            with device.lock:  # the server cannot answer
                timer = threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT))
                timer.start()
                begin = time.monotonic()
                with pytest.raises(KeyboardInterrupt):
                    io.read(0, 0, 4)
                timer.join()
                assert time.monotonic() - begin < 5
            assert io.read(0, 4, 4) == b"\x88\x77\x66\x55"  # and the late answer is nobody's
        io.close()
        mapper.close()


def test_a_server_that_ends(edu: tuple[EduDriver, Edu], path: Path) -> None:
    driver, _ = edu
    device = driver.device
    buffer = device.dma.allocate(PAGE)
    vector = driver.enable_interrupts("msi")
    driver.factorial(5)
    assert isinstance(device.io, vfio_user.VfioUserDeviceIo)
    device.io.connection._channel.shut()
    with pytest.raises(vfiopy.DeviceGoneError, match="closed the connection"):
        device.bars[0].read32(0)
    for call in (
        lambda: device.bars[0].write32(4, 1),
        lambda: device.dma.allocate(PAGE),
        lambda: device.config.read32(0),
        lambda: device.reset() if device.can_reset else device.config.command,
        lambda: device.irqs.msi.replace(0),
    ):
        with pytest.raises(vfiopy.DeviceGoneError):
            call()
    buffer.free()
    with pytest.raises(vfiopy.VfioTimeoutError):
        vector.wait(0.01)
    device.close()


def test_a_server_that_ends_while_someone_waits(path: Path, device: Everything) -> None:
    errors: list[BaseException] = []

    def read(io: vfio_user.VfioUserDeviceIo) -> None:
        try:
            io.read(0, 0, 4)
        except vfiopy.VfioError as error:
            errors.append(error)

    with serving(device, path) as server:
        io, mapper = vfio_user.connect(path)
        with device.lock:
            threads = [threading.Thread(target=read, args=(io,)) for _ in range(3)]
            for thread in threads:
                thread.start()
            time.sleep(0.1)
            io.connection._channel.shut()
            for thread in threads:
                thread.join(10)
        wait_for(lambda: not server.connected)
        io.close()
        mapper.close()
    assert [type(error) for error in errors] == [vfiopy.DeviceGoneError] * 3


def test_close_ends_a_wait(path: Path, device: Everything) -> None:
    with serving(device, path):
        io, mapper = vfio_user.connect(path)
        caught: list[BaseException] = []

        def read() -> None:
            try:
                io.read(0, 0, 4)
            except vfiopy.VfiopyError as error:
                caught.append(error)

        with device.lock:
            thread = threading.Thread(target=read)
            thread.start()
            time.sleep(0.1)
            io.close()
            thread.join(10)
        mapper.close()
    assert len(caught) == 1


def test_reconnecting_to_a_new_server(path: Path) -> None:
    with vfiopy.AddressSpace("lasting") as space:
        with serving(Edu(delay=(0.0, 0.0)), path):
            device = vfiopy.open(f"vfio-user:{path}", space=space)
            driver = EduDriver(device)
            device.bus_master = True
            vector = driver.enable_interrupts("msi")
            buffer = device.dma.allocate(2 * BUFFER_SIZE)
        with pytest.raises(vfiopy.DeviceGoneError):
            driver.invert(1)
        assert isinstance(device.io, vfio_user.VfioUserDeviceIo)
        with pytest.raises(vfiopy.DeviceNotFoundError):
            device.io.reconnect()
        with serving(Edu(delay=(0.0, 0.0)), path):
            device.io.reconnect()
            assert not device.bus_master
            device.bus_master = True
            round_trip(driver, buffer, buffer.iova)
            driver.raise_interrupt(1)
            assert vector.wait(5.0) >= 1
        with serving(Everything(), path), pytest.raises(vfiopy.ProtocolError, match="another device"):
            device.io.reconnect()
        device.close()
        buffer.free()
    del buffer, device, driver, vector


def test_opening_what_is_not_there(path: Path, tmp_path: Path) -> None:
    for target in (path, tmp_path, tmp_path / "no" / "where.sock"):
        with pytest.raises(vfiopy.DeviceNotFoundError, match="nobody listens"):
            vfiopy.open(f"vfio-user:{target}")
    with serving(Edu(), path), vfiopy.open(f"vfio-user:{path}"):
        with pytest.raises(vfiopy.DeviceGoneError) as caught:
            vfiopy.open(f"vfio-user:{path}")
        assert "one client at a time" in caught.value.__notes__[0]
        with pytest.raises(vfiopy.NotSupportedError, match="no kernel is involved"):
            vfiopy.open(f"vfio-user:{path}", backend="type1")


def test_users_who_may_not_connect(path: Path) -> None:
    with serving(Edu(), path, users=[os.getuid() + 1]), pytest.raises(vfiopy.DeviceGoneError):
        vfiopy.open(f"vfio-user:{path}")
    with serving(Edu(), path, users=[os.getuid()]), vfiopy.open(f"vfio-user:{path}"):
        pass


def test_a_forked_child_is_refused(path: Path) -> None:
    with serving(Edu(), path), vfiopy.open(f"vfio-user:{path}") as device:
        pid = os.fork()
        if not pid:
            code = 1
            try:
                device.config.read32(0)
            except vfiopy.ForkedError:
                code = 0
            finally:
                os._exit(code)
        assert os.waitpid(pid, 0)[1] == 0
        assert device.config.vendor == 0x1234


def test_another_process_and_its_death(path: Path) -> None:
    script = textwrap.dedent(
        """
        import sys
        from vfiopy import emulated, vfio_user
        server = vfio_user.Server(*emulated.connect("edu"), sys.argv[1])
        print("ready", flush=True)
        server.run()
        """
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, os.fspath(path)], cwd=ROOT, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        with vfiopy.open(f"vfio-user:{path}") as device:
            device.bus_master = True
            driver = EduDriver(device)
            with device.dma.allocate(2 * BUFFER_SIZE) as buffer:
                round_trip(driver, buffer, buffer.iova)
                driver.enable_interrupts("intx")
                assert driver.factorial(6) == 720
                process.send_signal(signal.SIGKILL)
                process.wait()
                with pytest.raises(vfiopy.DeviceGoneError):
                    driver.factorial(6)
    path.unlink()


def test_asyncio_server_and_driver_threads(path: Path) -> None:
    async def main() -> int:
        with vfio_user.Server(*emulated.connect("edu"), path) as server:
            task = asyncio.create_task(server.serve())

            def drive() -> int:
                with vfiopy.open(f"vfio-user:{path}") as device:
                    device.bus_master = True
                    with device.dma.allocate(2 * BUFFER_SIZE) as buffer:
                        round_trip(EduDriver(device), buffer, buffer.iova)
                    return EduDriver(device).factorial(10)

            result = await asyncio.to_thread(drive)
            task.cancel()
        await asyncio.get_running_loop().shutdown_default_executor()
        return result

    assert asyncio.run(main()) == 3628800


# --- servers that are none -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (lambda c, m: reply(c, m, b""), vfiopy.ProtocolError),
        (lambda c, m: reply(c, m, b"\1\0\0\0{}\0"), vfiopy.ProtocolError),
        (lambda c, m: reply(c, m, b"\0\0\0\0junk"), vfiopy.ProtocolError),
        (lambda c, m: reply(c, m, b"\0\0\0\0{}\0", [0]), vfiopy.ProtocolError),  # a twin that nobody announced
        (
            lambda c, m: reply(c, m, encode_version(0, Capabilities.ours(twin_socket=True, fd_index=0))),
            vfiopy.ProtocolError,
        ),
        (
            lambda c, m: reply(c, m, encode_version(0, Capabilities.ours(twin_socket=True, fd_index=3)), [0]),
            vfiopy.ProtocolError,
        ),
        (lambda c, m: c.send(m.id, m.command, 0x21, error=22), vfiopy.ProtocolError),
        (lambda c, m: c.send(m.id, m.command, 0x21, error=0), vfiopy.DeviceGoneError),
        (lambda c, m: c.send(m.id + 1, m.command, 1, [b"\0\0\0\0{}\0"]), vfiopy.ProtocolError),
        (lambda c, m: c.send(m.id, 2, 1, [b"\0\0\0\0{}\0"]), vfiopy.ProtocolError),
        (lambda c, m: c.shut(), vfiopy.DeviceGoneError),
        (lambda c, m: c._socket.send(bytes(16)), vfiopy.ProtocolError),
        (lambda c, m: c._socket.send(wire.HEADER.pack(m.id, 1, 0xFFFF_FFFF, 1, 0)), vfiopy.ProtocolError),
        (lambda c, m: None, vfiopy.VfioTimeoutError),
    ],
)
def test_bad_greetings(answer: Script, error: type[Exception]) -> None:
    with pytest.raises(error):
        FakeServer(answer).connect(timeout=0.3)


@pytest.mark.parametrize(
    "info", [b"", bytes(15), wire.DEVICE_INFO.pack(16, 3, 1000, 5), wire.DEVICE_INFO.pack(16, 3, 9, 1 << 31)]
)
def test_bad_device_info(info: bytes) -> None:
    def script(channel: Channel, message: Message) -> None:
        if message.command == Command.VERSION:
            greet(channel, message)
        else:
            reply(channel, message, info)

    with pytest.raises(vfiopy.ProtocolError):
        FakeServer(script).connect(timeout=1.0)


@pytest.mark.parametrize("payload", [b"", bytes(16), bytes(19), bytes(21)])
def test_bad_answers_to_a_read(payload: bytes) -> None:
    def script(channel: Channel, message: Message) -> None:
        if not plain(channel, message):
            reply(channel, message, payload)

    io, mapper = FakeServer(script).connect()
    with pytest.raises(vfiopy.ProtocolError, match="malformed"):
        io.read(0, 0, 4)
    io.close()
    mapper.close()


@pytest.mark.parametrize("half", [socket.SHUT_RD, socket.SHUT_WR])
@pytest.mark.parametrize("when", ["before", "meanwhile"])
def test_a_server_that_hangs_up_by_half(half: int, when: str) -> None:
    """It takes nothing more, or says nothing more: either way it is gone, at once and for good."""

    def script(channel: Channel, message: Message) -> None:
        if not plain(channel, message):
            channel._socket.shutdown(half)
            if half == socket.SHUT_RD:  # what was asked before still has its answer
                reply(channel, message, bytes(message.payload) + b"1234")

    server = FakeServer(script)
    io, mapper = server.connect(timeout=5.0)
    if when == "before":
        server.channel._socket.shutdown(half)
    elif half == socket.SHUT_RD:
        assert io.read(0, 0, 4) == b"1234"
    begin = time.monotonic()
    for _ in range(2):
        with pytest.raises(vfiopy.DeviceGoneError):
            io.read(0, 0, 4)
    assert time.monotonic() - begin < 2
    assert not io.connection.alive
    io.close()
    mapper.close()


def test_fds_with_answers_that_have_none_are_closed() -> None:
    def script(channel: Channel, message: Message) -> None:
        if not plain(channel, message):
            reply(channel, message, wire.REGION_ACCESS.pack(0, 0, 4) + bytes(4), [channel.fileno()] * 3)

    io, mapper = FakeServer(script).connect()
    before = open_fds()
    with pytest.raises(vfiopy.ProtocolError):
        io.read(0, 0, 4)
    assert open_fds() == before
    io.close()
    mapper.close()


def test_a_region_whose_file_is_too_short_is_not_mapped() -> None:
    fd = os.memfd_create("short")
    os.ftruncate(fd, PAGE)

    def script(channel: Channel, message: Message) -> None:
        if message.command == Command.GET_REGION_INFO:
            index = wire.REGION_INFO.unpack(message.payload).region
            reply(channel, message, wire.REGION_INFO.pack(32, 7, index, 0, 2 * PAGE, 0), [fd])
        else:
            plain(channel, message)

    io, mapper = FakeServer(script).connect()
    assert not io.region_info(0).flags & 4
    with pytest.raises(vfiopy.NotSupportedError):
        io.map_region(0, 0, PAGE)
    io.close()
    mapper.close()
    os.close(fd)


def test_requests_of_the_server_come_at_any_time() -> None:
    """Before an answer, and while nobody asks; wrong ones are refused, and the connection goes on."""
    answers: list[tuple[int, int, bytes]] = []

    def script(channel: Channel, message: Message) -> None:
        if message.is_reply:
            answers.append((message.id, message.error, bytes(message.payload)))
        elif not plain(channel, message):
            channel.send(1, Command.DMA_READ, 0, [wire.DMA_ACCESS.pack(0x1000, 4)])
            channel.send(2, Command.DMA_READ, 0, [bytes(3)])
            channel.send(3, Command.GET_INFO, 0, [bytes(16)])
            channel.send(4, 999, 0)
            reply(channel, message, bytes(message.payload) + b"1234")

    server = FakeServer(script)
    io, mapper = server.connect()
    assert io.read(0, 0, 4) == b"1234"
    wait_for(lambda: len(answers) == 4)
    assert [(number, error) for number, error, _ in answers] == [(1, 14), (2, 22), (3, 38), (4, 38)]
    server.channel.send(5, Command.DMA_READ, 0, [wire.DMA_ACCESS.pack(0, 1)])  # out of the blue
    wait_for(lambda: len(answers) == 5)
    io.close()
    mapper.close()


answers = st.one_of(
    st.tuples(st.just("payload"), st.binary(max_size=80)),
    st.tuples(st.just("raw"), st.binary(min_size=1, max_size=80)),
    st.tuples(st.just("error"), st.integers(0, 200)),
    st.tuples(st.just("request"), st.binary(max_size=40)),
)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(st.lists(answers, min_size=1, max_size=8), st.integers(0, 5))
def test_any_answers(script_of: list[tuple[str, bytes | int]], honest: int) -> None:
    """A server that begins well and then says anything: an error, never a hang, and nothing is left."""
    fds = open_fds()
    turn = iter(script_of)
    seen = [0]

    def script(channel: Channel, message: Message) -> None:
        seen[0] += 1
        if seen[0] <= honest and plain(channel, message):
            return
        kind, value = next(turn, ("payload", b""))
        if kind == "raw":
            channel._socket.send(value)  # type: ignore[arg-type]
        elif kind == "error":
            channel.send(message.id, message.command, 0x21, error=int(value))
        elif kind == "request":
            channel.send(9, Command.DMA_READ, 0, [value])  # type: ignore[list-item]
        else:
            reply(channel, message, value)  # type: ignore[arg-type]

    server = FakeServer(script)
    try:
        io, mapper = server.connect(timeout=0.03)
    except vfiopy.VfiopyError:
        pass
    else:
        for call in (lambda: io.read(0, 0, 4), lambda: io.region_info(2), lambda: io.irq_info(1), io.reset):
            try:
                call()
            except vfiopy.VfiopyError:
                continue
        io.close()
        mapper.close()
    server.join(10)
    assert not server.is_alive()
    gc.collect()
    assert open_fds() == fds


def test_the_docs_run(capsys: pytest.CaptureFixture[str]) -> None:
    text = (ROOT / "docs/vfio-user.md").read_text()
    (block,) = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    exec(compile(block, "docs/vfio-user.md", "exec"), {})
    assert '"driver": "vfio-user-pci"' in capsys.readouterr().out


def test_the_docs_name_every_file() -> None:
    text = (ROOT / "docs/vfio-user.md").read_text()
    files = {path.name for path in Path(vfio_user.__file__).parent.glob("*.py")} - {"__init__.py"}
    assert files == set(re.findall(r"`(\w+\.py)`", text.partition("## Where things live")[2]))

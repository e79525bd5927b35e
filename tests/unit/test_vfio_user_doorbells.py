"""Ioeventfds: what a device declares, what a client gets, and what ringing does."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
from emulated_support import Everything, set_command, wait_for
from vfio_user_support import open_fds, raw_client, serving

from vfiopy import vfio_user
from vfiopy.backend import Doorbell
from vfiopy.errors import ProtocolError
from vfiopy.vfio_user import wire
from vfiopy.vfio_user.doorbells import decode_io_fds
from vfiopy.vfio_user.wire import Command

MEMORY = 2


class Bells(Everything):
    doorbells = {0: tuple(Doorbell(0x100 + 4 * n, 4, 7 if n == 1 else None) for n in range(20))}  # noqa: RUF012


@pytest.fixture
def device() -> Bells:
    return Bells()


@pytest.fixture
def io(device: Bells, tmp_path: Path) -> Iterator[vfio_user.VfioUserDeviceIo]:
    path = tmp_path / "x.sock"
    with serving(device, path):
        far, mapper = vfio_user.connect(path)
        yield far
        far.close()
        mapper.close()


def test_ringing_is_a_write(io: vfio_user.VfioUserDeviceIo, device: Bells) -> None:
    bells = io.doorbell_fds(0)
    assert [bell.doorbell for bell in bells] == list(device.doorbells[0][:16])  # as many as fds go with a message
    os.eventfd_write(bells[0].fd, 5)
    wait_for(lambda: device.accesses == [("write", 0, 0x100, 4, 0)])
    os.eventfd_write(bells[1].fd, 1)
    wait_for(lambda: len(device.accesses) == 2)
    assert device.accesses[1] == ("write", 0, 0x104, 4, 7)
    again = io.doorbell_fds(0)  # the same ones
    os.eventfd_write(again[0].fd, 1)
    wait_for(lambda: len(device.accesses) == 3)
    for bell in (*bells, *again):
        os.close(bell.fd)


def test_regions_without_doorbells(io: vfio_user.VfioUserDeviceIo) -> None:
    assert io.doorbell_fds(2) == []
    assert io.doorbell_fds(7) == []


def test_writes_that_become_eventfds(io: vfio_user.VfioUserDeviceIo, device: Bells) -> None:
    fds = open_fds()
    io.write(0, 0x100, b"\x05\0\0\0")
    assert device.accesses.pop() == ("write", 0, 0x100, 4, 5)  # a message like any other
    assert io.ring_by_eventfd(2) == 0
    assert io.ring_by_eventfd(0) == 16
    assert io.ring_by_eventfd(0) == 16  # none twice
    ring_fds = len(open_fds() - fds)
    assert ring_fds == 32  # 16 here, and the same in the server, which is in this process
    io.write(0, 0x100, b"\x05\0\0\0")
    wait_for(lambda: device.accesses == [("write", 0, 0x100, 4, 0)])  # which says that it was an eventfd
    io.write(0, 0x104, b"\x07\0\0\0")
    wait_for(lambda: device.accesses[1:] == [("write", 0, 0x104, 4, 7)])
    device.accesses.clear()
    io.write(0, 0x104, b"\x08\0\0\0")  # not the value that it stands for
    io.write(0, 0x100, b"\x05\0")  # nor its width
    io.write(0, 0x160, b"\x01\0\0\0")  # nor a doorbell that came with an eventfd
    io.read(0, 0, 4)
    assert [access[-1] for access in device.accesses[:3]] == [8, 5, 1]


def test_a_doorbell_of_a_silent_bar_does_nothing(io: vfio_user.VfioUserDeviceIo, device: Bells) -> None:
    bells = io.doorbell_fds(0)
    set_command(io, off=MEMORY)
    os.eventfd_write(bells[0].fd, 1)
    assert io.read(7, 0, 2) == b"\x36\x1b"
    set_command(io, on=MEMORY)
    assert device.accesses == []
    for bell in bells:
        os.close(bell.fd)


def test_a_blocking_eventfd_does_not_stop_the_server(io: vfio_user.VfioUserDeviceIo, device: Bells) -> None:
    bells = io.doorbell_fds(0)
    for bell in bells:
        os.set_blocking(bell.fd, True)  # its flags are the server's too
    for _ in range(200):
        os.eventfd_write(bells[0].fd, 1)
        os.set_blocking(bells[0].fd, False)
        try:
            os.eventfd_read(bells[0].fd)  # a race for the count
        except BlockingIOError:
            continue
        finally:
            os.set_blocking(bells[0].fd, True)
    assert io.read(7, 0, 2) == b"\x36\x1b"
    for bell in bells:
        os.close(bell.fd)


def test_on_the_wire(device: Bells) -> None:
    with serving(device) as server:
        before = open_fds()
        with raw_client(server) as client:
            short = client.ask(Command.GET_REGION_IO_FDS, wire.IO_FDS.pack(16, 0, 0, 0))
            assert short == wire.IO_FDS.pack(16 + 16 * 40, 0, 0, 0)
            assert not client.fds
            whole = client.ask(Command.GET_REGION_IO_FDS, wire.IO_FDS.pack(4096, 0, 0, 0))
            assert wire.IO_FDS.unpack(whole) == (16 + 16 * 40, 0, 0, 16)
            assert wire.IO_FD.unpack(whole, 16 + 40) == (0x104, 4, 1, 0, 1, 0, 7)
            assert len(client.fds) == 16
        wait_for(lambda: not server.connected)
        assert open_fds() == before


@pytest.mark.parametrize(
    "reply",
    [
        b"",
        wire.IO_FDS.pack(56, 0, 0, 1),
        wire.IO_FDS.pack(56, 0, 0, 0xFFFF_FFFF) + bytes(40),
        wire.IO_FDS.pack(56, 0, 0, 1) + wire.IO_FD.pack(0, 4, 1, 0, 0, 0, 0),
    ],
)
def test_malformed_replies(reply: bytes) -> None:
    fd = os.eventfd(0)
    before = open_fds()
    with pytest.raises(ProtocolError):
        decode_io_fds(reply, [fd], 0)
    assert open_fds() == before
    os.close(fd)


def test_longer_entries_and_other_types() -> None:
    """libvfio-user's entries have 48 bytes; ioregionfds and entries without an fd are passed over."""
    fd = os.eventfd(0)
    entries = [(0, 4, 0, 0, 0, 0, 0), (4, 4, 0, 1, 0, 0, 0), (8, 4, 0xFFFF_FFFF, 0, 0, 0, 0), (12, 4, 0, 0, 1, 0, 9)]
    body = b"".join(wire.IO_FD.pack(*entry) + bytes(8) for entry in entries)
    found = decode_io_fds(struct.pack("=IIII", 16 + len(body), 0, 0, 4) + body, [fd], 0)
    assert [one.doorbell for one in found] == [Doorbell(0, 4), Doorbell(12, 4, 9)]
    for number in (fd, *(one.fd for one in found)):
        os.close(number)

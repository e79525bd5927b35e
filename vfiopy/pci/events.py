"""Events of the PCI bus as they happen: functions that come, go, and get or lose a driver."""

from __future__ import annotations

import select
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from vfiopy.errors import NotSupportedError, PciAddressError
from vfiopy.lives import Resource
from vfiopy.pci.address import PciAddress

__all__ = ["Event", "Monitor", "monitor"]

_NETLINK_KOBJECT_UEVENT = 15  # linux/netlink.h
_KERNEL_GROUP = 1
_ROOM = 16384  # an event has 2 KiB at most (UEVENT_BUFFER_SIZE)
_BUFFER = 1 << 20  # of events not read yet


class Event(NamedTuple):
    """What happened to a function.

    Attributes:
        action: ``"add"``, ``"remove"``, ``"bind"``, ``"unbind"``, ``"change"``.
        address: the function.
        driver: the driver that it got, at ``"bind"`` and ``"add"``.
        node: of events about a function's VFIO character device, its name (``"vfio0"``); see :func:`monitor`.
    """

    action: str
    address: PciAddress
    driver: str | None
    node: str | None = None


class Monitor(Resource):
    """A stream of events from the moment it was made. Made by :func:`monitor`.

    Use :meth:`wait`, iterate, or wait on :meth:`fileno` with select or asyncio and then call ``wait(0)``.

    Threads: one at a time.
    """

    def __init__(self, source: _Source, label: str) -> None:
        super().__init__(label)
        self._source = source

    def fileno(self) -> int:
        """File descriptor that becomes readable when there is an event, maybe of another bus."""
        self.check_open()
        return self._source.fileno()

    def wait(self, timeout: float | None = None) -> Event | None:
        """The next event of the PCI bus; None after ``timeout`` seconds, never where that is None."""
        self.check_open()
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            if not select.select([self._source.fileno()], [], [], left)[0]:
                return None
            event = self._source.read()
            if event is not None:
                return event

    def __iter__(self) -> Iterator[Event]:
        while True:
            event = self.wait()
            if event is not None:
                yield event

    def _release(self) -> None:
        self._source.close()


def monitor(*, udev: bool | None = None, nodes: bool = False) -> Monitor:
    """Watch the PCI bus.

    Args:
        nodes: watch the character devices of functions that are VFIO's, too (subsystem ``vfio-dev``).
        udev: True: events that udev has finished with, so that node permissions are set already; needs
            pyudev and a running udev. False: the kernel's own, at once. None: udev's where it runs, else the
            kernel's.

    Raises:
        NotSupportedError: udev was asked for and is not there.
    """
    if udev is None:
        udev = _udev_runs() and _pyudev() is not None
    if not udev:
        return Monitor(_Kernel(nodes), "monitor of the kernel's PCI events")
    pyudev = _pyudev()
    if pyudev is None:
        raise NotSupportedError(
            "pyudev or libudev is not installed",
            object="udev monitor",
            hint="install them, or take the kernel's events: monitor(udev=False)",
        )
    return Monitor(_Udev(pyudev, nodes), "monitor of udev's PCI events")


_CONTROL = "/run/udev/control"


def _udev_runs(sockets: Path = Path("/proc/net/unix")) -> bool:
    """Whether udevd listens: its socket's path stays behind when it ends, and nobody sends its events then."""
    try:
        return any(line.split()[-1] == _CONTROL for line in sockets.read_text(errors="replace").splitlines() if line)
    except OSError:
        return False


def _pyudev() -> Any:
    try:
        import pyudev  # noqa: PLC0415  only when first needed

        pyudev.Context()
    except (ImportError, OSError):
        return None
    return pyudev


class _Source:
    fileno: Callable[[], int]

    def read(self) -> Event | None:
        raise NotImplementedError

    def close(self) -> None:
        raise NotImplementedError


class _Kernel(_Source):
    """The kernel's uevents: header, then KEY=value, each ended by a zero byte (lib/kobject_uevent.c)."""

    def __init__(self, nodes: bool) -> None:
        self._nodes = nodes
        self._socket = socket.socket(
            socket.AF_NETLINK,
            socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK,
            _NETLINK_KOBJECT_UEVENT,
        )
        try:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER)
            self._socket.bind((0, _KERNEL_GROUP))
        except BaseException:
            self._socket.close()
            raise
        self.fileno = self._socket.fileno

    def read(self) -> Event | None:
        try:
            data, sender = self._socket.recvfrom(_ROOM)
        except BlockingIOError:
            return None
        if sender[0]:  # not the kernel
            return None
        fields = dict(part.split("=", 1) for part in data.decode("utf-8", "replace").split("\0") if "=" in part)
        if self._nodes and fields.get("SUBSYSTEM") == "vfio-dev":
            return _of_node(fields["ACTION"], fields.get("DEVPATH", ""))
        if fields.get("SUBSYSTEM") != "pci" or "PCI_SLOT_NAME" not in fields:
            return None
        return Event(fields["ACTION"], PciAddress.parse(fields["PCI_SLOT_NAME"]), fields.get("DRIVER"))

    def close(self) -> None:
        self._socket.close()


def _of_node(action: str, path: str) -> Event | None:
    """``/devices/pci0000:00/0000:00:05.0/vfio-dev/vfio0``; mediated devices have another parent."""
    parts = path.split("/")
    try:
        return Event(action, PciAddress.parse(parts[-3]), None, parts[-1])
    except (IndexError, PciAddressError):
        return None


class _Udev(_Source):
    def __init__(self, pyudev: Any, nodes: bool) -> None:
        self._monitor = pyudev.Monitor.from_netlink(pyudev.Context())
        self._monitor.filter_by("pci")
        if nodes:
            self._monitor.filter_by("vfio-dev")
        self._monitor.start()
        self.fileno = self._monitor.fileno

    def read(self) -> Event | None:
        device = self._monitor.poll(0)
        if device is None:
            return None
        if device.subsystem == "vfio-dev":
            return _of_node(device.action, device.device_path)
        return Event(device.action, PciAddress.parse(device.sys_name), device.properties.get("DRIVER"))

    def close(self) -> None:
        # pyudev closes with the object; nothing else refers to it
        del self._monitor

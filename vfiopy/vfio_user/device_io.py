"""A device behind a vfio-user socket: the seam's ``DeviceIo``, by messages, and mapped where the server shares."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Final

from vfiopy import uapi
from vfiopy.backend import (
    DeviceInfo,
    IrqAction,
    IrqFlag,
    IrqInfo,
    RegionIndex,
    RegionInfo,
    Window,
)
from vfiopy.errors import AddressRangeError, DeviceGoneError, ProtocolError, StateError, VfioError
from vfiopy.vfio_user import wire
from vfiopy.vfio_user.client_features import MOST_READ, MOST_WRITE, FeatureRequests
from vfiopy.vfio_user.client_irqs import ClientIrqs
from vfiopy.vfio_user.client_regions import ClientRegions
from vfiopy.vfio_user.connection import Connection
from vfiopy.vfio_user.doorbells import Bells, DoorbellFd
from vfiopy.vfio_user.power import PowerState, power_up
from vfiopy.vfio_user.wire import Command

__all__ = ["VfioUserDeviceIo"]

_MOST_REGIONS: Final = 256
_CONFIG: Final = int(RegionIndex.CONFIG)
_BAR5: Final = int(RegionIndex.BAR5)


class VfioUserDeviceIo(FeatureRequests):
    """A device that a server offers.

    Opening leaves it as vfio-pci does: reset where it can be, in D0, BARs placed, memory decode on, bus mastering off.

    Writes to BARs are posted, as a bus does: they return at once, and are done before anything that comes later. After
    a change of configuration space that could make the BARs fall silent, one is waited for, so that its error is seen.
    Where a part of the device is mapped, all are waited for: or a mapped access might overtake one.

    Threads: may be shared; ``close`` is the last call.

    Args:
        connection: taken over.
        name: ``vfio-user:`` and the path.
        on_reconnect: makes a new connection, for :meth:`reconnect`.

    Attributes:
        connection: for who wants to send messages of their own.
    """

    _rank = 20

    def __init__(
        self, connection: Connection, name: str, *, on_reconnect: Callable[[], Connection] | None = None
    ) -> None:
        super().__init__(name)
        self._use(connection)
        self._on_reconnect = on_reconnect
        self._regions = ClientRegions(name, self._request_fds)
        self._known = self._regions.known
        self._irqs = ClientIrqs(name, self._send_irqs)
        self._irq_infos: dict[int, IrqInfo] = {}
        self._posting = False
        self._bells = Bells()
        self._power = PowerState(-1)
        try:
            self._info = self._ask_info()
            self._start()
        except BaseException:
            self.abandon()
            raise

    def _use(self, connection: Connection) -> None:
        self.connection = connection
        self._read_quickly = connection.read_quickly
        self._post_quickly = connection.post_quickly

    @property
    def name(self) -> str:
        """``vfio-user:`` and the socket's path."""
        return self._label

    @property
    def backend(self) -> str:
        """``"vfio-user"``."""
        return "vfio-user"

    @property
    def timeout(self) -> float:
        """Seconds that the server has for each answer; may be assigned."""
        return self.connection.timeout

    @timeout.setter
    def timeout(self, seconds: float) -> None:
        self.connection.timeout = seconds

    def _start(self) -> None:
        """Do what the kernel does at the first open, and firmware before it."""
        if self._info.can_reset:
            self._request(Command.RESET)
        if self._info.is_pci and self.region_info(_CONFIG).size:
            self._power = power_up(self)
        self._look_at_power()

    # --- what it is --------------------------------------------------------------------------------------------------

    def info(self) -> DeviceInfo:
        """Describe the device; asked once."""
        self.check_open()
        return self._info

    def _ask_info(self) -> DeviceInfo:
        size = wire.DEVICE_INFO.size
        record = wire.DEVICE_INFO.unpack(self._request(Command.GET_INFO, wire.DEVICE_INFO.pack(size, 0, 0, 0)))
        if record.num_regions > _MOST_REGIONS or record.num_irqs > _MOST_REGIONS:
            raise self._regions.malformed(
                f"a device of {record.num_regions} regions and {record.num_irqs} interrupt indexes"
            )
        return DeviceInfo(
            record.num_regions,
            record.num_irqs,
            can_reset=bool(record.flags & uapi.VFIO_DEVICE_FLAGS_RESET),
            is_pci=bool(record.flags & uapi.VFIO_DEVICE_FLAGS_PCI),
        )

    def region_info(self, index: int) -> RegionInfo:
        """Describe a region; asked once. Size 0 where the device has none of this index."""
        self.check_open()
        found = self._regions.known.get(index)
        if found is None:
            if not 0 <= index < self._info.num_regions:
                raise AddressRangeError(f"there is no region {index}", object=self._label)
            found = self._regions.ask(index)
        return found

    def irq_info(self, index: int) -> IrqInfo:
        """Describe an interrupt index; asked once. Count 0 where the device has none of this kind."""
        self.check_open()
        found = self._irq_infos.get(index)
        if found is None:
            if not 0 <= index < self._info.num_irqs:
                raise AddressRangeError(f"there is no interrupt index {index}", object=self._label)
            found = self._irq_infos[index] = self._ask_irq(index)
        return found

    def _ask_irq(self, index: int) -> IrqInfo:
        size = wire.IRQ_INFO.size
        try:
            record = wire.IRQ_INFO.unpack(self._request(Command.GET_IRQ_INFO, wire.IRQ_INFO.pack(size, 0, index, 0)))
        except AddressRangeError:
            return IrqInfo(index, 0, IrqFlag(0))
        if record.irq != index:
            raise self._regions.malformed(f"interrupt index {record.irq} instead of {index}")
        return IrqInfo(index, record.vectors, IrqFlag(record.flags & 0xF))

    # --- registers ---------------------------------------------------------------------------------------------------

    def read(self, index: int, offset: int, size: int) -> bytes:
        """Read bytes. An aligned read of 1, 2, 4 or 8 bytes is one message.

        Raises:
            AddressRangeError: outside of the region.
            DeviceGoneError: the device or the server does not answer.
        """
        # The way of registers, flat because each level costs as much as the native call. It declines after close().
        info = self._known.get(index)
        if info is not None and 0 < size <= 8 and 0 <= offset <= info.size - size:
            data = self._read_quickly(index, offset, size)
            if data.__class__ is bytes:
                return data
            self.check_open()
            return self.connection.read_region(index, offset, size, data)
        self._check_range(index, offset, size)
        most = min(MOST_READ, self.connection.peer.max_data_xfer_size)
        return b"".join(
            self.connection.read_region(index, at, min(most, offset + size - at))
            for at in range(offset, offset + size, most)
        )

    def write(self, index: int, offset: int, data: bytes) -> None:
        """Write bytes. An aligned write of 1, 2, 4 or 8 bytes is one message, and posted where it can be.

        Raises:
            AddressRangeError: outside of the region.
            DeviceGoneError: the device or the server does not answer.
        """
        size = len(data)
        # An eventfd takes what nobody hears any more; a message does not.
        if self._bells and self.connection.alive and self._bells.ring(index, offset, data):
            return
        if self._posting and size <= 8 and index <= _BAR5:
            info = self._known.get(index)
            if info is not None and 0 <= offset <= info.size - size and data.__class__ is bytes:
                gone = self._post_quickly(index, offset, data)
                if not gone:
                    self.check_open()
                    self.connection.post_write(index, offset, data, gone)
                return
        self._check_range(index, offset, size)
        most = min(MOST_WRITE, self.connection.peer.max_data_xfer_size)
        for start in range(0, size, most):
            piece = data[start : start + most]
            self._request(
                Command.REGION_WRITE, wire.REGION_ACCESS.pack(offset + start, index, len(piece)), bytes(piece)
            )
        if index == _CONFIG:
            if self._power.concerned(offset, size):
                self._look_at_power()
        elif index <= _BAR5:
            self._posting = not self._regions.windows

    def write_burst(self, index: int, offset: int, width: int, step: int, data: bytes) -> None:
        """Write one register after another: see :class:`vfiopy.backend.BurstIo`.

        Where the server has ``write_multiple``, in few messages, which are posted as single writes are.

        Raises:
            AddressRangeError: outside of the region.
            DeviceGoneError: the device or the server does not answer.
        """
        count = len(data) // width
        self._check_range(index, offset, step * (count - 1) + width if count else 0)
        single = count  # how many go by themselves
        if self.connection.peer.write_multiple and index <= _BAR5 and not self._bells:
            single = 0 if self._posting else 1  # which tells whether the others can be posted
        for number in range(min(single, count)):
            self.write(index, offset + number * step, data[number * width : (number + 1) * width])
        most = (min(MOST_WRITE, self.connection.peer.max_data_xfer_size) - wire.WRITE_MULTI.size) // wire.WRITE.size
        for start in range(single, count, max(1, most)):
            numbers = range(start, min(count, start + max(1, most)))
            writes = b"".join(
                wire.WRITE.pack(offset + number * step, index, width, data[number * width : (number + 1) * width])
                for number in numbers
            )
            self._send_writes(wire.WRITE_MULTI.pack(len(numbers)), writes)

    def _send_writes(self, count: bytes, writes: bytes) -> None:
        if self._posting:
            self.connection.post(Command.REGION_WRITE_MULTI, count, writes)
        elif self._request(Command.REGION_WRITE_MULTI, count, writes)[: len(count)] != count:
            raise self._regions.malformed("not all of the writes were done")

    def _check_range(self, index: int, offset: int, size: int) -> None:
        info = self._known.get(index)
        if info is None or not self._open or self._pid != os.getpid():
            info = self.region_info(index)
        if offset < 0 or size < 0 or offset + size > info.size:
            self._regions.check(info, offset, size)

    def _look_at_power(self) -> None:
        """Follow what configuration space now says: whether mapped BARs answer, and posted writes may be lost."""
        self._posting = False
        if self._power.known and self._regions.windows:
            on = self._power.memory_answers(self)
            for window in self._regions.windows:
                window.show(on)

    def map_region(self, index: int, offset: int, size: int) -> Window:
        """Map a part of a region that the server shares. With memory decode off, touching it is a SIGBUS.

        Raises:
            NotSupportedError: the server does not share the region, or this part of it.
            AddressRangeError: outside of the region.
            AlignmentError: not whole pages.
        """
        window = self._regions.map(self.region_info(index), offset, size)
        self._look_at_power()
        return window

    def ring_by_eventfd(self, index: int) -> int:
        """From now on write a region's doorbells by eventfd, where the server gives one; return how many there are.

        The server is woken once for many. Not done by itself, because such a write is not the same: it is not ordered
        with others (what posted writes before it say may arrive later), several may become one, and of a doorbell that
        stands for any value the value is lost. So it is for registers that say "look again" at something in memory.

        Raises:
            AddressRangeError: no such region.
        """
        return self._bells.take(index, self.doorbell_fds(index))

    def doorbell_fds(self, index: int) -> list[DoorbellFd]:
        """Ask for the eventfds that do what a write to certain registers does, for who rings from elsewhere (KVM).

        :meth:`ring_by_eventfd` uses them for writes. The fds are the caller's.

        Raises:
            AddressRangeError: no such region.
        """
        self.region_info(index)
        return self._regions.doorbell_fds(index)

    # --- the rest ----------------------------------------------------------------------------------------------------

    def set_irqs(
        self,
        index: int,
        action: IrqAction,
        start: int,
        count: int,
        *,
        fds: Sequence[int] | None = None,
        bools: Sequence[bool] | None = None,
    ) -> None:
        """VFIO_DEVICE_SET_IRQS: eventfds go to the server in as many messages as its limit asks for.

        Raises:
            AddressRangeError: (EINVAL) no such index or vectors, or what the server refuses.
            NotSupportedError: (ENOTTY) this kind cannot be masked.
        """
        self.check_open()
        self._irqs.set(index, action, start, count, fds, bools, self._most_fds())

    def _most_fds(self) -> int:
        return max(1, self.connection.peer.max_msg_fds)

    def _send_irqs(self, payload: bytes, fds: Sequence[int], detail: str) -> None:
        self._request(Command.SET_IRQS, payload, fds=fds, detail=detail)

    def reset(self) -> None:
        """Reset the function; what the server does with configuration space is its own.

        Raises:
            NotSupportedError: it has no function reset.
        """
        self.check_open()
        self._request(Command.RESET)
        self._look_at_power()

    def reconnect(self) -> None:
        """Connect again after the server died or was replaced: mappings and interrupts are set up anew.

        The device is reset, where it can be, and starts as at :func:`vfiopy.open`: its driver begins from the start.

        Raises:
            DeviceNotFoundError: nobody listens.
            StateError: parts of its BARs are mapped, or the socket was handed in and has no path.
            ProtocolError: another device is there now.
        """
        self.check_open()
        if any(self._regions.windows):
            raise StateError(f"{self._label} cannot be connected again while parts of its BARs are mapped")
        if self._on_reconnect is None:
            raise StateError(f"{self._label} was handed in as a socket: there is no path to connect to again")
        self.connection.close()
        before = (self._info, {index: info.size for index, info in self._known.items()})
        self._regions.forget()
        self._use(self._on_reconnect())
        self._irq_infos.clear()
        self._info = self._ask_info()
        if (self._info, {index: self.region_info(index).size for index in before[1]}) != before:
            self.connection.close()
            raise ProtocolError("another device is behind the socket now", object=self._label, hint="open it anew")
        self._start()
        self._irqs.repeat(self._most_fds())
        for index in self._bells.forget():
            self.ring_by_eventfd(index)

    # --- end ---------------------------------------------------------------------------------------------------------

    def _release(self) -> None:
        if any(self._regions.windows):
            raise StateError(f"{self.name} cannot be closed while parts of its BARs are mapped")
        self._settle()
        self.connection.close()
        self._regions.forget()
        self._bells.forget()
        self._irqs.close()

    def _settle(self) -> None:
        """Have posted writes done before the server sees the end."""
        with suppress(VfioError):
            if self._posting:
                self._request(Command.GET_INFO, wire.DEVICE_INFO.pack(wire.DEVICE_INFO.size, 0, 0, 0))

    def _leftover(self) -> Callable[[], None]:
        return self.abandon

    def abandon(self) -> None:
        """Close, windows and all."""
        for window in self._regions.windows:
            window.close()
        with suppress(DeviceGoneError):
            self.close()

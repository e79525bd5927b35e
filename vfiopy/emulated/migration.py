"""VFIO's migration of an emulated device: the states, the stream of its content, and the log of what its DMA writes.

States and arcs: linux/vfio.h, enum vfio_device_mig_state, in the subset that vfio-user has. The stream's format is
ours, and made for two copies of the same class: a head, then records of a kind and a length.
"""

from __future__ import annotations

import errno
import struct
from collections import deque
from collections.abc import Iterator
from typing import Final

from vfiopy import uapi
from vfiopy.emulated.pci_device import PciDevice
from vfiopy.errors import NotSupportedError, VfioError

__all__ = ["Migration"]

ERROR: Final = uapi.VFIO_DEVICE_STATE_ERROR
STOP: Final = uapi.VFIO_DEVICE_STATE_STOP
RUNNING: Final = uapi.VFIO_DEVICE_STATE_RUNNING
STOP_COPY: Final = uapi.VFIO_DEVICE_STATE_STOP_COPY
RESUMING: Final = uapi.VFIO_DEVICE_STATE_RESUMING
PRE_COPY: Final = uapi.VFIO_DEVICE_STATE_PRE_COPY
_SAVING: Final = (STOP_COPY, PRE_COPY)
_ARCS: Final = {
    (RUNNING, STOP),
    (STOP, RUNNING),
    (STOP, STOP_COPY),
    (STOP_COPY, STOP),
    (STOP, RESUMING),
    (RESUMING, STOP),
    (RUNNING, PRE_COPY),
    (PRE_COPY, RUNNING),
    (PRE_COPY, STOP_COPY),
}
_PATIENCE: Final = 1.0  # seconds that STOP waits for work that is running
_HEAD: Final = struct.Struct("=8s32s")
_RECORD: Final = struct.Struct("=III")  # kind, argument, bytes that follow
_MAGIC: Final = b"vfiopy01"
_MEMORY, _CONFIG, _DEVICE, _END = 1, 2, 3, 4
_CHUNK: Final = 4096
_MOST_DATA: Final = 1 << 30


class Migration:
    """The migration state of one device.

    Threads: one at a time.
    """

    def __init__(self, device: PciDevice) -> None:
        self._device = device
        self.state = RUNNING
        self._stream: deque[bytes] = deque()
        self._sent: dict[int, bytes] = {}  # memory as the other side has it, by BAR
        self._received = bytearray()

    def reset(self) -> None:
        """Go back to RUNNING, after the function was reset."""
        self._end_session()
        self.state = RUNNING
        self._device.engine.resume()

    # --- states ------------------------------------------------------------------------------------------------------

    def move(self, wanted: int) -> None:
        """Take the device to another state, by the shortest way without a saving state in between.

        Raises:
            VfioError: (EINVAL) there is no way, or what was loaded is not this device's; (EBUSY) work is running that
                does not end, because it waits for the client.
        """
        for state in self._way(wanted):
            self._step(state)
            self.state = state

    def _way(self, wanted: int) -> list[int]:
        # The specification forbids one pair, although there is a way.
        ways = deque([[self.state]] if (self.state, wanted) != (STOP_COPY, PRE_COPY) else [])
        while ways:
            way = ways.popleft()
            if way[-1] == wanted:
                return way[1:]
            if len(way) == 1 or way[-1] not in _SAVING:
                ways.extend([*way, end] for start, end in sorted(_ARCS) if start == way[-1] and end not in way)
        raise VfioError(
            f"there is no way from migration state {self.state} to {wanted}",
            errno=errno.EINVAL,
            object=self._device.name,
            hint="reset the function to leave ERROR" if self.state == ERROR else "",
        )

    def _step(self, state: int) -> None:
        arc = (self.state, state)
        if state == STOP and self.state == RUNNING:
            self._stop()
        elif arc == (PRE_COPY, STOP_COPY):
            self._stop()
            self._stream.extend(self._final())
        elif arc == (STOP, STOP_COPY):
            self._stream.extend((self._head(), *self._memory(), *self._final()))
        elif arc == (RUNNING, PRE_COPY):
            self._stream.extend((self._head(), *self._memory()))
        elif arc == (RESUMING, STOP):
            self._load()
        elif state == RUNNING:
            self._end_session()
            self._device.engine.resume()
        elif state in (STOP, RESUMING):
            self._end_session()

    def _stop(self) -> None:
        if not self._device.engine.pause(_PATIENCE):
            self._device.engine.resume()
            raise VfioError(
                "the device's work does not come to an end",
                errno=errno.EBUSY,
                object=self._device.name,
                hint="it waits for memory of the client: answer its DMA requests, then try again",
            )

    def _end_session(self) -> None:
        self._stream.clear()
        self._sent.clear()
        self._received.clear()

    # --- saving ------------------------------------------------------------------------------------------------------

    def read(self, size: int) -> bytes:
        """Return the next bytes of the stream; fewer than asked for at its end, or until there is more.

        Raises:
            VfioError: (EINVAL) nothing is being saved.
        """
        if self.state not in _SAVING:
            raise self._not_now("saved")
        data = bytearray()
        while self._stream and len(data) < size:
            piece, room = self._stream.popleft(), size - len(data)
            data += piece[:room]
            if len(piece) > room:
                self._stream.appendleft(piece[room:])
        return bytes(data)

    def _head(self) -> bytes:
        return _HEAD.pack(_MAGIC, self._device.name.encode()[:32])

    def _memory(self) -> Iterator[bytes]:
        """What of the shared BARs the other side does not have yet."""
        for index, memory in self._device.memories.items():
            now, sent = bytes(memory.view), self._sent.get(index)
            for start in range(0, len(now), _CHUNK):
                piece = now[start : start + _CHUNK]
                known = bytes(len(piece)) if sent is None else sent[start : start + _CHUNK]
                if piece != known:
                    yield _RECORD.pack(_MEMORY, index << 24 | start // _CHUNK, len(piece)) + piece
            self._sent[index] = now

    def _final(self) -> Iterator[bytes]:
        device = self._device
        with device.lock:
            yield from self._memory()
            config = device.config.read(0, device.config.size)
            yield _RECORD.pack(_CONFIG, 0, len(config)) + config
            content = device.save()
            yield _RECORD.pack(_DEVICE, 0, len(content)) + content
            yield _RECORD.pack(_END, 0, 0)

    # --- loading -----------------------------------------------------------------------------------------------------

    def write(self, data: bytes) -> None:
        """Take the next bytes of a stream.

        Raises:
            VfioError: (EINVAL) nothing is being loaded; (ENOSPC) it is too long.
        """
        if self.state != RESUMING:
            raise self._not_now("loaded")
        if len(self._received) + len(data) > _MOST_DATA:
            raise VfioError("the stream has no end", errno=errno.ENOSPC, object=self._device.name)
        self._received += data

    def _load(self) -> None:
        """Put what was received into the device, all of it or, where it is not this device's, nothing."""
        records = list(self._records(bytes(self._received)))
        kinds = [kind for kind, _, _ in records]
        if kinds.count(_CONFIG) != 1 or kinds.count(_DEVICE) != 1:
            raise self._refusal("it is not complete")
        device = self._device
        with device.lock:
            for kind, _, data in records:
                if kind == _CONFIG:
                    device.config.check_same_function(data)
            for memory in device.memories.values():
                memory.view[:] = bytes(memory.size)
            for kind, where, data in records:
                if kind == _MEMORY:
                    start = (where & 0xFF_FFFF) * _CHUNK
                    device.memories[where >> 24].view[start : start + len(data)] = data
                elif kind == _CONFIG:
                    device.config.load(data)
                else:
                    device.engine.cancel()
                    self._load_device(data)
        self._end_session()

    def _load_device(self, data: bytes) -> None:
        try:
            self._device.load(data)
        except ValueError as error:
            raise self._refusal(str(error)) from error

    def _records(self, stream: bytes) -> Iterator[tuple[int, int, bytes]]:
        if stream[: _HEAD.size] != self._head():
            raise self._refusal("it is another device's, or of another version")
        at = _HEAD.size
        while at + _RECORD.size <= len(stream):
            kind, where, size = _RECORD.unpack_from(stream, at)
            at += _RECORD.size
            data = stream[at : at + size]
            at += size
            if len(data) < size:
                break
            if kind == _END and at == len(stream):
                return
            memory = self._device.memories.get(where >> 24) if kind == _MEMORY else None
            if kind == _MEMORY:
                if memory is None or (where & 0xFF_FFFF) * _CHUNK + size > memory.size:
                    raise self._refusal("it has memory that this device has not")
            elif kind not in (_CONFIG, _DEVICE):
                raise self._refusal(f"it has a record of kind {kind}")
            yield kind, where, data
        raise self._refusal("it ends too early")

    def _not_now(self, what: str) -> VfioError:
        return VfioError(
            f"nothing is being {what} in migration state {self.state}",
            errno=errno.EINVAL,
            object=self._device.name,
            hint="move to STOP_COPY or PRE_COPY to save, to RESUMING to load",
        )

    def _refusal(self, why: str) -> VfioError:
        return VfioError(f"the state to load is refused: {why}", errno=errno.EINVAL, object=self._device.name)

    # --- VFIO_DEVICE_FEATURE -----------------------------------------------------------------------------------------

    def feature(self, number: int, operation: int, data: bytes) -> bytes:
        """Do VFIO_DEVICE_FEATURE_MIGRATION and _MIG_DEVICE_STATE.

        Raises:
            NotSupportedError: (ENOTTY) the device cannot save itself, or the feature has no such operation.
            VfioError: (EINVAL) data that do not fit; and as :meth:`move`.
        """
        get, put = uapi.VFIO_DEVICE_FEATURE_GET, uapi.VFIO_DEVICE_FEATURE_SET
        is_state = number == uapi.VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE
        allowed = get | put if is_state else get
        if not self._device.migratable or operation & (get | put) & ~allowed:
            raise NotSupportedError(
                f"it does not have feature {number}", errno=errno.ENOTTY, object=self._device.name
            )
        if operation & uapi.VFIO_DEVICE_FEATURE_PROBE:
            return b""
        if not is_state:
            return struct.pack("=Q", uapi.VFIO_MIGRATION_STOP_COPY | uapi.VFIO_MIGRATION_PRE_COPY)
        if operation & put:
            if len(data) < 4:
                raise VfioError("no migration state is given", errno=errno.EINVAL, object=self._device.name)
            self.move(struct.unpack_from("=I", data)[0])
        return struct.pack("=Ii", self.state, -1)

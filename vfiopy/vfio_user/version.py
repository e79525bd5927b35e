"""VERSION: what both sides of a connection can do, and what of it is used."""

from __future__ import annotations

import errno
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from vfiopy.errors import ProtocolError
from vfiopy.vfio_user import wire

__all__ = ["Capabilities", "TwinSocket", "decode_version", "encode_version"]

_MAX_JSON: Final = 4096
_MOST_FDS: Final = 1024
# QEMU refuses a server that says more; a peer that says more than this gets as much as this.
_OUR_FDS: Final = 16
_SMALLEST: Final = 64  # bytes of data; the shortest bitmap, and the head of what carries it, fit
_LARGEST: Final = 64 << 20
_OUR_TRANSFER: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class TwinSocket:
    """Whether requests of the server have a socket of their own, and which fd of VERSION's reply that is."""

    supported: bool = False
    fd_index: int | None = None


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What one side says in VERSION. The defaults are those of the specification for who says nothing.

    Attributes:
        max_msg_fds: the most fds that it takes with one message.
        max_data_xfer_size: the most bytes of data that it takes in one access.
        max_dma_maps: the most mappings that it takes.
        pgsizes: page sizes of its DMA mappings, a bit each.
        twin_socket: see :class:`TwinSocket`.
        write_multiple: it takes REGION_WRITE_MULTI.
    """

    max_msg_fds: int = 1
    max_data_xfer_size: int = 1 << 20
    max_dma_maps: int = 65535
    pgsizes: int = 4096
    twin_socket: TwinSocket = TwinSocket()
    write_multiple: bool = False

    @classmethod
    def ours(cls, *, twin_socket: bool = False, fd_index: int | None = None, max_dma_maps: int = 65535) -> Capabilities:
        """What vfiopy offers."""
        return cls(
            max_msg_fds=_OUR_FDS,
            max_data_xfer_size=_OUR_TRANSFER,
            max_dma_maps=max_dma_maps,
            twin_socket=TwinSocket(twin_socket, fd_index),
            write_multiple=True,
        )

    def as_json(self) -> dict[str, Any]:
        """What goes over the wire: nothing that is as the specification's default, because replies must be short."""
        usual = Capabilities()
        shown: dict[str, Any] = {"max_msg_fds": self.max_msg_fds, "max_data_xfer_size": self.max_data_xfer_size}
        if self.max_dma_maps != usual.max_dma_maps:
            shown["max_dma_maps"] = self.max_dma_maps
        if self.pgsizes != usual.pgsizes:
            shown["pgsizes"] = self.pgsizes
        if self.twin_socket.supported:
            twin: dict[str, Any] = {"supported": True}
            if self.twin_socket.fd_index is not None:
                twin["fd_index"] = self.twin_socket.fd_index
            shown["twin_socket"] = twin
        if self.write_multiple:
            shown["write_multiple"] = True
        return {"capabilities": shown}


def encode_version(minor: int, capabilities: Capabilities) -> bytes:
    """Lay out the payload of VERSION."""
    text = json.dumps(capabilities.as_json(), separators=(",", ":")).encode() + b"\0"
    return wire.VERSION.pack(wire.MAJOR, minor) + text


def decode_version(payload: bytes | bytearray) -> tuple[int, Capabilities]:
    """Read the payload of VERSION; return the minor version and what the peer can do.

    Unknown keys are passed over, missing ones have the specification's defaults.

    Raises:
        ProtocolError: (EINVAL) another major version, text that is not JSON, a value of the wrong type or range.
    """
    version = wire.VERSION.unpack(payload)
    if version.major != wire.MAJOR:
        raise _bad(f"version {version.major}.{version.minor} is spoken, only {wire.MAJOR}.x is known")
    text = bytes(payload[wire.VERSION.size :])
    return version.minor, _decode(text) if text else Capabilities()


def _decode(text: bytes) -> Capabilities:
    if len(text) > _MAX_JSON:
        raise _bad(f"{len(text)} bytes of capabilities are more than {_MAX_JSON}")
    if text[-1] or 0 in text[:-1]:
        raise _bad("the capabilities do not end with the only NUL in them")
    try:
        whole = json.loads(text[:-1].decode())
    except (ValueError, RecursionError) as error:
        raise _bad(f"the capabilities are not JSON: {error}") from None
    found = _object(whole, "the version data").get("capabilities", {})
    return _read(_object(found, "capabilities"))


def _read(found: Mapping[str, Any]) -> Capabilities:
    usual = Capabilities()
    pgsizes = _number(found, "pgsizes", usual.pgsizes, 4096, (1 << 64) - 1)
    if pgsizes & 4095:
        raise _bad(f"pgsizes {pgsizes:#x} has pages of less than 4096 bytes")
    return Capabilities(
        max_msg_fds=min(_number(found, "max_msg_fds", usual.max_msg_fds, 0, _MOST_FDS), _OUR_FDS),
        max_data_xfer_size=_number(found, "max_data_xfer_size", usual.max_data_xfer_size, _SMALLEST, _LARGEST),
        max_dma_maps=_number(found, "max_dma_maps", usual.max_dma_maps, 1, (1 << 32) - 1),
        pgsizes=pgsizes,
        twin_socket=_read_twin(_object(found.get("twin_socket", {}), "twin_socket")),
        write_multiple=_flag(found, "write_multiple"),
    )


def _read_twin(found: Mapping[str, Any]) -> TwinSocket:
    index = _number(found, "fd_index", 0, 0, _MOST_FDS) if "fd_index" in found else None
    return TwinSocket(_flag(found, "supported"), index)


def _object(value: object, name: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise _bad(f"{name} is not a JSON object")
    return value


def _number(found: Mapping[str, Any], name: str, usual: int, least: int, most: int) -> int:
    value = found.get(name, usual)
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise _bad(f"{name} is {str(value)[:40]!r}, not a number from {least} to {most}")
    return value


def _flag(found: Mapping[str, Any], name: str) -> bool:
    value = found.get(name, False)
    if not isinstance(value, bool):
        raise _bad(f"{name} is {str(value)[:40]!r}, not true or false")
    return value


def _bad(meaning: str) -> ProtocolError:
    return ProtocolError(meaning, errno=errno.EINVAL, call="VFIO_USER_VERSION")

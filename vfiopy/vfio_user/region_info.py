"""GET_REGION_INFO's reply: a region's description with its chain of capabilities, both directions.

Layouts: linux/vfio.h, struct vfio_region_info and VFIO_REGION_INFO_CAP_*. Offsets count from the record's start.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Final

from vfiopy import uapi
from vfiopy.backend import Area, RegionFlag, RegionInfo
from vfiopy.vfio_user import wire

__all__ = ["decode_region_info", "encode_region_info"]

_HEADER: Final = struct.Struct("=HHI")  # id, version, offset of the next
_SPARSE: Final = struct.Struct("=II")  # number of areas, reserved
_AREA: Final = struct.Struct("=QQ")
_TYPE: Final = struct.Struct("=II")
_FLAGS: Final = RegionFlag.READ | RegionFlag.WRITE | RegionFlag.MMAP
_MOST_AREAS: Final = 4096


def encode_region_info(info: RegionInfo, argsz: int) -> bytes:
    """Lay out the reply: whole, or where that is more than ``argsz`` bytes, without capabilities.

    Whoever gets the short one sees in its ``argsz`` how much to ask for.
    """
    capabilities = list(_capabilities(info))
    chain = b""
    for number, body in enumerate(capabilities):
        end = wire.REGION_INFO.size + len(chain) + _HEADER.size + len(body[1])
        following = end if number + 1 < len(capabilities) else 0
        chain += _HEADER.pack(body[0], 1, following) + body[1]
    needed = wire.REGION_INFO.size + len(chain)
    flags, offset = int(info.flags), 0
    if needed > argsz:
        chain = b""  # and no flag that promises it: QEMU refuses one whose offset is 0
    if chain:
        flags, offset = flags | uapi.VFIO_REGION_INFO_FLAG_CAPS, wire.REGION_INFO.size
    return wire.REGION_INFO.pack(needed, flags, info.index, offset, info.size, info.offset) + chain


def _capabilities(info: RegionInfo) -> Iterator[tuple[int, bytes]]:
    if info.sparse is not None:
        areas = b"".join(_AREA.pack(*area) for area in info.sparse)
        yield uapi.VFIO_REGION_INFO_CAP_SPARSE_MMAP, _SPARSE.pack(len(info.sparse), 0) + areas
    if info.type is not None:
        yield uapi.VFIO_REGION_INFO_CAP_TYPE, _TYPE.pack(*info.type)
    if info.msix_mappable:
        yield uapi.VFIO_REGION_INFO_CAP_MSIX_MAPPABLE, b""


def decode_region_info(payload: bytes | bytearray) -> tuple[RegionInfo, int]:
    """Read a reply; return the region, and the bytes that all of the reply needs.

    Raises:
        ProtocolError: (EINVAL) it ends early, or its chain leaves it or comes back to itself.
    """
    record = wire.REGION_INFO.unpack(payload)
    sparse: tuple[Area, ...] | None = None
    kind: tuple[int, int] | None = None
    msix_mappable = False
    if record.flags & uapi.VFIO_REGION_INFO_FLAG_CAPS:
        for capability, start in _walk(payload, record.cap_offset):
            if capability == uapi.VFIO_REGION_INFO_CAP_SPARSE_MMAP:
                sparse = _read_areas(payload, start, record.size)
            elif capability == uapi.VFIO_REGION_INFO_CAP_TYPE:
                first, second = _unpack(_TYPE, payload, start)
                kind = first, second
            elif capability == uapi.VFIO_REGION_INFO_CAP_MSIX_MAPPABLE:
                msix_mappable = True
    flags = RegionFlag(record.flags & _FLAGS)
    info = RegionInfo(record.region, record.size, flags, record.offset, sparse, msix_mappable, kind)
    return info, record.argsz


def _walk(payload: bytes | bytearray, offset: int) -> Iterator[tuple[int, int]]:
    """Yield each capability's id and where its body starts."""
    seen: set[int] = set()
    while offset:
        if offset in seen:
            raise wire.malformed(f"the chain of capabilities comes back to offset {offset}")
        seen.add(offset)
        number, _version, following = _unpack(_HEADER, payload, offset)
        yield number, offset + _HEADER.size
        offset = following


def _read_areas(payload: bytes | bytearray, start: int, region: int) -> tuple[Area, ...]:
    count, _reserved = _unpack(_SPARSE, payload, start)
    if count > _MOST_AREAS:
        raise wire.malformed(f"a region with {count} areas to map")
    first = start + _SPARSE.size
    areas = [Area._make(_unpack(_AREA, payload, first + number * _AREA.size)) for number in range(count)]
    for area in areas:
        if area.offset + area.size > region:
            raise wire.malformed(f"an area of {area.size:#x} bytes at {area.offset:#x} leaves its region")
    return tuple(sorted(area for area in areas if area.size))


def _unpack(form: struct.Struct, payload: bytes | bytearray, offset: int) -> tuple[int, ...]:
    if offset < wire.REGION_INFO.size or offset + form.size > len(payload):
        raise wire.malformed(f"a capability at offset {offset} is outside of the reply's {len(payload)} bytes")
    return form.unpack_from(payload, offset)

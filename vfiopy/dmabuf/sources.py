"""Where dma-bufs come from: BARs, memfds, heaps, displays. Each returns the fd and what is known of the memory."""

from __future__ import annotations

import fcntl
import mmap
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from vfiopy import uapi
from vfiopy.backend import Area, BarPort, RegionFlag, RegionIndex, region_name
from vfiopy.dmabuf.origin import BarOrigin, MemoryOrigin
from vfiopy.errors import AddressRangeError, AlignmentError, NotSupportedError, StateError, VfioError
from vfiopy.kernel import KernelDeviceIo
from vfiopy.kernel.ioctl import DeviceFd, DmaBufFd, DmaHeapFd, GfxPlane, MemfdPart, UdmabufFd
from vfiopy.mmio import Region

__all__ = ["check_bar", "export_bar", "from_heap", "from_memfds", "from_new_memory", "from_plane"]

_PAGE = mmap.PAGESIZE
_HEAPS = Path("/dev/dma_heap")
_NOT_A_BAR = "pass device.bars[n] of a device that vfio-pci drives"


def check_bar(region: Region, areas: Sequence[Area]) -> tuple[KernelDeviceIo, int, tuple[Area, ...]]:
    """Check what can be checked before the kernel is asked; return device, BAR number and parts.

    Raises: see :meth:`vfiopy.DmaBuf.of_bar`.
    """
    port: object = region.slow
    if not isinstance(port, BarPort):
        raise NotSupportedError("this region is no BAR of a device", object=region.name, hint=_NOT_A_BAR)
    io, index = port.io, port.index
    if not isinstance(io, KernelDeviceIo):
        raise NotSupportedError(
            f"{io.backend} devices have no dma-bufs: the kernel's vfio-pci exports them",
            object=region.name,
            hint="space.peer() maps the BAR of an emulated device without one",
        )
    info = io.region_info(index)
    if index > RegionIndex.BAR5:
        raise NotSupportedError(
            f"{region_name(index)} cannot be exported, only BARs can", object=io.name, hint=_NOT_A_BAR
        )
    if info.size < _PAGE or RegionFlag.MMAP not in info.flags:
        small = f"it has {info.size} bytes, less than a page of {_PAGE}" if info.size < _PAGE else "it is an I/O BAR"
        raise NotSupportedError(
            f"{region_name(index)} cannot be exported: {small}", object=io.name, hint="use read() and write()"
        )
    wanted = tuple(areas) or (Area(0, info.size),)
    for area in wanted:
        if area.offset % _PAGE or area.size % _PAGE or area.size <= 0:
            raise AlignmentError(
                f"{area.size:#x} bytes at offset {area.offset:#x} are not whole pages of {_PAGE:#x} bytes",
                object=f"{io.name} {region_name(index)}",
                hint="align offset and size to the page size",
            )
        if area.offset < 0 or area.offset + area.size > info.size:
            raise AddressRangeError(
                f"{area.size:#x} bytes at offset {area.offset:#x} reach beyond its {info.size:#x} bytes",
                object=f"{io.name} {region_name(index)}",
            )
    return io, index, wanted


def export_bar(region: Region, areas: Sequence[Area]) -> tuple[DmaBufFd, BarOrigin]:
    """VFIO_DEVICE_FEATURE_DMA_BUF."""
    io, index, wanted = check_bar(region, areas)
    calls = io.calls.dma_buf(index, wanted)
    return calls, BarOrigin(io.signals, region, index, wanted)


def from_memfds(parts: Sequence[MemfdPart]) -> tuple[DmaBufFd, MemoryOrigin]:
    """UDMABUF_CREATE or UDMABUF_CREATE_LIST."""
    with UdmabufFd.open("/dev/udmabuf") as node:
        calls = node.create(parts[0]) if len(parts) == 1 else node.create_list(parts)
    try:
        return calls, MemoryOrigin("udmabuf", "map the memfd below it: space.map(buffer.backing()[0])", tuple(parts))
    except BaseException:
        calls.close()
        raise


def from_new_memory(size: int) -> tuple[DmaBufFd, MemoryOrigin]:
    """A sealed memfd as a udmabuf."""
    if size <= 0:
        raise AlignmentError(f"a dma-buf of {size} bytes cannot be made", hint="ask for at least 1 byte")
    whole = (size + _PAGE - 1) & -_PAGE
    memfd = os.memfd_create("vfiopy-dmabuf", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(memfd, whole)
        fcntl.fcntl(memfd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
        return from_memfds([MemfdPart(memfd, 0, whole)])
    finally:
        os.close(memfd)


def from_heap(size: int, heap: str) -> tuple[DmaBufFd, MemoryOrigin]:
    """DMA_HEAP_IOCTL_ALLOC."""
    try:
        node = DmaHeapFd.open(heap)
    except NotSupportedError as error:
        names: list[str] = []
        with suppress(OSError):
            names = sorted(path.name for path in _HEAPS.iterdir())
        hint = f"there are {', '.join(names)}" if names else "the kernel needs DMABUF_HEAPS and a heap"
        raise NotSupportedError(
            "there is no such heap", errno=error.errno, object=error.object, call=error.call, hint=hint
        ) from None
    with node:
        calls = node.alloc(size)
    way = "no VFIO device can use memory of a heap: allocate() it, or make a udmabuf and map its memfd"
    return calls, MemoryOrigin(f"heap {heap}", way)


def from_plane(device: DeviceFd, plane: int) -> tuple[DmaBufFd, MemoryOrigin, GfxPlane]:
    """VFIO_DEVICE_QUERY_GFX_PLANE and VFIO_DEVICE_GET_GFX_DMABUF."""
    probe = uapi.VFIO_GFX_PLANE_TYPE_PROBE
    try:
        device.query_gfx_plane(probe | uapi.VFIO_GFX_PLANE_TYPE_DMABUF, plane)
    except VfioError as error:
        raise _no_plane(device, plane) from error
    try:
        geometry = device.query_gfx_plane(uapi.VFIO_GFX_PLANE_TYPE_DMABUF, plane)
    except VfioError:  # the mbochs sample makes the buffer, says ENOMEM, and finds it the next time
        geometry = device.query_gfx_plane(uapi.VFIO_GFX_PLANE_TYPE_DMABUF, plane)
    if not geometry.drm_format:
        raise StateError(f"{device.label}: plane {plane} shows nothing now; its driver has to set a mode first")
    calls = device.get_gfx_dmabuf(geometry.target)
    origin = MemoryOrigin(f"{device.label} plane {plane}", "no VFIO device can use the memory of a display")
    return calls, origin, geometry


def _no_plane(device: DeviceFd, plane: int) -> NotSupportedError:
    kind = uapi.VFIO_GFX_PLANE_TYPE_REGION
    try:
        device.query_gfx_plane(uapi.VFIO_GFX_PLANE_TYPE_PROBE | kind, plane)
        target = device.query_gfx_plane(kind, plane).target
    except VfioError:
        return NotSupportedError("the device has no display", object=device.label)
    return NotSupportedError(
        "its display is a region, not a dma-buf", object=device.label, hint=f"map region {target} of the device"
    )

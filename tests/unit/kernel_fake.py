"""System calls of a machine that exists only here: VFIO's rules for the order of things, and a way to fail call n.

The real kernel judges the same code in tests/guest. This one is for what a real kernel will not do on demand: fail
the n-th call of a sequence, be short of interrupt vectors, return capability chains that are broken.
"""

from __future__ import annotations

import ctypes
import errno
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from vfiopy import uapi

BAR0_SIZE = 0x10000
BAR0_OFFSET = 0
CONFIG_OFFSET = 7 << 40
ANSWERS_TO_IOMMUFD = 0x3B80


@dataclass
class File:
    """One open file description."""

    kind: str  # "container", "group", "device", "iommufd", "memfd", ...
    name: str
    references: int = 1
    state: dict[str, Any] = field(default_factory=dict)


Scripted = Callable[[File, bytearray], int]


class FakeVfio:
    """See :class:`vfiopy.kernel.ioctl._call.Syscalls`."""

    def __init__(self) -> None:
        self.fds: dict[int, File] = {}
        self.mappings: dict[int, tuple[int, File]] = {}
        self.log: list[str] = []
        self.calls = 0  # that can fail
        self.fail_at = 0
        self.fail_errno = errno.EIO
        self.interrupt_at = 0
        self.scripts: dict[int, Scripted] = {}
        self.bars = bytearray(range(256)) * (BAR0_SIZE // 256)
        self.type1 = True  # else /dev/vfio/vfio is iommufd's
        self.decode = True
        self._next_object = 1

    # --- helpers ------------------------------------------------------------------------------------------------

    def _fails(self, what: str) -> bool:
        self.log.append(what)
        self.calls += 1
        if self.calls == self.interrupt_at:
            raise KeyboardInterrupt
        return self.calls == self.fail_at

    def _new(self, file: File) -> int:
        fd = 100  # never a number of this process's real files, so that nothing real is ever touched
        while fd in self.fds:
            fd += 1
        self.fds[fd] = file
        return fd

    def left(self) -> dict[int, str]:
        """What is open or mapped."""
        found = {fd: f"{file.kind} {file.name}" for fd, file in self.fds.items()}
        found.update({at: f"mapping of {file.name}" for at, (_, file) in self.mappings.items()})
        return found

    # --- files --------------------------------------------------------------------------------------------------

    def open(self, path: str, flags: int, into: list[int]) -> int:
        return self._put(self.new_fd(path), into)

    @staticmethod
    def _put(result: int, into: list[int]) -> int:
        if result >= 0:
            into.append(result)
        return min(result, 0)

    def new_fd(self, path: str) -> int:
        if self._fails(f"open {path}"):
            return -self.fail_errno
        name = path.rpartition("/dev/")[2]
        kind = {"vfio/vfio": "container", "iommu": "iommufd"}.get(name)
        if kind is None:
            kind = "cdev" if "devices" in name else "group"
        if kind == "group" and any(f.kind == "group" and f.name == name for f in self.fds.values()):
            return -errno.EBUSY
        if kind == "container" and not self.type1:
            kind = "iommufd"
        return self._new(File(kind, name))

    def close(self, fd: int) -> int:
        self.log.append(f"close {fd}")
        file = self.fds.pop(fd, None)
        assert file is not None, f"fd {fd} is closed twice"
        file.references -= 1
        if file.references == 0 and file.kind == "device" and not self._mapped(file):
            file.state["group"].state["devices"].discard(id(file))
        return 0

    def duplicate(self, fd: int, into: list[int]) -> int:
        if self._fails("dup"):
            return -self.fail_errno
        file = self.fds[fd]
        file.references += 1
        return self._put(self._new(file), into)

    def identity(self, fd: int) -> str:
        file = self.fds.get(fd)
        if file is None:
            return ""
        return "anon_inode:[vfio-device]" if file.kind == "device" else file.name

    def _mapped(self, file: File) -> bool:
        return any(owner is file for _, owner in self.mappings.values())

    def mmap(self, fd: int, offset: int, size: int, protection: int, alignment: int) -> int:
        if self._fails("mmap"):
            return -self.fail_errno
        address = 0x7F00_0000_0000 + 0x100_0000 * len(self.mappings)
        self.mappings[address] = size, self.fds[fd]
        return address

    def munmap(self, address: int, size: int) -> int:
        self.log.append("munmap")
        mapped, _ = self.mappings.pop(address)
        assert mapped == size
        return 0

    def _region(self, offset: int) -> tuple[bytearray, int]:
        return self.bars, offset & ((1 << 40) - 1)

    def pread(self, fd: int, buffer: bytearray, offset: int) -> int:
        if self._fails("pread"):
            return -self.fail_errno
        if not self.decode:
            return -errno.EIO
        memory, at = self._region(offset)
        data = memory[at : at + min(len(buffer), 64)]  # short on purpose
        buffer[: len(data)] = data
        return len(data)

    def pwrite(self, fd: int, data: bytes, offset: int) -> int:
        if self._fails("pwrite"):
            return -self.fail_errno
        if not self.decode:
            return -errno.EIO
        memory, at = self._region(offset)
        memory[at : at + 64][: len(data)] = data[:64]
        memory[at : at + len(data[:64])] = data[:64]
        return len(data[:64])

    def read(self, fd: int, buffer: bytearray) -> int:
        return 0

    def write(self, fd: int, data: bytes) -> int:
        return len(data)

    def seek_end(self, fd: int) -> int:
        return BAR0_SIZE

    # --- ioctls -------------------------------------------------------------------------------------------------

    def ioctl_value(self, fd: int, number: int, value: int) -> int:
        file = self.fds[fd]
        if self._fails(f"ioctl {number:#x}"):
            return -self.fail_errno
        if number == uapi.VFIO_SET_IOMMU:
            if not file.state.get("groups") or file.state.get("model"):
                return -errno.EINVAL
            file.state["model"] = value
            return 0
        if number == uapi.VFIO_CHECK_EXTENSION:
            return 1
        return -errno.ENOTTY

    def ioctl_fd(self, fd: int, number: int, argument: bytearray | None, at: int, into: list[int]) -> int:
        result = self.ioctl(fd, number, argument)
        if result >= 0 and at >= 0:
            assert argument is not None
            result = int.from_bytes(argument[at : at + 4], "little", signed=True)
            if result < 0:
                return 0
        return self._put(result, into)

    def ioctl(self, fd: int, number: int, argument: bytearray | None) -> int:
        file = self.fds[fd]
        if self._fails(f"ioctl {number:#x}"):
            return -self.fail_errno
        buffer = bytearray() if argument is None else argument
        if number in self.scripts:
            return self.scripts[number](file, buffer)
        handler = getattr(self, f"_{file.kind}", None)
        assert handler is not None, f"ioctl {number:#x} on a {file.kind}"
        return int(handler(file, number, buffer))

    def _container(self, file: File, number: int, argument: bytearray) -> int:
        if number == uapi.VFIO_GET_API_VERSION:
            return 0
        if number >= ANSWERS_TO_IOMMUFD:
            return -errno.EINVAL
        if not file.state.get("model"):
            return -errno.EINVAL
        if number == uapi.VFIO_IOMMU_GET_INFO:
            return self._iommu_info(argument)
        if number in (uapi.VFIO_IOMMU_MAP_DMA, uapi.VFIO_IOMMU_UNMAP_DMA):
            return 0
        return -errno.ENOTTY

    def _iommu_info(self, argument: bytearray) -> int:
        layout = uapi.vfio_iommu_type1_info
        layout.put(argument, "flags", uapi.VFIO_IOMMU_INFO_PGSIZES | uapi.VFIO_IOMMU_INFO_CAPS)
        layout.put(argument, "iova_pgsizes", 0x40201000)
        ranges = struct.pack("=HHI", 1, 1, 24 + 48) + struct.pack("=II4Q", 2, 0, 0, 0xFEDFFFFF, 0xFEF00000, 2**39 - 1)
        available = struct.pack("=HHIII", 3, 1, 0, 65535, 0)
        return chain_into(layout, argument, ranges + available)

    def _iommufd(  # noqa: PLR0911  one answer per ioctl
        self, file: File, number: int, argument: bytearray
    ) -> int:
        objects = file.state.setdefault("objects", {})
        if number == uapi.VFIO_GET_API_VERSION:
            return 0
        if number == uapi.VFIO_IOMMU_GET_INFO:
            return self._iommu_info(argument)
        if number == uapi.IOMMU_OPTION:
            return 0
        if number == uapi.IOMMU_IOAS_ALLOC:
            objects[self._next_object] = "ioas"
            uapi.iommu_ioas_alloc.put(argument, "out_ioas_id", self._next_object)
            self._next_object += 1
            return 0
        if number == uapi.IOMMU_IOAS_IOVA_RANGES:
            layout = uapi.iommu_ioas_iova_ranges
            room, number = layout.get(argument, "num_iovas"), 2
            layout.put(argument, "num_iovas", number)
            layout.put(argument, "out_iova_alignment", 4096)
            if room < number:
                return -errno.EMSGSIZE
            table = struct.pack("=4Q", 0xFEF00000, 2**39 - 1, 0, 0xFEDFFFFF)  # not sorted on purpose
            ctypes.memmove(layout.get(argument, "allowed_iovas"), table, len(table))
            return 0
        if number == uapi.IOMMU_DESTROY:
            wanted = uapi.iommu_destroy.get(argument, "id")
            if wanted not in objects:
                return -errno.ENOENT
            if any(f.state.get("attached") == wanted for f in self.fds.values()):
                return -errno.EBUSY
            del objects[wanted]
            return 0
        return -errno.ENOTTY

    def _group(  # noqa: PLR0911  one answer per ioctl
        self, file: File, number: int, argument: bytearray
    ) -> int:
        devices = file.state.setdefault("devices", set())
        inside = file.state.get("container")
        if number == uapi.VFIO_GROUP_GET_STATUS:
            flags = uapi.VFIO_GROUP_FLAGS_VIABLE if file.state.get("viable", True) else 0
            uapi.vfio_group_status.put(argument, "flags", flags)
            return 0
        if number == uapi.VFIO_GROUP_SET_CONTAINER:
            if inside is not None:
                return -errno.EINVAL
            container = self.fds[int.from_bytes(argument[:4], "little")]
            container.state.setdefault("groups", []).append(file)
            file.state["container"] = container
            return 0
        if number == uapi.VFIO_GROUP_UNSET_CONTAINER:
            if inside is None:
                return -errno.EINVAL
            if devices:
                return -errno.EBUSY
            inside.state["groups"].remove(file)
            if not inside.state["groups"]:
                inside.state.pop("model", None)
            del file.state["container"]
            return 0
        if number == uapi.VFIO_GROUP_GET_DEVICE_FD:
            if inside is None or not inside.state.get("model"):
                return -errno.EINVAL
            device = File("device", argument.rstrip(b"\0").decode(), state={"group": file})
            devices.add(id(device))
            return self._new(device)
        return -errno.ENOTTY

    def _cdev(self, file: File, number: int, argument: bytearray) -> int:
        if number == uapi.VFIO_DEVICE_BIND_IOMMUFD:
            if file.state.get("bound"):
                return -errno.EINVAL
            file.state["bound"] = True
            uapi.vfio_device_bind_iommufd.put(argument, "out_devid", 77)
            return 0
        if not file.state.get("bound"):
            return -errno.EINVAL
        if number == uapi.VFIO_DEVICE_ATTACH_IOMMUFD_PT:
            file.state["attached"] = uapi.vfio_device_attach_iommufd_pt.get(argument, "pt_id")
            return 0
        if number == uapi.VFIO_DEVICE_DETACH_IOMMUFD_PT:
            file.state.pop("attached", None)
            return 0
        return self._device(file, number, argument)

    def _device(  # noqa: PLR0911  one answer per ioctl
        self, file: File, number: int, argument: bytearray
    ) -> int:
        if number == uapi.VFIO_DEVICE_GET_INFO:
            layout = uapi.vfio_device_info
            for name, value in (("flags", 3), ("num_regions", 9), ("num_irqs", 5)):
                layout.put(argument, name, value)
            return 0
        if number == uapi.VFIO_DEVICE_GET_REGION_INFO:
            layout = uapi.vfio_region_info
            index = layout.get(argument, "index")
            if index == 8:
                return -errno.EINVAL
            size = {0: BAR0_SIZE, 7: 4096}.get(index, 0)
            flags = 7 if index == 0 else 3 if size else 0
            for name, value in (("size", size), ("flags", flags), ("offset", index << 40)):
                layout.put(argument, name, value)
            return 0
        if number == uapi.VFIO_DEVICE_GET_IRQ_INFO:
            index = uapi.vfio_irq_info.get(argument, "index")
            if index == 3:
                return -errno.EINVAL
            uapi.vfio_irq_info.put(argument, "count", 4 if index == 2 else 0)
            return 0
        if number in (uapi.VFIO_DEVICE_SET_IRQS, uapi.VFIO_DEVICE_RESET):
            return 0
        return -errno.ENOTTY


def chain_into(layout: Any, argument: bytearray, chain: bytes) -> int:
    """Answer like VFIO: the chain if it fits, else only how much room it needs."""
    needed = layout.size + len(chain)
    if layout.get(argument, "argsz") < needed:
        layout.put(argument, "argsz", needed)
        layout.put(argument, "cap_offset", 0)
        return 0
    argument[layout.size : needed] = chain
    layout.put(argument, "cap_offset", layout.size)
    return 0

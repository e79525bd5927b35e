"""Helpers of the tests of the ioctl layer: a device fd on the fake kernel, and a script that records a call."""

from __future__ import annotations

import struct

from kernel_fake import FakeVfio, File

from vfiopy.kernel.ioctl import DeviceFd


def device(vfio: FakeVfio) -> DeviceFd:
    return DeviceFd(vfio._new(File("cdev", "vfio/devices/vfio0", state={"bound": True})), "0000:00:04.0")


class Recorder:
    """Script for one ioctl: keeps what came, answers a result after writing some fields."""

    def __init__(self, result: int = 0, **writes: tuple[int, str, int]) -> None:
        self.seen: list[bytes] = []
        self.result = result
        self.writes = writes

    def __call__(self, file: File, argument: bytearray) -> int:
        self.seen.append(bytes(argument))
        for offset, code, value in self.writes.values():
            struct.pack_into("=" + code, argument, offset, value)
        return self.result

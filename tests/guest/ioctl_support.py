"""Binding devices for the tests of the ioctl layer by sysfs alone, and memory to map."""

from __future__ import annotations

import ctypes
import mmap
import os
import platform
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from vfiopy import kernel
from vfiopy.backend import Mapper
from vfiopy.kernel import KernelDeviceIo

PCI = Path("/sys/bus/pci")
PAGE = mmap.PAGESIZE


def driver(bdf: str) -> str | None:
    link = PCI / "devices" / bdf / "driver"
    return link.resolve().name if link.exists() else None


def set_driver(bdf: str, name: str | None) -> None:
    """Give a function a driver (or none) with driver_override; leaves no override behind."""
    device = PCI / "devices" / bdf
    if driver(bdf) == name:
        return
    if driver(bdf) is not None:
        (device / "driver" / "unbind").write_text(bdf)
    if name is None:
        return
    (device / "driver_override").write_text(name)
    try:
        (PCI / "drivers_probe").write_text(bdf)
    finally:
        (device / "driver_override").write_text("\n")
    assert driver(bdf) == name, f"{bdf} has driver {driver(bdf)}, not {name}"


def lab_machine() -> str | None:
    """Name of the lab machine that this is; None outside."""
    words = Path("/proc/cmdline").read_text().split()
    return next((word.partition("=")[2] for word in words if word.startswith("vfiopy.lab=")), None)


def linux() -> tuple[int, int]:
    """Version of the running kernel."""
    major, minor = platform.release().split(".")[:2]
    return int(major), int(minor)


def _vfio_fds() -> dict[int, str]:
    found = {}
    for entry in list(Path("/proc/self/fd").iterdir()):
        with suppress(OSError):
            target = str(entry.readlink())
            if "vfio" in target or target == "/dev/iommu":
                found[int(entry.name)] = target
    return found


def _let_go(before: dict[int, str]) -> list[str]:
    """Close what a failing test left open of VFIO: unbinding would wait for it, and the whole run with it."""
    found = []
    for number, target in _vfio_fds().items():
        if number not in before:
            os.close(number)
            found.append(target)
    for line in Path("/proc/self/maps").read_text().splitlines():
        if ("vfio" in line.split(None, 5)[-1] and "/dev/vfio" in line) or "[vfio-device]" in line:
            first, last = (int(part, 16) for part in line.split(" ", 1)[0].split("-"))
            ctypes.CDLL(None).munmap(ctypes.c_void_p(first), ctypes.c_size_t(last - first))
            found.append(f"mapping {line}")
    return found


@contextmanager
def bound(*bdfs: str, to: str = "vfio-pci") -> Iterator[None]:
    """Bind functions to a driver for the length of a ``with`` block; what they had before comes back."""
    before = {bdf: driver(bdf) for bdf in bdfs}
    fds = _vfio_fds()
    left: list[str] = []
    try:
        for bdf in bdfs:
            set_driver(bdf, to)
        yield
    except BaseException:
        # The traceback keeps a failing test's objects alive.
        left = _let_go(fds)
        raise
    finally:
        left += _let_go(fds)
        for bdf in reversed(bdfs):
            set_driver(bdf, before[bdf])
    assert not left, f"left open: {left}"


@contextmanager
def opened(bdf: str, backend: str | None = None, **more: Any) -> Iterator[tuple[KernelDeviceIo, Mapper]]:
    """Open a device and its mapper for the length of a ``with`` block."""
    joined = list(more.get("mappers", ()))
    io, mapper = kernel.connect(bdf, backend=backend, **more)
    try:
        yield io, mapper
    finally:
        io.close()
        if mapper not in joined:
            mapper.close()


class Memory:
    """Anonymous memory with a known address."""

    def __init__(self, size: int) -> None:
        self.map = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.size = size
        self._anchor = ctypes.c_char.from_buffer(self.map)
        self.address = ctypes.addressof(self._anchor)

    def __enter__(self) -> Memory:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        del self._anchor
        self.map.close()


def as_nobody(work: Callable[[], object], memlock: int | None = None) -> str:
    """Run ``work`` in a child without privileges, maybe with a small RLIMIT_MEMLOCK; return its error as text."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        text = "no answer"
        try:
            if memlock is not None:
                resource.setrlimit(resource.RLIMIT_MEMLOCK, (memlock, memlock))
            os.setresgid(65534, 65534, 65534)
            os.setresuid(65534, 65534, 65534)
            work()
            text = "no error"
        except BaseException as error:
            text = f"{type(error).__name__}: {error}"
        finally:
            os.write(writer, text.encode())
            os._exit(0)
    os.close(writer)
    with open(reader, encoding="utf-8") as pipe:  # noqa: PTH123  an fd
        text = pipe.read()
    os.waitpid(child, 0)
    return text


def wait_for(condition: Callable[[], object], seconds: float = 5.0) -> bool:
    """Poll a callable."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.01)
    return False

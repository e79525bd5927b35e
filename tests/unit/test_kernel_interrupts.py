"""Ctrl-C between the kernel's answer and its owner loses no file descriptor."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable, Iterator

import pytest
from interrupts import Interrupt

from vfiopy._shim import ffi, lib
from vfiopy.errors import VfioError
from vfiopy.kernel.ioctl import _call, _fd
from vfiopy.kernel.ioctl._fd import Fd
from vfiopy.lives import drain_finalizers

NS_GET_USERNS = 0xB701  # linux/nsfs.h: answers with an fd, and needs no rights
FIONREAD = 0x541B  # puts an int into its argument


class Namespace(Fd):
    kind = "namespace"
    node = r"user:.*|uts:.*|net:.*"

    def owner(self) -> Namespace:
        return self._ioctl_fd(Namespace(None, "user namespace"), "NS_GET_USERNS", NS_GET_USERNS, bytearray(4))


@pytest.fixture
def namespace() -> Iterator[Namespace]:
    with Namespace(os.open("/proc/self/ns/uts", os.O_RDONLY | os.O_CLOEXEC), "uts namespace") as space:
        yield space


def descriptors() -> set[str]:
    return set(os.listdir("/proc/self/fd"))  # noqa: PTH208


@pytest.mark.filterwarnings("ignore:.*was never closed:ResourceWarning")
@pytest.mark.parametrize("what", ["ioctl", "open", "adopt"])
def test_ctrl_c_anywhere_loses_no_fd(namespace: Namespace, what: str) -> None:
    calls: dict[str, Callable[[], Fd]] = {
        "ioctl": namespace.owner,
        "open": lambda: Fd.open("/dev/null"),
        "adopt": lambda: Namespace.adopt(namespace.fileno()),
    }
    drain_finalizers()
    before = descriptors()
    at, interrupted = 0, True
    while interrupted:
        at += 1
        assert at < 1000
        interrupt = Interrupt(at, _call.__file__, _fd.__file__)
        made: list[Fd] = []
        interrupted = False
        sys.settrace(interrupt)
        try:
            made.append(calls[what]())
        except KeyboardInterrupt:
            interrupted = True
        finally:
            sys.settrace(None)
            interrupt.forget()
        if not interrupted:
            assert interrupt.places < at
            assert len(descriptors()) == len(before) + 1
            made[0].close()
        drain_finalizers()
        assert descriptors() == before
    assert at > 5


def test_an_ioctl_that_fails_leaves_no_owner(namespace: Namespace) -> None:
    before = descriptors()
    with pytest.raises(VfioError) as caught:
        namespace._ioctl_fd(Namespace(None, "nobody"), "NS_NOTHING", 0xB7FF, bytearray(4))
    assert caught.value.errno == errno.ENOTTY
    assert descriptors() == before


def test_an_fd_comes_from_where_the_ioctl_puts_it() -> None:
    """The shim reads the int behind the call, wherever it is; what is negative there is no fd."""
    ends = os.pipe()
    try:
        os.write(ends[1], b"1234567")
        argument = bytearray(12)
        assert lib.vfiopy_ioctl_fd(ends[0], FIONREAD, ffi.from_buffer(argument), 0) == 7
        argument[4:8] = (-1).to_bytes(4, "little", signed=True)
        assert lib.vfiopy_ioctl_fd(ends[0], FIONREAD, ffi.from_buffer(argument), 4) == -4096
        assert lib.vfiopy_ioctl_fd(ends[0], FIONREAD, ffi.from_buffer(argument), -1) == 0
        into: list[int] = []
        calls = _call.KernelSyscalls()
        assert calls.ioctl_fd(ends[0], FIONREAD, argument, 4, into) == 0
        assert into == []
        assert calls.ioctl_fd(-1, FIONREAD, argument, 0, into) == -errno.EBADF
        assert into == []
    finally:
        for end in ends:
            os.close(end)

"""The cffi shim: ioctl, aligned mappings, DMA memory, accessors for compiled code."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import re
import subprocess
import sys
import termios
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from region_support import PAGE, WIDTHS, run_python

from vfiopy._shim import ffi, lib

MIB = 1 << 20
RW = mmap.PROT_READ | mmap.PROT_WRITE


def smaps(address: int) -> dict[str, str]:
    """Return what the kernel says about the mapping that starts at an address."""
    found = False
    entry: dict[str, str] = {}
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if match := re.match(r"([0-9a-f]+)-([0-9a-f]+) (\S+)", line):
            if found:
                break
            found = int(match[1], 16) == address
            entry = {"size": str(int(match[2], 16) - int(match[1], 16)), "permissions": match[3]}
        elif found:
            key, _, value = line.partition(":")
            entry[key] = value.strip()
    return entry if found else {}


def virtual_size() -> int:
    """Return the size of this process's address space, in bytes."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * PAGE


def grows_by(*, repeat: int, call: Callable[[], object]) -> int:
    """Return by how much the address space grows; calls before, for what Python itself allocates once."""
    call()
    before = virtual_size()
    for _ in range(repeat):
        call()
    return virtual_size() - before


class TestIoctl:
    def test_results_and_errors_are_returned(self) -> None:
        reader, writer = os.pipe()
        try:
            os.write(writer, b"abc")
            available = ffi.new("int *")
            assert lib.vfiopy_ioctl(reader, termios.FIONREAD, available) == 0
            assert available[0] == 3
            assert lib.vfiopy_ioctl(reader, 0xDEAD, available) == -errno.ENOTTY
            assert lib.vfiopy_ioctl_value(reader, 0xDEAD, 5) == -errno.ENOTTY
        finally:
            os.close(reader)
            os.close(writer)
        assert lib.vfiopy_ioctl(-1, termios.FIONREAD, ffi.NULL) == -errno.EBADF
        assert lib.vfiopy_ioctl(reader, termios.FIONREAD, ffi.NULL) == -errno.EBADF

    def test_a_value_is_passed_as_it_is(self) -> None:
        """A terminal's TCFLSH takes a number."""
        master, slave = os.openpty()
        try:
            os.write(master, b"line\n")
            assert lib.vfiopy_ioctl_value(slave, termios.TCFLSH, termios.TCIFLUSH) == 0
            assert lib.vfiopy_ioctl_value(slave, termios.TCFLSH, 77) == -errno.EINVAL
        finally:
            os.close(master)
            os.close(slave)

    def test_buffers_from_python(self) -> None:
        reader, writer = os.pipe()
        os.write(writer, b"12345")
        buffer = bytearray(4)
        assert lib.vfiopy_ioctl(reader, termios.FIONREAD, ffi.from_buffer(buffer)) == 0
        assert int.from_bytes(buffer, sys.byteorder) == 5
        assert fcntl.ioctl(reader, termios.FIONREAD, b"\0" * 4) == bytes(buffer)
        os.close(reader)
        os.close(writer)


class TestAlignedMappings:
    @pytest.fixture
    def fd(self) -> Iterator[int]:
        fd = os.memfd_create("bar")
        os.ftruncate(fd, 64 * MIB)
        yield fd
        os.close(fd)

    @pytest.mark.parametrize(
        ("length", "alignment"),
        [(PAGE, PAGE), (3 * PAGE, 2 * PAGE), (2 * MIB, 2 * MIB), (48 * MIB, 32 * MIB), (64 * MIB, 64 * MIB)],
    )
    def test_the_default_is_the_largest_power_of_two_that_fits(self, fd: int, length: int, alignment: int) -> None:
        address = lib.vfiopy_mmap_aligned(fd, 0, length, RW, 0)
        assert address > 0
        try:
            assert address % alignment == 0
            assert int(smaps(address)["size"]) == length
            flags = smaps(address)["VmFlags"].split()
            assert "dc" in flags  # do not copy on fork
            assert "sh" in flags
        finally:
            assert lib.vfiopy_munmap(address, length) == 0
        assert smaps(address) == {}

    def test_it_is_a_window_into_the_file(self, fd: int) -> None:
        address = lib.vfiopy_mmap_aligned(fd, 2 * MIB + PAGE, 4 * MIB, RW, 2 * MIB)
        assert address % (2 * MIB) == PAGE  # congruent to the offset: only then can big pages be used
        os.pwrite(fd, b"abcd", 2 * MIB + PAGE)
        assert lib.vfiopy_mmio_read32(address) == int.from_bytes(b"abcd", "little")
        lib.vfiopy_mmio_write16(address + 4, 0x1122)
        assert os.pread(fd, 2, 2 * MIB + PAGE + 4) == b"\x22\x11"
        assert lib.vfiopy_munmap(address, 4 * MIB) == 0

    def test_an_alignment_of_a_gib(self, fd: int) -> None:
        def map_and_unmap() -> None:
            address = lib.vfiopy_mmap_aligned(fd, 0, 16 * MIB, RW, 1 << 30)
            assert address % (1 << 30) == 0
            assert lib.vfiopy_munmap(address, 16 * MIB) == 0

        assert grows_by(repeat=20, call=map_and_unmap) < 16 * MIB

    def test_protection(self, fd: int) -> None:
        address = lib.vfiopy_mmap_aligned(fd, 0, PAGE, mmap.PROT_READ, 0)
        assert smaps(address)["permissions"] == "r--s"
        lib.vfiopy_munmap(address, PAGE)

    def test_refusals_leave_nothing_behind(self, fd: int) -> None:
        reader, writer = os.pipe()
        cases = [
            ((fd, 0, 0, RW, 0), errno.EINVAL),
            ((fd, -PAGE, 64 * MIB, RW, 0), errno.EINVAL),
            ((fd, 0, 64 * MIB, RW, 3 * PAGE), errno.EINVAL),
            ((fd, 1, 64 * MIB, RW, 0), errno.EINVAL),
            ((-1, 0, 64 * MIB, RW, 0), errno.EBADF),
            ((reader, 0, 64 * MIB, RW, 0), errno.EACCES),  # not open for writing, and a pipe
            ((reader, 0, 64 * MIB, mmap.PROT_READ, 0), errno.ENODEV),
            ((fd, 0, 1 << 60, RW, 0), errno.ENOMEM),
            ((fd, 0, (1 << 64) - 1, RW, 0), errno.EINVAL),
        ]
        for arguments, number in cases:
            assert lib.vfiopy_mmap_aligned(*arguments) == -number, arguments

        def refuse_all() -> None:
            for arguments, _ in cases:
                lib.vfiopy_mmap_aligned(*arguments)

        assert grows_by(repeat=10, call=refuse_all) < 64 * MIB
        os.close(reader)
        os.close(writer)


class TestDmaMemory:
    @pytest.mark.parametrize("size", [PAGE, 5 * PAGE, 2 * MIB, 6 * MIB])
    def test_it_is_zeroed_present_and_not_inherited(self, size: int) -> None:
        address = lib.vfiopy_alloc_pages(size, 0, -1)
        assert address > 0
        entry = smaps(address)
        assert int(entry["size"]) >= size
        assert int(entry["Rss"].split()[0]) * 1024 >= size
        assert "dc" in entry["VmFlags"].split()
        if size >= 2 * MIB:
            assert address % (2 * MIB) == 0
        memory = ffi.buffer(ffi.cast("char *", address), size)
        assert memory[:] == bytes(size)
        memory[size - 1] = b"x"
        assert lib.vfiopy_free_pages(address, size) == 0
        assert smaps(address) == {}

    def test_refusals_leave_nothing_behind(self) -> None:
        cases = [
            (0, 0, -1),
            (64 * MIB + 1, 0, -1),
            (PAGE, 21, -1),
            (64 * MIB, 12, -1),
            (64 * MIB, 22, -1),
            (64 * MIB, 0, -2),
            (64 * MIB, 0, 4096),
        ]
        for arguments in cases:
            assert lib.vfiopy_alloc_pages(*arguments) == -errno.EINVAL, arguments
        assert lib.vfiopy_alloc_pages(64 * MIB, 0, 1000) in (-errno.EINVAL, -errno.ENOSYS, -errno.EPERM)
        assert lib.vfiopy_alloc_pages(1 << 60, 0, -1) == -errno.ENOMEM

        def refuse_all() -> None:
            for arguments in (*cases, (64 * MIB, 0, 1000), (1 << 60, 0, -1)):
                lib.vfiopy_alloc_pages(*arguments)

        assert grows_by(repeat=10, call=refuse_all) < 64 * MIB

    def test_a_numa_node(self) -> None:
        address = lib.vfiopy_alloc_pages(4 * PAGE, 0, 0)
        if address in (-errno.ENOSYS, -errno.EPERM):
            pytest.skip("mbind(2) is not available here")
        assert address > 0
        assert re.search(rf"^{address:x} bind:0 .*N0=4", Path("/proc/self/numa_maps").read_text(), re.MULTILINE)
        lib.vfiopy_free_pages(address, 4 * PAGE)
        assert lib.vfiopy_bind_node(address, PAGE, -1) == -errno.EINVAL

    @pytest.mark.parametrize(("shift", "name"), [(21, "2048kB"), (30, "1048576kB")])
    def test_hugetlb_pages_or_a_clear_no(self, shift: int, name: str) -> None:
        pool = Path(f"/sys/kernel/mm/hugepages/hugepages-{name}")
        free = int((pool / "free_hugepages").read_text()) if pool.exists() else 0
        address = lib.vfiopy_alloc_pages(1 << shift, shift, -1)
        if free:
            assert address > 0
            assert address % (1 << shift) == 0
            assert smaps(address)["KernelPageSize"] == f"{(1 << shift) // 1024} kB"
            assert lib.vfiopy_free_pages(address, 1 << shift) == 0
        else:
            assert address in (-errno.ENOMEM, -errno.EINVAL)
            assert grows_by(repeat=10, call=lambda: lib.vfiopy_alloc_pages(1 << shift, shift, -1)) < 16 * MIB

    def test_a_child_does_not_have_it(self) -> None:
        result = run_python(
            """
            import os, signal
            from vfiopy._shim import lib
            address = lib.vfiopy_alloc_pages(4096, 0, -1)
            child = os.fork()
            if child == 0:
                lib.vfiopy_mmio_read32(address)
                os._exit(0)
            print(os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGSEGV)
            """
        )
        assert result.stdout == "True\n", result.stderr


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("suffix", ["", "_relaxed"])
def test_accessors(width: int, suffix: str) -> None:
    address = lib.vfiopy_alloc_pages(PAGE, 0, -1)
    bits = 8 * width
    value = int.from_bytes(bytes(range(0x81, 0x81 + width)), "little")
    getattr(lib, f"vfiopy_mmio_write{bits}{suffix}")(address + 8, value)
    assert ffi.buffer(ffi.cast("char *", address), 24)[:] == bytes(8) + value.to_bytes(16, "little")
    assert getattr(lib, f"vfiopy_mmio_read{bits}{suffix}")(address + 8) == value
    lib.vfiopy_free_pages(address, PAGE)


def test_compiled_code_can_call_them() -> None:
    """Numba turns cffi's types into its own by a table that has no uintptr_t; these it has."""
    known = {ffi.typeof(name) for name in ("uint8_t", "uint16_t", "uint32_t", "uint64_t", "void")}
    for name in dir(lib):
        if name.startswith(("vfiopy_mmio_", "vfiopy_dma_")):
            function = ffi.typeof(getattr(lib, name))
            assert {*function.args, function.result} <= known, name


def test_barriers_can_be_called() -> None:
    for name in ("mmio_barrier", "mmio_read_barrier", "mmio_write_barrier", "dma_rmb", "dma_wmb"):
        assert getattr(lib, f"vfiopy_{name}")() is None


def test_the_stub_and_the_module_name_the_same_functions() -> None:
    stub = Path(__file__).parents[2].joinpath("vfiopy", "_shim.pyi").read_text()
    assert set(re.findall(r"def (vfiopy_\w+)\(", stub)) == set(dir(lib))


def test_the_extensions_export_nothing_but_their_entry() -> None:
    for name in ("_shim", "_native"):
        library = sys.modules[f"vfiopy.{name}"].__file__
        assert library
        command = ["readelf", "--dyn-syms", "--wide", library]
        shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        rows = [line.split() for line in shown.splitlines() if " GLOBAL " in line]
        visible = {row[7] for row in rows if row[6] != "UND" and row[5] in ("DEFAULT", "PROTECTED")}
        assert visible - {"_init", "_fini"} == {f"PyInit_{name}"}

"""An NVMe controller written in Python, served on the host, judged by Linux: its nvme driver, ext4, lspci.

In between are a real QEMU, its vfio-user-pci, and an Intel vIOMMU: each page of a transfer is mapped and unmapped at
the server. The last test kills the server while the disk is in use.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import re
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from host_errands import errand

import vfiopy
from vfiopy.drivers import nvme

pytestmark = [pytest.mark.machine("vfio-user"), pytest.mark.timeout(600)]

SERVED = "0000:00:11.0"
PCI = Path("/sys/bus/pci")
FUNCTION = PCI / "devices" / SERVED
IO_TIMEOUT = Path("/sys/module/nvme_core/parameters/io_timeout")
FILES, SIZE = 16, 4 << 20
"""64 MiB."""
COMPLAINT = re.compile(
    r"\] nvme .*(error|abort|timeout|timed out|fail|reset|dead|disabl|invalid)|I/O error|EXT4-fs (error|warning)",
    re.IGNORECASE,
)
FREE = 220 << 20
"""Behind the partition."""
CSTS = 7
"""Controller status, in registers of 32 bits."""


def run(*words: str | Path, given: str | None = None) -> str:
    done = subprocess.run([str(word) for word in words], input=given, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
    return done.stdout


def wait_for(condition: Callable[[], object], seconds: float, what: str) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not within {seconds} s: {what}"
        time.sleep(0.1)


def disk_of(function: Path) -> Path:
    """The block device that Linux's driver makes of a controller."""
    found: list[Path] = []

    def look() -> bool:
        found[:] = [Path("/dev", path.name) for path in function.glob("nvme/nvme*/nvme*n1")]
        return bool(found) and found[0].is_block_device()

    wait_for(look, 20, f"a disk of {function.name}")
    return found[0]


def partition_of(disk: Path) -> Path:
    partition = Path(f"{disk}p1")
    wait_for(partition.is_block_device, 20, f"{partition}")
    return partition


@contextmanager
def mounted(partition: Path, folder: Path, options: str = "rw") -> Iterator[Path]:
    folder.mkdir(exist_ok=True)
    run("mount", "-t", "ext4", "-o", options, partition, folder)
    try:
        yield folder
    finally:
        run("umount", folder)


class KernelLog:
    """What the kernel says from now on."""

    def __init__(self) -> None:
        self._before = len(run("dmesg").splitlines())

    def lines(self) -> list[str]:
        return run("dmesg").splitlines()[self._before :]

    def complaints(self) -> list[str]:
        return [line for line in self.lines() if COMPLAINT.search(line)]


@pytest.fixture(scope="module")
def file_system() -> Path:
    """A partition of the served disk with an empty ext4 on it."""
    disk = disk_of(FUNCTION)
    run("sfdisk", disk, given="label: gpt\nsize=200MiB, type=linux\n")
    partition = partition_of(disk)
    run("mkfs.ext4", "-q", "-L", "served", partition)
    return partition


def test_linux_finds_it_sane() -> None:
    """What lspci decodes is what an NVMe controller has, and nothing in it is broken."""
    said = run("lspci", "-vvv", "-nn", "-s", SERVED)
    print(said)
    assert "Non-Volatile memory controller [0108]" in said.splitlines()[0]
    assert "(prog-if 02 [NVM Express])" in said
    assert "Kernel driver in use: nvme" in said
    assert re.search(r"Control: .*Mem\+ BusMaster\+", said)
    assert re.search(r"Region 0: Memory at [0-9a-f]+ \(64-bit, (non-)?prefetchable\) \[size=\d+K\]", said)
    assert re.search(r"Capabilities: \[[0-9a-f]+\] MSI-X: Enable\+ Count=\d+ Masked-", said)
    assert re.search(r"Capabilities: \[[0-9a-f]+\] Express \(v2\)", said)
    for wrong in ("!!!", "<?>", "chain broken", "access denied", "unassigned", "ignored", "UnsupReq+", "rev ff"):
        assert wrong not in said
    known = ("MSI-X", "MSI", "Power Management", "Express", "Advanced Error", "Vendor Specific")
    assert all(any(name in line for name in known) for line in said.splitlines() if "Capabilities: [" in line)


def test_a_file_system_keeps_what_is_written(file_system: Path, tmp_path: Path) -> None:
    """64 MiB, written through the page cache, read again from the disk after unmounting."""
    log = KernelLog()
    sums = {}
    begin = time.monotonic()
    with mounted(file_system, tmp_path / "disk") as folder:
        for number in range(FILES):
            data = os.urandom(SIZE)
            sums[number] = hashlib.sha256(data).hexdigest()
            (folder / f"file{number}").write_bytes(data)
    written = time.monotonic()
    run("fsck.ext4", "-fn", file_system)
    Path("/proc/sys/vm/drop_caches").write_text("3")
    with mounted(file_system, tmp_path / "disk", "ro") as folder:
        assert sorted(path.name for path in folder.glob("file*")) == sorted(f"file{number}" for number in sums)
        for number, wanted in sums.items():
            assert hashlib.sha256((folder / f"file{number}").read_bytes()).hexdigest() == wanted
    print(f"64 MiB written in {written - begin:.1f} s, checked in {time.monotonic() - written:.1f} s")
    assert log.complaints() == []
    statistics = [int(word) for word in (Path("/sys/class/block") / file_system.name / "stat").read_text().split()]
    assert statistics[6] * 512 >= FILES * SIZE  # sectors that really went out


def test_identity_agrees_with_the_driver_of_linux() -> None:
    (controller,) = FUNCTION.glob("nvme/nvme*")
    theirs = {name: (controller / name).read_text().strip() for name in ("model", "serial", "firmware_rev")}
    sectors = int((Path("/sys/class/block") / disk_of(FUNCTION).name / "size").read_text())
    with vfiopy.bind(SERVED), vfiopy.open(SERVED, backend="iommufd") as device, nvme.Controller(device) as ours:
        info = ours.info
        assert {"model": info.model, "serial": info.serial, "firmware_rev": info.firmware} == theirs
        assert ours.namespace(1).info.size == sectors * 512
    disk_of(FUNCTION)


@pytest.mark.parametrize("mode", ["iommufd", "type1v2"])
def test_our_driver_in_the_guest(mode: str, file_system: Path) -> None:
    """Both ends of vfiopy: what our driver writes through VFIO and an IOAS lies on the disk that Linux sees."""
    noise = np.frombuffer(hashlib.shake_128(mode.encode()).digest(1 << 20), np.uint8)
    with vfiopy.bind(SERVED), vfiopy.open(SERVED, backend=mode) as device, nvme.Controller(device, queues=2) as ours:
        disk = ours.namespace(1)
        block = FREE // disk.block_size
        disk.write(block, noise)
        assert np.array_equal(disk.read(block, noise.size // disk.block_size).view(np.uint8), noise)
    fd = os.open(disk_of(FUNCTION), os.O_RDONLY | os.O_CLOEXEC)
    try:
        assert os.pread(fd, noise.size, FREE) == noise.tobytes()
    finally:
        os.close(fd)
    assert partition_of(disk_of(FUNCTION)) == file_system


def test_reads_per_second() -> None:
    """The figures are an emulator's; that they are there is what is tested."""
    from _bench import nvme as bench  # noqa: PLC0415 - only where it can run

    rows = bench.run(quick=False)
    for row in rows:
        print(f"{row.group}: {row.name}: {row.value:.0f} µs, {row.remark}")
    assert [row.name for row in rows] == ["QEMU's controller", "vfiopy serve nvme"] * 2
    assert all(row.value > 0 for row in rows)


# --- and its end: nothing that uses the disk may come behind this ----------------------------------------------------


def rebind(seconds: int) -> None:
    """Give the driver another patience for commands: it looks at it when it takes the controller."""
    IO_TIMEOUT.write_text(str(seconds))
    (PCI / "drivers/nvme/unbind").write_text(SERVED)
    (PCI / "drivers/nvme/bind").write_text(SERVED)


def write_on(fd: int, ended: list[BaseException]) -> None:
    """Write to a disk, behind its partition, until that fails."""
    block = bytes(1 << 16)
    try:
        while True:
            os.pwrite(fd, block, FREE)
            os.fsync(fd)
    except OSError as error:
        ended.append(error)


@pytest.mark.changes_the_machine
def test_a_server_that_is_killed_and_a_new_one(file_system: Path, tmp_path: Path) -> None:
    rebind(5)
    with mounted(partition_of(disk_of(FUNCTION)), tmp_path / "disk") as folder:
        (folder / "kept").write_bytes(b"written before the crash" * 1000)
    fd = os.open(disk_of(FUNCTION), os.O_RDWR | os.O_CLOEXEC)
    ended: list[BaseException] = []
    writer = threading.Thread(target=write_on, args=(fd, ended))
    log = KernelLog()
    with (FUNCTION / "resource0").open("rb") as bar:
        registers = memoryview(mmap.mmap(bar.fileno(), mmap.PAGESIZE, prot=mmap.PROT_READ)).cast("I")
    assert registers[CSTS] == 1  # ready
    writer.start()
    time.sleep(1)
    errand("kill nvme")
    killed = time.monotonic()
    # the bus: nobody answers
    with (FUNCTION / "config").open("rb") as config:
        assert config.read(4) == b"\xff" * 4
    assert registers[CSTS] == 0xFFFF_FFFF
    # the driver: every command fails, and nothing waits for ever
    writer.join(120)
    assert not writer.is_alive()
    print(f"the writer ended after {time.monotonic() - killed:.1f} s: {ended}")
    assert isinstance(ended[0], OSError)
    os.close(fd)
    states = {path.name: (path / "state").read_text().strip() for path in FUNCTION.glob("nvme/nvme*")}
    print(states, *log.complaints(), sep="\n")
    assert set(states.values()) <= {"dead", "deleting"}
    registers.release()
    (PCI / "drivers/nvme/unbind").write_text(SERVED)
    assert not list(FUNCTION.glob("nvme/nvme*"))
    # the machine lives, and takes another
    before = {path.name for path in (PCI / "devices").iterdir()}
    errand("serve nvme")
    errand("plug nvme")
    new: set[str] = set()

    def look() -> bool:
        new.update({path.name for path in (PCI / "devices").iterdir()} - before)
        return bool(new)

    wait_for(look, 60, "the new function")
    (address,) = new
    disk = disk_of(PCI / "devices" / address)
    log = KernelLog()
    with mounted(partition_of(disk), tmp_path / "disk") as folder:
        assert (folder / "kept").read_bytes() == b"written before the crash" * 1000
        (folder / "after").write_bytes(b"and after")
    with mounted(partition_of(disk), tmp_path / "disk", "ro") as folder:
        assert (folder / "after").read_bytes() == b"and after"
    assert log.complaints() == []

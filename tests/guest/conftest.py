"""What every guest test relies on: which machine this is, where its devices are, that nothing is left."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1] / "tools"))

from _lab.console import complaints  # noqa: E402 - the lab decides what counts as a complaint, in one place
from ioctl_fixtures import container, edu, group, memory  # noqa: E402, F401  for all that do not make their own

from vfiopy.lives import drain_finalizers  # noqa: E402

PCI = Path("/sys/bus/pci/devices")
HUGEPAGES = Path("/sys/kernel/mm/hugepages")
DEFAULT_MACHINE = "intel"


def lab_machine() -> str | None:
    """Name of the lab machine that this is, from the kernel's command line; None outside the lab."""
    for word in Path("/proc/cmdline").read_text().split():
        if word.startswith("vfiopy.lab="):
            return word.partition("=")[2]
    return None


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "machine(*names): the lab machines this test is for; without it, only the default machine"
    )
    config.addinivalue_line("markers", "changes_the_machine: functions come or go, and are not what they were before")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Outside the lab skip the guest's tests; in it, keep those that are for this machine."""
    machine = lab_machine()
    kept, dropped = [], []
    for item in items:
        if not item.path.is_relative_to(HERE):
            kept.append(item)
            continue
        item.add_marker(pytest.mark.guest)
        marker = item.get_closest_marker("machine")
        names = marker.args if marker else (DEFAULT_MACHINE,)
        if machine is None:
            item.add_marker(pytest.mark.skip(reason="needs the lab guest: tools/lab pytest"))
            kept.append(item)
        else:
            # compat and debug are the default machine with another kernel
            like = DEFAULT_MACHINE if machine in ("compat", "debug") else machine
            (kept if machine in names or like in names else dropped).append(item)
    if dropped:
        config.hook.pytest_deselected(items=dropped)
        items[:] = kept


@pytest.fixture
def machine() -> str:
    """Name of the lab machine."""
    name = lab_machine()
    assert name is not None
    return name


@pytest.fixture(scope="session")
def bdfs() -> Callable[[str], list[str]]:
    """All functions with an id: ``bdfs("1234:11e8")`` gives ``["0000:00:04.0", "0000:02:01.0"]``."""

    def find(ids: str) -> list[str]:
        wanted = [f"0x{part}\n" for part in ids.split(":")]
        return sorted(
            path.name
            for path in PCI.iterdir()
            if [(path / name).read_text() for name in ("vendor", "device")] == wanted
        )

    return find


@pytest.fixture(scope="session")
def bdf(bdfs: Callable[[str], list[str]]) -> Callable[..., str]:
    """One function with an id: ``bdf("1234:11e8")`` is the first, ``bdf("1234:11e8", 1)`` the second."""

    def find(ids: str, index: int = 0) -> str:
        found = bdfs(ids)
        assert len(found) > index, f"the guest has {len(found)} functions {ids}, not {index + 1}"
        return found[index]

    return find


@pytest.fixture(scope="module")
def bound_edu(bdf: Callable[..., str]) -> Iterator[str]:
    """Address of the first edu, on vfio-pci for all tests of the module: binding takes a second each time."""
    from vfiopy import bind  # noqa: PLC0415  the tests of the lab itself run without vfiopy

    address = bdf("1234:11e8")
    with bind(address):
        yield address


@pytest.fixture(autouse=True)
def dmesg_clean() -> Iterator[None]:
    """The kernel had nothing to complain about during the test."""
    with open("/dev/kmsg", "rb", buffering=0) as log:  # noqa: PTH123 - unbuffered, one record per read
        os.set_blocking(log.fileno(), False)
        log.seek(0, os.SEEK_END)
        yield
        lines: list[str] = []
        while True:
            try:
                record = log.read(8192)
            except BlockingIOError:
                break
            except BrokenPipeError:  # the ring has overtaken us: go on with what is left of it
                continue
            if not record:
                break
            lines += record.decode("utf-8", "replace").partition(";")[2].splitlines()
    found = complaints(lines)
    assert not found, "the kernel complained during this test:\n" + "\n".join(lines[:200])


def _descriptors() -> dict[int, str]:
    found = {}
    for entry in Path("/proc/self/fd").iterdir():
        try:
            found[int(entry.name)] = str(entry.readlink())
        except OSError:  # the listing's own descriptor
            continue
    return found


def _bindings() -> dict[str, tuple[str, str]]:
    """Driver and override of every PCI function."""
    found = {}
    for path in PCI.iterdir():
        try:
            name = (path / "driver").readlink().name
        except FileNotFoundError:
            name = ""
        found[path.name] = (name, (path / "driver_override").read_text().strip().replace("(null)", ""))
    return found


def _locked_memory() -> dict[str, str]:
    lines = (line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return {name: value.strip() for name, value, *_ in lines if name in ("VmLck", "VmPin")}


def _free_hugepages() -> dict[str, int]:
    return {size.name: int((size / "free_hugepages").read_text()) for size in HUGEPAGES.iterdir()}


@pytest.fixture(autouse=True)
def nothing_left_behind(quick_collections: None, request: pytest.FixtureRequest) -> Iterator[None]:
    """The test gives back what it took: descriptors, locked memory, huge pages, driver bindings."""
    gc.collect()
    before = (_descriptors(), _locked_memory(), _free_hugepages(), _bindings())
    yield
    gc.collect()
    assert drain_finalizers() == 0, "something was dropped without close()"
    after = (_descriptors(), _locked_memory(), _free_hugepages(), _bindings())
    opened = {number: target for number, target in after[0].items() if before[0].get(number) != target}
    assert not opened, f"left open: {opened}"
    assert after[1] == before[1], "locked or pinned memory left behind"
    assert after[2] == before[2], "huge pages left in use"
    if request.node.get_closest_marker("changes_the_machine") is None:
        assert after[3] == before[3], "driver bindings or overrides changed"

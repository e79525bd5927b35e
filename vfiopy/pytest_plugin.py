"""Fixtures for tests of drivers: ``pytest --bdf 0000:00:05.0``, or ``--bdf emulated:edu``.

Loaded by pytest wherever vfiopy is installed: costs vfiopy's import, opens nothing before a fixture is used.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from vfiopy import AddressSpace, Device

__all__ = ["vfiopy_device", "vfiopy_space", "vfiopy_target"]


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add ``--bdf`` and ``--vfiopy-backend``."""
    group = parser.getgroup("vfiopy", "drive PCI devices")
    group.addoption(
        "--bdf",
        action="append",
        default=[],
        metavar="DEVICE",
        help="device for the vfiopy fixtures: a PCI address bound to vfio-pci, or emulated:edu; "
        "may be repeated; default: $VFIOPY_BDF",
    )
    group.addoption(
        "--vfiopy-backend",
        default=None,
        metavar="NAME",
        help="iommufd, type1v2, ...; default: what vfiopy.open() picks",
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run a test once per device that was named."""
    if "vfiopy_target" in metafunc.fixturenames:
        named = metafunc.config.getoption("--bdf") or os.environ.get("VFIOPY_BDF", "").split()
        metafunc.parametrize("vfiopy_target", named or [None], indirect=True, scope="session")


@pytest.fixture(scope="session")
def vfiopy_target(request: pytest.FixtureRequest) -> str:
    """The device under test as it was named on the command line; skips the test where none was."""
    if request.param is None:
        pytest.skip("name a device: pytest --bdf 0000:00:05.0 (bound to vfio-pci), or --bdf emulated:edu")
    return str(request.param)


@pytest.fixture
def vfiopy_space() -> Iterator[AddressSpace]:
    """An address space of its own for each test."""
    from vfiopy import AddressSpace  # noqa: PLC0415

    with AddressSpace("test") as space:
        yield space


@pytest.fixture
def vfiopy_device(
    vfiopy_target: str, vfiopy_space: AddressSpace, request: pytest.FixtureRequest
) -> Iterator[Device]:
    """The device under test, open in ``vfiopy_space``; closed with all it holds after the test."""
    import vfiopy  # noqa: PLC0415

    backend = request.config.getoption("--vfiopy-backend")
    with vfiopy.open(vfiopy_target, backend=backend, space=vfiopy_space) as device:
        yield device

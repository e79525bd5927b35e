"""What a shell may complete: addresses, backends, regions. Looks into sysfs, and opens nothing."""

from __future__ import annotations

from collections.abc import Iterator

import typer

from vfiopy.cli.common import system_of
from vfiopy.errors import VfiopyError
from vfiopy.pci import find

__all__ = ["complete_address", "complete_backend", "complete_region", "complete_target"]

_REGIONS = (*(f"bar{index}" for index in range(6)), "rom", "config", "vga")


def _functions(context: typer.Context, incomplete: str) -> Iterator[tuple[str, str]]:
    try:
        for function in find(system=system_of(context)):
            if str(function.address).startswith(incomplete.lower()):
                yield str(function.address), f"{function.name}, {function.driver or 'no driver'}"
    except (VfiopyError, OSError):
        return


def complete_address(context: typer.Context, incomplete: str) -> list[tuple[str, str]]:
    """PCI addresses of this machine."""
    return list(_functions(context, incomplete))


def complete_target(context: typer.Context, incomplete: str) -> list[tuple[str, str]]:
    """The same, and devices that are software."""
    from vfiopy.emulated.registry import device_names  # noqa: PLC0415  an address needs no emulated device

    software = [(f"emulated:{name}", "a Python object") for name in device_names()]
    software.append(("vfio-user:", "followed by the path of a socket"))
    return [*_functions(context, incomplete), *(one for one in software if one[0].startswith(incomplete))]


def complete_backend(incomplete: str) -> list[str]:
    """Ways to reach a device through the kernel."""
    from vfiopy.selftest.runner import ALL_BACKENDS  # noqa: PLC0415

    return [name for name in ALL_BACKENDS if name.startswith(incomplete)]


def complete_region(incomplete: str) -> list[str]:
    """Names of regions."""
    return [name for name in _REGIONS if name.startswith(incomplete.lower())]

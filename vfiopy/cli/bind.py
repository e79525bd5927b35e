"""``vfiopy bind``."""

from __future__ import annotations

from typing import Annotated

import typer

import vfiopy
from vfiopy.cli.common import refusals_told

__all__ = ["run_bind"]


def run_bind(
    address: Annotated[str, typer.Argument(help="PCI address, such as 0000:00:05.0.")],
    driver: Annotated[str, typer.Option(help="Driver to bind to.")] = "vfio-pci",
    group: Annotated[bool, typer.Option("--group", help="The whole IOMMU group, without its bridges.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Even if the running system uses the device.")] = False,
) -> None:
    """Hand a device to vfio-pci until 'vfiopy restore' or the next boot. Remembers what was before."""
    with refusals_told():
        binding = vfiopy.bind(address, driver, whole_group=group, force=force)
        binding.keep()
    for function in binding.functions:
        typer.echo(f"{function.address}: {function.driver}")

"""The machine that connect() is tried on: two functions on vfio-pci, one on no driver, each in a group of its own."""

from __future__ import annotations

from pathlib import Path

from pci_tree import FakeKernel

A, B, C, BRIDGE = "0000:00:04.0", "0000:00:05.0", "0000:00:06.0", "0000:00:07.0"
ROADS = ("iommufd", "type1v2", "type1", "iommufd-compat-type1v2", "iommufd-compat-type1")


def make_tree(place: Path) -> FakeKernel:
    """Make it under a folder."""
    kernel = FakeKernel.make(place)
    for name in ("vfio-pci", "e1000e", "pcieport"):
        kernel.add_driver(name)
    kernel.add(A, driver="vfio-pci", group=4)
    kernel.add(B, driver="vfio-pci", group=5)
    kernel.add(C, group=6)
    (kernel.dev / "iommu").write_text("")
    return kernel

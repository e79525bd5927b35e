"""The lab: a QEMU guest with a vIOMMU, a kernel with all of VFIO and iommufd, and emulated PCI devices.

Standard library only, because it runs before any virtual environment exists.
"""

__all__: list[str] = []

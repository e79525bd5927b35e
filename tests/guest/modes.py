"""The five ways through the kernel that every DMA test takes, as in the kernel's own vfio selftests."""

from __future__ import annotations

MODES = ("type1", "type1v2", "iommufd-compat-type1", "iommufd-compat-type1v2", "iommufd")

EDU = "1234:11e8"
NVME = "1b36:0010"
IVSHMEM = "1af4:1110"
IGB = "8086:10c9"
E1000E = "8086:10d3"

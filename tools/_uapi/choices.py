"""Data: which headers are read, which names are left out and why, which readers may be wrong and why.

Every exception to "restate all of it, and all readers agree" is an entry here with its reason; an entry
that no longer applies to anything is an error, so that the tables cannot rot.
"""

from __future__ import annotations

from typing import Final

__all__ = [
    "CTYPESGEN_VERSION",
    "GROWING",
    "HEADERS",
    "LEFT_OUT",
    "PLACEHOLDER",
    "REASONS",
    "REMEDIES",
    "UNSIGNED",
]

HEADERS: Final = ("vfio.h", "iommufd.h", "dma-buf.h", "dma-heap.h", "udmabuf.h", "sync_file.h")

LEFT_OUT: Final[dict[str, str]] = {
    r"_?_?VFIO_RESERVED_\w+": "a number the kernel keeps unused",
    r"(VFIO|vfio)_(\w+_)?(SPAPR|spapr)_\w+": "ppc64 sPAPR only",
    r"VFIO_IOMMU_(ENABLE|DISABLE)": "ppc64 sPAPR only; type1 answers ENOTTY",
    r"(VFIO_EEH|vfio_eeh)\w*": "ppc64 EEH only",
    r"(VFIO|vfio)_\w+_(ZPCI|zpci)_\w+": "s390x zPCI only",
    r"VFIO_CCW_\w+|VFIO_REGION_(SUB)?TYPE_CCW\w*": "s390x channel I/O only",
    r"VFIO_AP_\w+": "s390x AP cryptography only",
    r"(VFIO|vfio)_\w+_(NVLINK2|nvlink2)_\w+": "ppc64 POWER9 only; the kernel's producers are gone",
    r"VFIO_DEVICE_STATE_(V1_\w+|MASK)|vfio_device_migration_info": "migration v1: dead, no kernel answers it",
    r"VFIO_REGION_\w+_MIGRATION_DEPRECATED": "migration v1: dead, no kernel answers it",
    r"VFIO_DEVICE_API_\w+_STRING": "text of mediated devices' sysfs files, not a number",
}
"""Names (whole-match patterns) that are not restated, with the reason."""

UNSIGNED: Final[dict[str, str]] = {
    "VFIO_REGION_TYPE_PCI_VENDOR_TYPE": "bit 31 of a __u32; as an int it would be negative",
    "VFIO_PCI_DEVID_NOT_OWNED": "compared with a __u32 devid; as an int it is -1",
}
"""Constants that C gives a negative int and that are restated as the 32-bit pattern, with the reason."""

GROWING: Final[dict[str, str]] = {
    "VFIO_PCI_NUM_IRQS": "one past the last interrupt index",
    "VFIO_DEVICE_STATE_NR": "one past the last migration state",
}
"""Constants that count others, and may grow from one kernel to the next."""

PLACEHOLDER: Final = r"(\w+_)?(_*reserved|_*resv|_*pad|padding)\d*"
"""Fields that hold a place; a later kernel may give the place to a real field."""

CTYPESGEN_VERSION: Final = "1.1.1"
"""The second reader's version; the remedies and reasons below are about this one."""

REMEDIES: Final[dict[str, str]] = {
    "__signed__=signed": "ctypesgen does not know the spelling, and loses every structure with a __s32 in it",
    "__int128=long": "ctypesgen does not know the type; no structure of ours has it",
}
"""Macros that ctypesgen's preprocessor is given, with the reason."""

REASONS: Final[dict[str, str]] = {
    "ioctl": "ctypesgen takes the type of _IO(';', n) for a string, fails to add, and drops the number",
    "character": "ctypesgen makes a string of a character constant",
    "fcntl": "ctypesgen does not see O_CLOEXEC, which the header leaves to its user to include",
    "flexible": "ctypesgen makes a pointer of a flexible array: 8 bytes too many, and aligned",
}
"""Why ctypesgen may disagree with the compiler; the compiler is right each time."""

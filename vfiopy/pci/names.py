"""Names for people: classes by a short word, vendors and devices from the system's ``pci.ids``, if any."""

from __future__ import annotations

import gzip
from functools import lru_cache
from pathlib import Path

__all__ = ["CLASS_WORDS", "class_matches", "class_name", "device_name"]

CLASS_WORDS: dict[str, str] = {
    "storage": "01",
    "scsi": "0100",
    "ide": "0101",
    "raid": "0104",
    "sata": "0106",
    "ahci": "010601",
    "sas": "0107",
    "nvm": "0108",
    "nvme": "010802",
    "network": "02",
    "ethernet": "0200",
    "infiniband": "0207",
    "display": "03",
    "vga": "0300",
    "3d": "0302",
    "multimedia": "04",
    "audio": "0403",
    "memory": "05",
    "ram": "0500",
    "cxl": "0502",
    "bridge": "06",
    "host-bridge": "0600",
    "isa-bridge": "0601",
    "pci-bridge": "0604",
    "communication": "07",
    "serial": "0700",
    "system": "08",
    "iommu": "0806",
    "input": "09",
    "processor": "0b",
    "coprocessor": "0b40",
    "bus": "0c",
    "usb": "0c03",
    "uhci": "0c0300",
    "ohci": "0c0310",
    "ehci": "0c0320",
    "xhci": "0c0330",
    "smbus": "0c05",
    "wireless": "0d",
    "encryption": "10",
    "signal": "11",
    "accelerator": "12",
    "unclassified": "00",
    "unassigned": "ff",
}
"""Word → first hexadecimal digits of a class code (PCI Code and ID Assignment, section 1)."""

_NAMES: dict[str, str] = {
    "00": "unclassified device",
    "01": "storage controller",
    "0100": "SCSI controller",
    "0101": "IDE controller",
    "0104": "RAID controller",
    "0106": "SATA controller",
    "0107": "SAS controller",
    "0108": "non-volatile memory controller",
    "010802": "NVMe controller",
    "02": "network controller",
    "0200": "Ethernet controller",
    "0207": "InfiniBand controller",
    "03": "display controller",
    "0300": "VGA controller",
    "0302": "3D controller",
    "04": "multimedia controller",
    "0403": "audio device",
    "05": "memory controller",
    "0500": "RAM controller",
    "0502": "CXL memory device",
    "06": "bridge",
    "0600": "host bridge",
    "0601": "ISA bridge",
    "0604": "PCI bridge",
    "07": "communication controller",
    "0700": "serial controller",
    "08": "system peripheral",
    "0806": "IOMMU",
    "09": "input device controller",
    "0a": "docking station",
    "0b": "processor",
    "0b40": "coprocessor",
    "0c": "serial bus controller",
    "0c03": "USB controller",
    "0c05": "SMBus controller",
    "0d": "wireless controller",
    "0e": "intelligent controller",
    "0f": "satellite controller",
    "10": "encryption controller",
    "11": "signal processing controller",
    "12": "processing accelerator",
    "13": "instrumentation",
    "40": "coprocessor",
    "ff": "unassigned class",
}


def class_name(class_code: int) -> str:
    """What a 24-bit class code stands for, as precisely as is known."""
    digits = f"{class_code:06x}"
    for length in (6, 4, 2):
        if digits[:length] in _NAMES:
            return _NAMES[digits[:length]]
    return f"class {digits}"


def class_matches(class_code: int, wanted: int | str) -> bool:
    """Whether a 24-bit class code is of the kind that was asked for.

    Args:
        class_code: the function's class code.
        wanted: a base class (up to 0xff), a base and sub-class (up to 0xffff) or all 24 bits; or a word such
            as ``"nvme"``, or 2, 4 or 6 hexadecimal digits, which also says what a small number means.

    Raises:
        ValueError: the word is not known.
    """
    if isinstance(wanted, int):
        if not 0 <= wanted <= 0xFFFFFF:
            raise ValueError(f"class code {wanted:#x} does not fit in 24 bits")
        return class_code >> (16 if wanted <= 0xFF else 8 if wanted <= 0xFFFF else 0) == wanted
    word = wanted.strip().lower().replace(" ", "-").replace("_", "-")
    digits = CLASS_WORDS.get(word, word.removeprefix("0x"))
    if len(digits) not in (2, 4, 6) or not set(digits) <= set("0123456789abcdef"):
        raise ValueError(
            f"{wanted!r} is not a class; use 2, 4 or 6 hexadecimal digits or one of: " + ", ".join(sorted(CLASS_WORDS))
        )
    return f"{class_code:06x}".startswith(digits)


def device_name(folders: tuple[Path, ...], vendor: int, device: int) -> str | None:
    """Vendor and device name from ``pci.ids``, the vendor's alone if the device is not listed, or None."""
    for folder in folders:
        for path in (folder / "pci.ids", folder / "pci.ids.gz"):
            try:
                stamp = path.stat().st_mtime_ns
            except OSError:
                continue
            found = _read_ids(path, stamp).get(vendor)
            if found is None:
                continue
            name, devices = found
            return f"{name} {devices[device]}" if device in devices else name
    return None


@lru_cache(maxsize=4)
def _read_ids(path: Path, _stamp: int) -> dict[int, tuple[str, dict[int, str]]]:
    # Lines: "1b36  Red Hat, Inc." and below it "\t0010  QEMU NVM Express Controller"; two tabs: subsystems;
    # the classes, which begin with "C ", come last.
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    vendors: dict[int, tuple[str, dict[int, str]]] = {}
    devices: dict[int, str] = {}
    for line in data.decode("utf-8", "replace").splitlines():
        if line.startswith("C "):
            break
        if not line or line.startswith(("#", "\t\t")):
            continue
        number, _, name = line.strip().partition("  ")
        try:
            key = int(number, 16)
        except ValueError:
            continue
        if line.startswith("\t"):
            devices[key] = name
        else:
            devices = {}
            vendors[key] = (name, devices)
    return vendors

"""Where the kernel shows its devices, and the one door through which vfiopy changes them.

Everything in this package that reads or writes below /sys, /proc and /dev goes through a :class:`System`. A
test hands in one with other roots; a sweep over failing writes overrides :meth:`System.write`.
"""

from __future__ import annotations

import array
import errno
import fcntl
import os
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

__all__ = ["System"]

_SIOCGIFCONF = 0x8912  # linux/sockios.h


@dataclass(frozen=True)
class System:
    """Roots of the kernel's file systems.

    Attributes:
        sys: where sysfs is mounted.
        proc: where procfs is mounted.
        dev: where the device nodes are.
        etc: where the system's configuration is.
        share: folders that may hold ``pci.ids``.
    """

    sys: Path = Path("/sys")
    proc: Path = Path("/proc")
    dev: Path = Path("/dev")
    etc: Path = Path("/etc")
    share: tuple[Path, ...] = field(
        default=(
            Path("/usr/share/misc"),
            Path("/usr/share/hwdata"),
            Path("/var/lib/pciutils"),
            Path("/usr/share"),
        )
    )

    @property
    def is_this_machine(self) -> bool:
        """The roots are the real ones, so that libudev sees the same devices."""
        return self.sys == Path("/sys")

    @property
    def pci(self) -> Path:
        """The PCI bus in sysfs."""
        return self.sys / "bus" / "pci"

    @property
    def pci_devices(self) -> Path:
        """The folder that has a link for each PCI function."""
        return self.pci / "devices"

    def driver(self, name: str) -> Path:
        """The folder of a PCI driver; exists while the driver is registered."""
        return self.pci / "drivers" / name

    # --- reading ---

    def text(self, path: Path) -> str | None:
        """Content of a small file without surrounding white space, or None where there is no such file."""
        try:
            return path.read_text(encoding="utf-8", errors="replace").strip()
        except (FileNotFoundError, NotADirectoryError, ProcessLookupError):
            return None
        except OSError:
            # sysfs attributes of a device that is going away answer ENODEV or EIO
            if not path.parent.exists():
                return None
            raise

    def number(self, path: Path) -> int | None:
        """Content of a file that holds one number (decimal, or hexadecimal with 0x), or None."""
        text = self.text(path)
        return None if not text else int(text, 0)

    def link_name(self, path: Path) -> str | None:
        """Last part of a symbolic link's target, or None where there is no link."""
        try:
            return os.path.basename(os.readlink(path))  # noqa: PTH115, PTH119  the target's text, not a path
        except OSError:
            return None

    def names(self, folder: Path) -> list[str]:
        """Sorted names in a folder; none where there is no such folder."""
        try:
            return sorted(os.listdir(folder))  # noqa: PTH208  names are wanted, not paths
        except (FileNotFoundError, NotADirectoryError):
            return []

    def processes(self) -> Iterator[int]:
        """Process ids that /proc shows."""
        return (int(name) for name in self.names(self.proc) if name.isdigit())

    # --- asking ---

    def is_claimed(self, node: Path) -> bool:
        """Whether a block device is claimed in the kernel: mounted, swap, dm, md, in any namespace."""
        try:
            fd = os.open(node, os.O_RDONLY | os.O_EXCL | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            return error.errno == errno.EBUSY
        os.close(fd)
        return False

    def ipv4_addresses(self) -> list[tuple[str, str]]:
        """(interface, address) of each IPv4 address of this network namespace."""
        # SIOCGIFCONF fills an array of struct ifreq (linux/if.h): 16 bytes of name, then a sockaddr_in whose
        # address is at 4; 40 bytes each on 64-bit machines.
        entry, room = 40, 256
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            while True:
                names = array.array("B", bytes(entry * room))
                request = struct.pack("iP", len(names), names.buffer_info()[0])
                filled: int = struct.unpack("iP", fcntl.ioctl(probe, _SIOCGIFCONF, request))[0]
                if filled < len(names):
                    break
                room *= 2
        data = names.tobytes()[:filled]
        return [
            (
                data[at : at + 16].split(b"\0")[0].decode().split(":")[0],
                socket.inet_ntoa(data[at + 20 : at + 24]),
            )
            for at in range(0, filled, entry)
        ]

    # --- changing ---

    def write(self, path: Path, text: str) -> None:
        """Write to a sysfs attribute with one write(2), which is what sysfs wants. Raises ``OSError``."""
        fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.write(fd, text.encode())
        finally:
            os.close(fd)

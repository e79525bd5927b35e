"""NewDevice: a PCI device in Python, to begin your own from.

    python new_device.py /tmp/new-device.sock          # offers it: QEMU's -device option is printed

It adds up what is written to its first register and stores the sum where the second one points to.

===========  =====  ==========================================================
offset       width  register
===========  =====  ==========================================================
0x00         4      sum; a written number is added to it
0x08         8      where the sum goes: an IOVA
0x10         4      go: any write; the sum is stored, then an interrupt is sent
===========  =====  ==========================================================
"""

from __future__ import annotations

import struct
import sys

from vfiopy.emulated import Bar, Identity, MsiX, PciDevice, PciExpress
from vfiopy.errors import NotMappedError

_SAVED = struct.Struct("<IQ?")


class NewDevice(PciDevice):
    """What the function is made of, and what its registers do."""

    name = "new-device"
    identity = Identity(vendor=0x1234, device=0x0001, class_code=0xFF0000)
    bars = {0: Bar(0x1000), 2: Bar(0x2000, shared=True)}  # noqa: RUF012  declared ClassVar by the base
    capabilities = (
        PciExpress(function_reset=True),
        MsiX(vectors=1, table_bar=2, table_offset=0, pba_bar=2, pba_offset=0x1000),
    )

    def reset(self) -> None:
        """Power-on state."""
        self._sum = 0
        self._target = 0
        self._busy = False

    def read(self, bar: int, offset: int, width: int) -> int:  # noqa: ARG002  BAR 2 is memory: no handler
        """Read a register; what is none reads as ones."""
        match offset, width:
            case 0x00, 4:
                return self._sum
            case 0x08, 8:
                return self._target
        return -1

    def write(self, bar: int, offset: int, width: int, value: int) -> None:  # noqa: ARG002
        """Write a register. It returns at once: what takes time is done later."""
        match offset, width:
            case 0x00, 4:
                self._sum = (self._sum + value) & 0xFFFF_FFFF
            case 0x08, 8:
                self._target = value
            case 0x10, 4 if not self._busy:
                self._busy = True
                self.later(self._store)

    def _store(self) -> None:
        self._busy = False
        try:
            self.dma_write(self._target, self._sum.to_bytes(4, "little"))
        except NotMappedError:
            return  # it is in ``faults``; a device with an error register would say so there
        self.interrupt(0)

    def save(self) -> bytes:
        """For migration; leave both out and the device cannot be migrated."""
        return _SAVED.pack(self._sum, self._target, self._busy)

    def load(self, data: bytes) -> None:
        """Go on where ``save`` left off."""
        if len(data) != _SAVED.size:
            raise ValueError(f"{len(data)} bytes instead of {_SAVED.size}")
        self._sum, self._target, self._busy = _SAVED.unpack(data)
        if self._busy:
            self.later(self._store)


def main() -> None:
    """Offer the device on a socket until Ctrl-C."""
    import vfiopy  # noqa: PLC0415

    with vfiopy.serve(NewDevice(), sys.argv[1]) as server:
        print(f"-device '{server.qemu_option}'", flush=True)  # noqa: T201
        server.run()


if __name__ == "__main__":
    main()

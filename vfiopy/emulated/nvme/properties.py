"""The controller's registers as values (Base 2.0, 3.1.3): what they read as, and what may be written to them."""

from __future__ import annotations

from typing import Final

from vfiopy.emulated.nvme.function import BUFFER_BAR
from vfiopy.emulated.nvme.identify import VERSION
from vfiopy.emulated.nvme.settings import Settings
from vfiopy.nvme_spec import registers as reg

__all__ = ["Properties"]

_DWORD: Final = 0xFFFF_FFFF
_CQR, _CSS_NVM, _CSS_SETS, _CRWMS, _CMBS = 1 << 16, 1 << 37, 1 << 43, 1 << 59, 1 << 57
_MPS_MAX: Final = 4  # 64 KiB
_BUFFER_USES: Final = 0x1F  # CMBSZ: submission and completion queues, lists, data to and from
_CRE, _CMSE = 1 << 0, 1 << 1
_CSS_ALLOWED: Final = (0, 6)
_WRITABLE: Final = {
    # offset: bits that can be written
    reg.CC: 0x00FF_FFF1,
    reg.AQA: 0x0FFF_0FFF,
    reg.ASQ: 0xFFFF_F000,
    reg.ASQ + 4: _DWORD,
    reg.ACQ: 0xFFFF_F000,
    reg.ACQ + 4: _DWORD,
}


class Properties:
    """The registers below the doorbells, as 32-bit words.

    Attributes:
        words: by offset, what is not there reads 0.
        interrupt_mask: INTMS and INTMC.
    """

    def __init__(self, settings: Settings) -> None:
        ready = int(settings.ready_seconds * 2)
        cap = (
            settings.entries - 1 | _CQR | ready << 24 | settings.stride << 32 | _CSS_NVM | _CSS_SETS
            | _MPS_MAX << 52 | _CRWMS | (_CMBS if settings.memory_buffer else 0)
        )  # fmt: skip
        self._buffer = settings.memory_buffer
        self._fixed = {reg.CAP: cap & _DWORD, reg.CAP + 4: cap >> 32, reg.VS: VERSION, reg.CRTO: ready}
        self.words: dict[int, int] = {}
        self.interrupt_mask = 0
        self.power_on()

    def power_on(self) -> None:
        """Go back to what power-on leaves."""
        self.words.clear()
        self.words.update(self._fixed)
        self.interrupt_mask = 0

    def controller_reset(self) -> None:
        """Do what CC.EN = 0 does: admin queue registers and the place of the memory buffer stay (3.7.2)."""
        self.words[reg.CSTS] = 0
        self.words[reg.CC] &= ~reg.CC_EN
        self.interrupt_mask = 0
        self._show_mask()

    # --- access --------------------------------------------------------------------------------------------------

    def read(self, offset: int, width: int) -> int:
        """Read 1, 2, 4 or 8 bytes."""
        word = self.words.get(offset & ~3, 0)
        if width == 8:
            return word | self.words.get(offset + 4, 0) << 32
        return word >> 8 * (offset & 3)

    def write(self, offset: int, value: int) -> None:
        """Write a word of those that only store what is written."""
        mask = _WRITABLE.get(offset, 0)
        if mask:
            self.words[offset] = value & mask

    def mask_interrupts(self, bits: int, *, clear: bool) -> None:
        """Write INTMS, or INTMC (3.1.3.3 and 3.1.3.4)."""
        self.interrupt_mask = self.interrupt_mask & ~bits if clear else self.interrupt_mask | bits
        self._show_mask()

    def _show_mask(self) -> None:
        self.words[reg.INTMS] = self.words[reg.INTMC] = self.interrupt_mask

    def write_buffer_control(self, offset: int, value: int) -> None:
        """Write half of CMBMSC (3.1.3.16)."""
        if not self._buffer:
            return
        self.words[offset] = value & (0xFFFF_F003 if offset == reg.CMBMSC else _DWORD)
        shown = bool(self.words.get(reg.CMBMSC, 0) & _CRE)
        self.words[reg.CMBLOC] = BUFFER_BAR if shown else 0
        self.words[reg.CMBSZ] = (self._buffer >> 12) << 12 | _BUFFER_USES if shown else 0

    @property
    def buffer_base(self) -> int | None:
        """Where the host wants the memory buffer for DMA; None where it does not."""
        control = self.words.get(reg.CMBMSC, 0)
        if control & (_CRE | _CMSE) != _CRE | _CMSE:
            return None
        return control & ~0xFFF | self.words.get(reg.CMBMSC + 4, 0) << 32

    def show_buffer_fits(self, fits: bool) -> None:
        """Set CMBSTS.CBAI, or clear it."""
        self.words[reg.CMBSTS] = int(not fits)

    # --- meaning -------------------------------------------------------------------------------------------------

    @property
    def control(self) -> int:
        """CC."""
        return self.words.get(reg.CC, 0)

    @property
    def status(self) -> int:
        """CSTS."""
        return self.words.get(reg.CSTS, 0)

    @status.setter
    def status(self, value: int) -> None:
        self.words[reg.CSTS] = value

    def wide(self, offset: int) -> int:
        """Read a 64-bit register."""
        return self.words.get(offset, 0) | self.words.get(offset + 4, 0) << 32

    @property
    def page(self) -> int:
        """The memory page size that CC.MPS says, bytes."""
        return 4096 << (self.control >> 7 & 0xF)

    @property
    def entry_sizes_set(self) -> bool:
        """CC.IOSQES and CC.IOCQES are what they have to be."""
        return self.control >> 16 & 0xFF == 0x46

    def complaint(self) -> str:
        """Say what is wrong with CC and AQA for a controller to be enabled with, or nothing."""
        control, aqa = self.control, self.words.get(reg.AQA, 0)
        if control >> 4 & 7 not in _CSS_ALLOWED:
            return f"CC.CSS is {control >> 4 & 7}; 0 and 6 exist"
        if control >> 7 & 0xF > _MPS_MAX:
            return f"CC.MPS is {control >> 7 & 0xF}, more than CAP.MPSMAX"
        if control >> 11 & 7:
            return f"CC.AMS is {control >> 11 & 7}; there is round robin only"
        if not aqa & 0xFFF or not aqa >> 16 & 0xFFF:
            return f"AQA is {aqa:#x}; a queue has at least two entries"
        return ""

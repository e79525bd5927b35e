"""What Identify answers (Base 2.0, 5.17; NVM Command Set 1.0, 4.1.5)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

import numpy as np

from vfiopy.emulated.nvme.command import Command, RefusedError
from vfiopy.emulated.nvme.features import CRITICAL_TEMPERATURE, WARNING_TEMPERATURE
from vfiopy.emulated.nvme.logs import ERROR_ENTRIES
from vfiopy.emulated.nvme.namespace import Namespace
from vfiopy.emulated.nvme.settings import Settings
from vfiopy.nvme_spec.opcodes import Cns
from vfiopy.nvme_spec.status import Code
from vfiopy.nvme_spec.structures import (
    IDENTIFY_CONTROLLER,
    IDENTIFY_NAMESPACE,
    IDENTIFY_SIZE,
    NAMESPACE_OF_ANY_SET,
)

__all__ = ["CONTROLLER_ID", "VERSION", "Identify"]

CONTROLLER_ID: Final = 1
VERSION: Final = 0x0002_0000
_NVM: Final = 0  # command set identifier
_ANY_CONTROLLER: Final = 0xFFFF
_NSID, _CNS, _CNTID, _CSI = 4, 40, 42, 47  # bytes of the entry, for the error log

_ONCS = 1 << 0 | 1 << 2 | 1 << 3 | 1 << 4 | 1 << 6 | 1 << 7  # compare, DSM, write zeroes, save, timestamp, verify
_LPA = 1 << 1 | 1 << 2 | 1 << 5  # commands supported and effects, offsets, supported log pages
_OAES = 1 << 8  # namespace attribute notices
_VWC = 1 << 0 | 3 << 1  # there is one; Flush of all namespaces does that
_FIRMWARE = 1 << 0 | 1 << 1  # one slot, read-only


class Identify:
    """Answers Identify.

    Args:
        settings: of the controller.
        vendor: PCI vendor and subsystem vendor.
        namespaces: the active ones, by identifier.
        sgls, oacs: SGLS and OACS of the controller data.
    """

    def __init__(
        self,
        settings: Settings,
        vendor: tuple[int, int],
        namespaces: Mapping[int, Namespace],
        *,
        sgls: int = 0,
        oacs: int = 0,
    ) -> None:
        self._settings = settings
        self._vendor = vendor
        self._namespaces = namespaces
        self._sgls = sgls
        self._oacs = oacs
        self._answers: dict[int, Callable[[Command], bytes]] = {
            Cns.NAMESPACE: self._namespace,
            Cns.CONTROLLER: self._controller,
            Cns.ACTIVE_NAMESPACES: self._active,
            Cns.NAMESPACE_DESCRIPTORS: self._descriptors,
            Cns.NAMESPACE_OF_SET: self._namespace_of_set,
            Cns.CONTROLLER_OF_SET: self._controller_of_set,
            Cns.ACTIVE_NAMESPACES_OF_SET: self._active_of_set,
            Cns.NAMESPACE_OF_ANY_SET: self._namespace_of_any_set,
            Cns.COMMAND_SETS: self._command_sets,
        }

    def answer(self, command: Command) -> bytes:
        """Return the 4096 bytes; raises RefusedError."""
        make = self._answers.get(command.cdw10 & 0xFF)
        if make is None:
            raise RefusedError.field(_CNS)
        return make(command).ljust(IDENTIFY_SIZE, b"\0")

    # --- the controller ------------------------------------------------------------------------------------------

    def _controller(self, command: Command) -> bytes:  # noqa: ARG002
        settings = self._settings
        record = np.zeros(1, IDENTIFY_CONTROLLER)
        capacity = sum(one.backing.size for one in self._namespaces.values())
        power = record["psd"][0][0]
        power["mp"] = 2500  # 25 W, in hundredths
        for name, value in {
            "vid": self._vendor[0],
            "ssvid": self._vendor[1],
            "sn": settings.serial.encode().ljust(20),
            "mn": settings.model.encode().ljust(40),
            "fr": settings.firmware.encode().ljust(8),
            "rab": 6,
            "ieee": (0x00, 0x54, 0x52),
            "mdts": settings.mdts,
            "cntlid": CONTROLLER_ID,
            "ver": VERSION,
            "rtd3r": 1_000_000,
            "rtd3e": 5_000_000,
            "oaes": _OAES,
            "cntrltype": 1,
            "oacs": self._oacs,
            "acl": 3,
            "aerl": settings.event_requests - 1,
            "frmw": _FIRMWARE,
            "lpa": _LPA,
            "elpe": ERROR_ENTRIES - 1,
            "wctemp": WARNING_TEMPERATURE,
            "cctemp": CRITICAL_TEMPERATURE,
            "tnvmcap": capacity.to_bytes(16, "little"),
            "sqes": 0x66,
            "cqes": 0x44,
            "nn": settings.most_namespaces,
            "oncs": _ONCS,
            "vwc": _VWC,
            "sgls": self._sgls,
            "subnqn": f"nqn.2014-08.org.nvmexpress:uuid:{settings.uuid}".encode(),
        }.items():
            record[name] = value
        return record.tobytes()

    def _controller_of_set(self, command: Command) -> bytes:
        """No limits of its own (NVM 1.0, figure 102)."""
        self._check_set(command)
        return b""

    def _command_sets(self, command: Command) -> bytes:
        """Combination 0: the NVM command set."""
        if command.cdw10 >> 16 not in (_ANY_CONTROLLER, CONTROLLER_ID):
            raise RefusedError.field(_CNTID)
        return (1 << _NVM).to_bytes(8, "little")

    @staticmethod
    def _check_set(command: Command) -> None:
        if command.cdw11 >> 24 != _NVM:
            raise RefusedError(Code.INVALID_COMMAND_SET, _CSI)

    # --- namespaces ----------------------------------------------------------------------------------------------

    def _find(self, command: Command) -> Namespace | None:
        """The namespace that is asked for; None where it is not active."""
        if not 1 <= command.nsid <= self._settings.most_namespaces:
            raise RefusedError(Code.INVALID_NAMESPACE, _NSID)
        return self._namespaces.get(command.nsid)

    def _namespace(self, command: Command) -> bytes:
        found = self._find(command)
        record = np.zeros(1, IDENTIFY_NAMESPACE)
        if found is None:
            return record.tobytes()
        for name, value in {
            "nsze": found.blocks,
            "ncap": found.blocks,
            "nuse": found.blocks,
            "nsfeat": 1 << 4,  # NPWG and its fellows are there
            "nlbaf": 1,
            "flbas": (512, 4096).index(found.block_size),
            "dlfeat": 1 << 3 | 1,  # deallocated blocks read as zeroes, Write Zeroes can deallocate
            "nvmcap": found.backing.size.to_bytes(16, "little"),
            "npwg": 4096 // found.block_size - 1,
            "npwa": 4096 // found.block_size - 1,
            "npdg": 4096 // found.block_size - 1,
            "npda": 4096 // found.block_size - 1,
            "nsattr": int(found.read_only),
        }.items():
            record[name] = value
        record["lbaf"][0]["lbads"][:2] = (9, 12)
        return record.tobytes()

    def _namespace_of_set(self, command: Command) -> bytes:
        """Nothing beyond what CNS 00h says (NVM 1.0, figure 100)."""
        self._check_set(command)
        self._find(command)
        return b""

    def _namespace_of_any_set(self, command: Command) -> bytes:
        found = self._find(command)
        record = np.zeros(1, NAMESPACE_OF_ANY_SET)
        if found is not None:
            record["nsattr"] = int(found.read_only)
            record["nstat"] = 1  # ready
        return record.tobytes()

    def _active(self, command: Command) -> bytes:
        if command.nsid >= 0xFFFF_FFFE:
            raise RefusedError(Code.INVALID_NAMESPACE, _NSID)
        found = sorted(nsid for nsid in self._namespaces if nsid > command.nsid)
        return np.array(found[: IDENTIFY_SIZE // 4], "<u4").tobytes()

    def _active_of_set(self, command: Command) -> bytes:
        self._check_set(command)
        return self._active(command)

    def _descriptors(self, command: Command) -> bytes:
        """UUID and command set identifier (Base 2.0, figure 277)."""
        found = self._find(command)
        if found is None or found.uuid is None:
            raise RefusedError(Code.INVALID_NAMESPACE, _NSID)
        return bytes((3, 16, 0, 0)) + found.uuid.bytes + bytes((4, 1, 0, 0, _NVM))

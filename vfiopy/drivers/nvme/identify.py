"""What Identify says of a controller and of a namespace, decoded to what a driver and its user ask for."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from vfiopy.nvme_spec.registers import version_text
from vfiopy.nvme_spec.structures import uint128

__all__ = ["ControllerInfo", "NamespaceInfo"]

_ONCS_DATASET_MANAGEMENT = 1 << 2
_ONCS_WRITE_ZEROES = 1 << 3


def _text(value: bytes) -> str:
    return value.rstrip(b"\0").decode("ascii", "replace").strip()


@dataclass(frozen=True, slots=True)
class ControllerInfo:
    """Identify Controller (Base 2.0, figure 275).

    Attributes:
        vendor, subsystem_vendor: PCI vendor IDs.
        serial, model, firmware: as text, without padding.
        controller_id: of the controller in its subsystem.
        version: of the specification that it follows, ``"1.4"``.
        transfer_pages: most pages of the smallest size (CAP.MPSMIN) that one command moves (2**MDTS); 0 for no limit.
        shutdown_seconds: how long a normal shutdown may take (RTD3E); 0 where it does not say.
        namespaces: the highest namespace identifier.
        capacity: bytes of all its media; 0 where it does not say.
        volatile_cache: it has a volatile write cache, so what was written needs a flush.
        write_zeroes, dataset_management: it has these commands.
        event_requests: asynchronous event requests that it keeps open (AERL + 1).
        error_entries: entries of the error log (ELPE + 1).
        subsystem_name: NVMe qualified name of the subsystem.
        raw: all of it, with the specification's names.
    """

    vendor: int
    subsystem_vendor: int
    serial: str
    model: str
    firmware: str
    controller_id: int
    version: str
    transfer_pages: int
    shutdown_seconds: float
    namespaces: int
    capacity: int
    volatile_cache: bool
    write_zeroes: bool
    dataset_management: bool
    event_requests: int
    error_entries: int
    subsystem_name: str
    raw: np.void = field(repr=False, compare=False)

    @classmethod
    def decode(cls, raw: np.void) -> ControllerInfo:
        """Decode a record of IDENTIFY_CONTROLLER."""
        mdts = int(raw["mdts"])
        return cls(
            vendor=int(raw["vid"]),
            subsystem_vendor=int(raw["ssvid"]),
            serial=_text(raw["sn"]),
            model=_text(raw["mn"]),
            firmware=_text(raw["fr"]),
            controller_id=int(raw["cntlid"]),
            version=version_text(int(raw["ver"])),
            transfer_pages=1 << mdts if mdts else 0,
            shutdown_seconds=int(raw["rtd3e"]) / 1e6,
            namespaces=int(raw["nn"]),
            capacity=uint128(raw["tnvmcap"].tobytes()),
            volatile_cache=bool(raw["vwc"] & 1),
            write_zeroes=bool(raw["oncs"] & _ONCS_WRITE_ZEROES),
            dataset_management=bool(raw["oncs"] & _ONCS_DATASET_MANAGEMENT),
            event_requests=int(raw["aerl"]) + 1,
            error_entries=int(raw["elpe"]) + 1,
            subsystem_name=_text(raw["subnqn"]),
            raw=raw,
        )


@dataclass(frozen=True, slots=True)
class NamespaceInfo:
    """Identify Namespace (NVM 1.0, 4.1.5.1).

    Attributes:
        nsid: namespace identifier.
        blocks: size in logical blocks.
        capacity: blocks that may be allocated at one time.
        used: blocks that are allocated.
        block_size: data bytes per logical block.
        metadata_size: metadata bytes per logical block.
        protection: end-to-end protection type, 0 for none.
        optimal_boundary: blocks that a transfer had better not cross (NOIOB), 0 where it does not say.
        eui64, nguid: global identifiers, empty where it has none.
        raw: all of it, with the specification's names.
    """

    nsid: int
    blocks: int
    capacity: int
    used: int
    block_size: int
    metadata_size: int
    protection: int
    optimal_boundary: int
    eui64: str
    nguid: str
    raw: np.void = field(repr=False, compare=False)

    @classmethod
    def decode(cls, nsid: int, raw: np.void) -> NamespaceInfo:
        """Decode a record of IDENTIFY_NAMESPACE. The format's index is bits 6:5 and 3:0 of FLBAS."""
        flbas = int(raw["flbas"])
        lba_format = raw["lbaf"][flbas & 0xF | (flbas >> 5 & 3) << 4]
        return cls(
            nsid=nsid,
            blocks=int(raw["nsze"]),
            capacity=int(raw["ncap"]),
            used=int(raw["nuse"]),
            block_size=1 << int(lba_format["lbads"]),
            metadata_size=int(lba_format["ms"]),
            protection=int(raw["dps"]) & 7,
            optimal_boundary=int(raw["noiob"]),
            eui64=_identifier(raw["eui64"].tobytes()),
            nguid=_identifier(raw["nguid"].tobytes()),
            raw=raw,
        )

    @property
    def size(self) -> int:
        """Size in bytes."""
        return self.blocks * self.block_size


def _identifier(value: bytes) -> str:
    return value.hex() if any(value) else ""

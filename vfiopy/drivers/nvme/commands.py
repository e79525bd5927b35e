"""Commands: what goes into a submission queue entry, apart from the memory that it speaks of.

Sources: NVM Express Base Specification 2.0, 5 (admin commands), 7 (I/O commands); NVM Command Set Specification 1.0,
3.2. Numbers of blocks and dwords are "0's based" in the entry; here they count from 1, as people do.
"""

from __future__ import annotations

from dataclasses import dataclass

from vfiopy.nvme_spec.opcodes import ALL_NAMESPACES, AdminOpcode, IoOpcode

__all__ = [
    "ALL_NAMESPACES",
    "Command",
    "abort",
    "async_event_request",
    "create_cq",
    "create_sq",
    "dataset_management",
    "delete_cq",
    "delete_sq",
    "flush",
    "get_features",
    "get_log_page",
    "identify",
    "read",
    "set_features",
    "write",
    "write_zeroes",
]

_FUA = 1 << 30
_DEALLOCATE_ATTRIBUTE = 1 << 2
_DEALLOCATE_ZEROES = 1 << 25


@dataclass(frozen=True, slots=True)
class Command:
    """A command without its identifier and data pointers, which the queue adds.

    Attributes:
        name: for messages.
        opcode: 8 bits.
        nsid: namespace, 0 where the command has none.
        cdw2, cdw3, cdw10 ... cdw15: command dwords.
        prp1: the data pointer of commands that name memory which outlives them (queues); else the queue fills it in.
    """

    name: str
    opcode: int
    nsid: int = 0
    cdw2: int = 0
    cdw3: int = 0
    cdw10: int = 0
    cdw11: int = 0
    cdw12: int = 0
    cdw13: int = 0
    cdw14: int = 0
    cdw15: int = 0
    prp1: int = 0


def identify(cns: int, nsid: int = 0) -> Command:
    """Identify (Base 2.0, 5.17); 4096 bytes to the host."""
    return Command(f"Identify {cns:02X}h", AdminOpcode.IDENTIFY, nsid, cdw10=cns)


def get_log_page(page: int, size: int, *, nsid: int = ALL_NAMESPACES, offset: int = 0, keep: bool = False) -> Command:
    """Get Log Page (Base 2.0, 5.16); ``size`` and ``offset`` in bytes, multiples of 4.

    Args:
        page: log page identifier.
        size: bytes to the host.
        nsid: namespace, or all.
        offset: first byte of the page.
        keep: do not take the page's asynchronous event as seen (RAE).
    """
    dwords = size // 4 - 1
    return Command(
        f"Get Log Page {page:02X}h",
        AdminOpcode.GET_LOG_PAGE,
        nsid,
        cdw10=(dwords & 0xFFFF) << 16 | keep << 15 | page,
        cdw11=dwords >> 16,
        cdw12=offset & 0xFFFFFFFF,
        cdw13=offset >> 32,
    )


def set_features(feature: int, value: int, *, nsid: int = 0, save: bool = False) -> Command:
    """Set Features (Base 2.0, 5.27); ``value`` is command dword 11."""
    return Command(
        f"Set Features {feature:02X}h", AdminOpcode.SET_FEATURES, nsid, cdw10=save << 31 | feature, cdw11=value
    )


def get_features(feature: int, *, nsid: int = 0, select: int = 0, value: int = 0) -> Command:
    """Get Features (Base 2.0, 5.15); ``select`` 0 current, 1 default, 2 saved, 3 what can be done with it."""
    return Command(
        f"Get Features {feature:02X}h", AdminOpcode.GET_FEATURES, nsid, cdw10=select << 8 | feature, cdw11=value
    )


def create_cq(queue: int, entries: int, iova: int, vector: int | None) -> Command:
    """Create I/O Completion Queue (Base 2.0, 5.4), contiguous; ``vector`` None for no interrupt."""
    interrupt = 0 if vector is None else vector << 16 | 2
    return Command(
        f"Create I/O Completion Queue {queue}",
        AdminOpcode.CREATE_CQ,
        cdw10=(entries - 1) << 16 | queue,
        cdw11=interrupt | 1,
        prp1=iova,
    )


def create_sq(queue: int, entries: int, iova: int, completion_queue: int) -> Command:
    """Create I/O Submission Queue (Base 2.0, 5.5), contiguous."""
    return Command(
        f"Create I/O Submission Queue {queue}",
        AdminOpcode.CREATE_SQ,
        cdw10=(entries - 1) << 16 | queue,
        cdw11=completion_queue << 16 | 1,
        prp1=iova,
    )


def delete_cq(queue: int) -> Command:
    """Delete I/O Completion Queue (Base 2.0, 5.6); its submission queues have to be gone."""
    return Command(f"Delete I/O Completion Queue {queue}", AdminOpcode.DELETE_CQ, cdw10=queue)


def delete_sq(queue: int) -> Command:
    """Delete I/O Submission Queue (Base 2.0, 5.7); commands under way are completed as aborted, or not at all."""
    return Command(f"Delete I/O Submission Queue {queue}", AdminOpcode.DELETE_SQ, cdw10=queue)


def abort(queue: int, cid: int) -> Command:
    """Abort (Base 2.0, 5.1): ask for the end of one command; bit 0 of the result is clear if it was aborted."""
    return Command(f"Abort {cid} of queue {queue}", AdminOpcode.ABORT, cdw10=cid << 16 | queue)


def async_event_request() -> Command:
    """Asynchronous Event Request (Base 2.0, 5.2): completes when something happens, which may be never."""
    return Command("Asynchronous Event Request", AdminOpcode.ASYNC_EVENT_REQUEST)


def _blocks(name: str, opcode: int, nsid: int, lba: int, count: int, flags: int) -> Command:
    return Command(
        f"{name} of {count} blocks at LBA {lba}",
        opcode,
        nsid,
        cdw10=lba & 0xFFFFFFFF,
        cdw11=lba >> 32,
        cdw12=flags | count - 1,
    )


def read(nsid: int, lba: int, count: int) -> Command:
    """Read (NVM 1.0, 3.2.4); 1 to 65536 blocks."""
    return _blocks("Read", IoOpcode.READ, nsid, lba, count, 0)


def write(nsid: int, lba: int, count: int, *, fua: bool = False) -> Command:
    """Write (NVM 1.0, 3.2.6); 1 to 65536 blocks; ``fua``: complete when it is on non-volatile media."""
    return _blocks("Write", IoOpcode.WRITE, nsid, lba, count, _FUA if fua else 0)


def write_zeroes(nsid: int, lba: int, count: int, *, deallocate: bool = False) -> Command:
    """Write Zeroes (NVM 1.0, 3.2.8); 1 to 65536 blocks; ``deallocate``: the blocks' space may be given up."""
    return _blocks("Write Zeroes", IoOpcode.WRITE_ZEROES, nsid, lba, count, _DEALLOCATE_ZEROES if deallocate else 0)


def flush(nsid: int) -> Command:
    """Flush (Base 2.0, 7.1): what was written goes to non-volatile media."""
    return Command("Flush", IoOpcode.FLUSH, nsid)


def dataset_management(nsid: int, ranges: int) -> Command:
    """Dataset Management with the deallocate attribute (NVM 1.0, 3.2.3); 1 to 256 ranges to the controller."""
    return Command(
        f"Deallocate {ranges} ranges",
        IoOpcode.DATASET_MANAGEMENT,
        nsid,
        cdw10=ranges - 1,
        cdw11=_DEALLOCATE_ATTRIBUTE,
    )

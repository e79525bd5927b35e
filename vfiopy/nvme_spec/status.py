"""What a controller answers: the status field of a completion, by name.

Source: NVM Express Base Specification 2.0, 3.3.3.2.1 and figures 92 to 99.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

__all__ = ["Code", "Status"]


class Code(IntEnum):
    """Status code type and status code as one number, ``type << 8 | code``: those that a controller of ours returns."""

    SUCCESS = 0x000
    INVALID_OPCODE = 0x001
    INVALID_FIELD = 0x002
    ID_CONFLICT = 0x003
    DATA_TRANSFER_ERROR = 0x004
    INTERNAL_ERROR = 0x006
    ABORT_REQUESTED = 0x007
    ABORTED_SQ_DELETION = 0x008
    INVALID_NAMESPACE = 0x00B
    COMMAND_SEQUENCE_ERROR = 0x00C
    INVALID_SGL_SEGMENT = 0x00D
    INVALID_SGL_COUNT = 0x00E
    SGL_LENGTH_INVALID = 0x00F
    SGL_TYPE_INVALID = 0x011
    INVALID_CMB_USE = 0x012
    PRP_OFFSET_INVALID = 0x013
    WRITE_PROTECTED = 0x020
    LBA_OUT_OF_RANGE = 0x080
    CAPACITY_EXCEEDED = 0x081
    CQ_INVALID = 0x100
    INVALID_QUEUE_ID = 0x101
    INVALID_QUEUE_SIZE = 0x102
    EVENT_LIMIT_EXCEEDED = 0x105
    INVALID_INTERRUPT_VECTOR = 0x108
    INVALID_LOG_PAGE = 0x109
    INVALID_QUEUE_DELETION = 0x10C
    FEATURE_NOT_SAVEABLE = 0x10D
    FEATURE_NOT_OF_NAMESPACE = 0x10F
    COMMAND_SET_REJECTED = 0x12B
    INVALID_COMMAND_SET = 0x12C
    WRITE_FAULT = 0x280
    UNRECOVERED_READ_ERROR = 0x281
    COMPARE_FAILURE = 0x285


_TYPES = {
    0: "generic",
    1: "command specific",
    2: "media and data integrity",
    3: "path related",
    7: "vendor specific",
}

_GENERIC = {
    0x00: "Successful Completion",
    0x01: "Invalid Command Opcode",
    0x02: "Invalid Field in Command",
    0x03: "Command ID Conflict",
    0x04: "Data Transfer Error",
    0x05: "Commands Aborted due to Power Loss Notification",
    0x06: "Internal Error",
    0x07: "Command Abort Requested",
    0x08: "Command Aborted due to SQ Deletion",
    0x09: "Command Aborted due to Failed Fused Command",
    0x0A: "Command Aborted due to Missing Fused Command",
    0x0B: "Invalid Namespace or Format",
    0x0C: "Command Sequence Error",
    0x0D: "Invalid SGL Segment Descriptor",
    0x0E: "Invalid Number of SGL Descriptors",
    0x0F: "Data SGL Length Invalid",
    0x10: "Metadata SGL Length Invalid",
    0x11: "SGL Descriptor Type Invalid",
    0x12: "Invalid Use of Controller Memory Buffer",
    0x13: "PRP Offset Invalid",
    0x14: "Atomic Write Unit Exceeded",
    0x15: "Operation Denied",
    0x16: "SGL Offset Invalid",
    0x18: "Host Identifier Inconsistent Format",
    0x19: "Keep Alive Timer Expired",
    0x1A: "Keep Alive Timeout Invalid",
    0x1B: "Command Aborted due to Preempt and Abort",
    0x1C: "Sanitize Failed",
    0x1D: "Sanitize In Progress",
    0x1E: "SGL Data Block Granularity Invalid",
    0x1F: "Command Not Supported for Queue in CMB",
    0x20: "Namespace is Write Protected",
    0x21: "Command Interrupted",
    0x22: "Transient Transport Error",
    0x23: "Command Prohibited by Command and Feature Lockdown",
    0x24: "Admin Command Media Not Ready",
    0x80: "LBA Out of Range",
    0x81: "Capacity Exceeded",
    0x82: "Namespace Not Ready",
    0x83: "Reservation Conflict",
    0x84: "Format In Progress",
    0x85: "Invalid Value Size",
    0x86: "Invalid Key Size",
    0x87: "KV Key Does Not Exist",
    0x88: "Unrecovered Error",
    0x89: "Key Exists",
}

_COMMAND_SPECIFIC = {
    0x00: "Completion Queue Invalid",
    0x01: "Invalid Queue Identifier",
    0x02: "Invalid Queue Size",
    0x03: "Abort Command Limit Exceeded",
    0x05: "Asynchronous Event Request Limit Exceeded",
    0x06: "Invalid Firmware Slot",
    0x07: "Invalid Firmware Image",
    0x08: "Invalid Interrupt Vector",
    0x09: "Invalid Log Page",
    0x0A: "Invalid Format",
    0x0B: "Firmware Activation Requires Conventional Reset",
    0x0C: "Invalid Queue Deletion",
    0x0D: "Feature Identifier Not Saveable",
    0x0E: "Feature Not Changeable",
    0x0F: "Feature Not Namespace Specific",
    0x10: "Firmware Activation Requires NVM Subsystem Reset",
    0x11: "Firmware Activation Requires Controller Level Reset",
    0x12: "Firmware Activation Requires Maximum Time Violation",
    0x13: "Firmware Activation Prohibited",
    0x14: "Overlapping Range",
    0x15: "Namespace Insufficient Capacity",
    0x16: "Namespace Identifier Unavailable",
    0x18: "Namespace Already Attached",
    0x19: "Namespace Is Private",
    0x1A: "Namespace Not Attached",
    0x1B: "Thin Provisioning Not Supported",
    0x1C: "Controller List Invalid",
    0x1D: "Device Self-test In Progress",
    0x1E: "Boot Partition Write Prohibited",
    0x1F: "Invalid Controller Identifier",
    0x20: "Invalid Secondary Controller State",
    0x21: "Invalid Number of Controller Resources",
    0x22: "Invalid Resource Identifier",
    0x23: "Sanitize Prohibited While Persistent Memory Region is Enabled",
    0x24: "ANA Group Identifier Invalid",
    0x25: "ANA Attach Failed",
    0x26: "Insufficient Capacity",
    0x27: "Namespace Attachment Limit Exceeded",
    0x28: "Prohibition of Command Execution Not Supported",
    0x29: "I/O Command Set Not Supported",
    0x2A: "I/O Command Set Not Enabled",
    0x2B: "I/O Command Set Combination Rejected",
    0x2C: "Invalid I/O Command Set",
    0x2D: "Identifier Unavailable",
    0x80: "Conflicting Attributes",
    0x81: "Invalid Protection Information",
    0x82: "Attempted Write to Read Only Range",
    0x83: "Command Size Limit Exceeded",
    0xB8: "Zoned Boundary Error",
    0xB9: "Zone Is Full",
    0xBA: "Zone Is Read Only",
    0xBB: "Zone Is Offline",
    0xBC: "Zone Invalid Write",
    0xBD: "Too Many Active Zones",
    0xBE: "Too Many Open Zones",
    0xBF: "Invalid Zone State Transition",
}

_MEDIA = {
    0x80: "Write Fault",
    0x81: "Unrecovered Read Error",
    0x82: "End-to-end Guard Check Error",
    0x83: "End-to-end Application Tag Check Error",
    0x84: "End-to-end Reference Tag Check Error",
    0x85: "Compare Failure",
    0x86: "Access Denied",
    0x87: "Deallocated or Unwritten Logical Block",
    0x88: "End-to-End Storage Tag Check Error",
}

_PATH = {
    0x00: "Internal Path Error",
    0x01: "Asymmetric Access Persistent Loss",
    0x02: "Asymmetric Access Inaccessible",
    0x03: "Asymmetric Access Transition",
    0x60: "Controller Pathing Error",
    0x70: "Host Pathing Error",
    0x71: "Command Aborted By Host",
}

_NAMES = {0: _GENERIC, 1: _COMMAND_SPECIFIC, 2: _MEDIA, 3: _PATH}

# What a user can do about it, where that is more than reading the name again.
_HINTS = {
    (0, 0x01): "the controller does not implement this command; identify() says which optional ones it has",
    (0, 0x02): "error_log() says which byte of the command the controller did not like",
    (0, 0x04): "the controller could not reach the memory: was the buffer freed while the command was under way?",
    (0, 0x0B): "active_namespaces() lists the namespaces that exist",
    (0, 0x13): "PRPs are multiples of 4 bytes; all but the first are multiples of the page size",
    (0, 0x80): "the namespace ends before; namespace.blocks says where",
    (1, 0x05): "the controller keeps fewer requests open: identify().aerl + 1",
    (1, 0x08): "the controller has fewer interrupt vectors",
}


@dataclass(frozen=True, slots=True)
class Status:
    """The status field of a completion, without the phase tag (Base 2.0, figure 92).

    Attributes:
        sct: status code type: 0 generic, 1 command specific, 2 media, 3 path, 7 vendor.
        sc: status code, 8 bits.
        crd: command retry delay index, 0 to 3.
        more: the error log has more to say.
        dnr: do not retry: the same command would fail again.
    """

    sct: int
    sc: int
    crd: int = 0
    more: bool = False
    dnr: bool = False

    @classmethod
    def decode(cls, field: int) -> Status:
        """Decode the upper 16 bits of a completion's last dword, of which bit 0 is the phase tag."""
        return cls(
            sct=field >> 9 & 7,
            sc=field >> 1 & 0xFF,
            crd=field >> 12 & 3,
            more=bool(field >> 14 & 1),
            dnr=bool(field >> 15 & 1),
        )

    @property
    def ok(self) -> bool:
        """Whether the command succeeded."""
        return self.sct == 0 and self.sc == 0

    @property
    def type_name(self) -> str:
        """The status code type in words."""
        return _TYPES.get(self.sct, f"reserved type {self.sct}")

    @property
    def name(self) -> str:
        """The specification's name of the status, or its number where it has none."""
        known = _NAMES.get(self.sct, {}).get(self.sc)
        if known is not None:
            return known
        kind = "vendor specific" if self.sct == 7 or self.sc >= 0xC0 else "unknown"
        return f"{kind} status {self.sc:02X}h"

    @property
    def hint(self) -> str:
        """What to do about it, or nothing."""
        return _HINTS.get((self.sct, self.sc), "")

    def __str__(self) -> str:
        """Name, both numbers, and whether to retry."""
        retry = ", do not retry" if self.dnr else ""
        return f"{self.name} ({self.type_name}, SCT {self.sct:X}h SC {self.sc:02X}h{retry})"

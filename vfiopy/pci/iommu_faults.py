"""What an IOMMU driver writes into the kernel log about a refused DMA: who, where, and why, in fields.

The kernel has no other way to tell that reaches user space in general: VFIO and iommufd report no DMA faults. The texts
are those of Linux 5.0 to 7.x: ``drivers/iommu/intel/dmar.c``, ``amd/iommu.c``, ``arm/arm-smmu/arm-smmu.c``,
``arm/arm-smmu-v3/arm-smmu-v3.c`` and ``virtio-iommu.c``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from vfiopy.errors import PciAddressError
from vfiopy.pci.address import PciAddress

__all__ = ["FaultDecoder", "IommuFault", "is_fault_line"]


@dataclass(frozen=True, slots=True)
class IommuFault:
    """One access of a device, or one interrupt message, that an IOMMU did not let through.

    Attributes:
        driver: ``"intel"``, ``"amd"``, ``"arm-smmu"``, ``"arm-smmu-v3"``, ``"virtio"``.
        source: the function, or None where the log gives only :attr:`stream`. Intel's and older AMD messages leave the
            PCI domain out: it is taken to be 0.
        stream: stream ID (Arm) or endpoint (virtio). Firmware tables say which function that is.
        address: IOVA of the access, or None where the fault has none.
        write: the device wanted to write; None where the log does not say.
        reason: in the driver's or the specification's words.
        code: the number behind the reason: VT-d fault reason, AMD event flags, SMMU FSR, SMMUv3 event.
        pasid: process address space ID, or None.
        interrupt: it was an interrupt message that remapping refused; ``address`` is None then.
    """

    driver: str
    source: PciAddress | None
    stream: int | None = None
    address: int | None = None
    write: bool | None = None
    reason: str = ""
    code: int | None = None
    pasid: int | None = None
    interrupt: bool = False

    def __str__(self) -> str:
        who = str(self.source) if self.source else "unknown" if self.stream is None else f"stream {self.stream:#x}"
        what = {True: "write", False: "read", None: "access"}[self.write]
        if self.interrupt:
            what = "interrupt"
        where = "" if self.address is None else f" at {self.address:#x}"
        pasid = "" if self.pasid is None else f", PASID {self.pasid:#x}"
        return f"{who}: {what}{where} refused{pasid}: {self.reason}"


class FaultDecoder:
    """Turns kernel log lines, in order, into faults.

    Arm's SMMUv3 takes up to seven lines for one fault; what is complete only when nothing more comes is given out by
    the next line, or by :meth:`flush`.
    """

    def __init__(self) -> None:
        self._pending: dict[str, _Smmu3Event] = {}

    def feed(self, text: str) -> list[IommuFault]:
        """Take the next line, without its time stamp; return what is complete."""
        match = _SMMU3.search(text)
        if match:
            return self._feed_smmu3(match["smmu"], match["text"])
        done = self.flush()
        fault = _decode_line(text)
        return done if fault is None else [*done, fault]

    def flush(self) -> list[IommuFault]:
        """Return what was waiting for more lines."""
        faults = [event.fault() for event in self._pending.values()]
        self._pending.clear()
        return faults

    def _feed_smmu3(self, smmu: str, text: str) -> list[IommuFault]:
        event = self._pending.get(smmu)
        begin = _SMMU3_BEGIN.match(text)
        if begin:
            self._pending[smmu] = _Smmu3Event(int(begin[1], 16))
            return [] if event is None else [event.fault()]
        if event is None:
            # since 6.15 the words may be all there is
            if not _SMMU3_CLIENT.match(text):
                return []
            event = self._pending[smmu] = _Smmu3Event(None)
        if event.take(text):
            del self._pending[smmu]
            return [event.fault()]
        return []


def is_fault_line(text: str) -> bool:
    """Whether the line tells a fault, or a part of one."""
    match = _SMMU3.search(text)
    if match is None:
        return _decode_line(text) is not None
    parts = (_SMMU3_BEGIN, _SMMU3_WORD, _SMMU3_CLIENT, _SMMU3_ACCESS)
    return any(part.match(match["text"]) for part in parts)


def _decode_line(text: str) -> IommuFault | None:
    for pattern, decode in _ONE_LINE:
        match = pattern.search(text)
        if match:
            return decode(match)
    return None


def _hex(text: str | None) -> int | None:
    return None if text is None else int(text, 16)


# --- Intel (VT-d) ---

_INTEL = re.compile(
    r"\[(?P<what>DMA Read|DMA Write|INTR-REMAP)(?: (?:NO_PASID|PASID (?P<pasid>0x[0-9a-f]+)))?\] "
    r"Request device \[(?:(?P<domain>[0-9a-f]{4,8}):)?"  # 7.3 has a domain
    r"(?:0x)?(?P<bus>[0-9a-f]{2}):(?:0x)?(?P<device>[0-9a-f]{2})\.(?P<function>[0-7])\] "
    r"(?:PASID (?P<old_pasid>[0-9a-f]+) )?fault (?:addr|index) (?P<address>(?:0x)?[0-9a-f]+) "
    r"\[fault reason (?P<code>(?:0x)?[0-9a-f]+)h?\] ?(?P<reason>.*)"
)
_NO_PASID = 0xFFFF_FFFF


def _intel(match: re.Match[str]) -> IommuFault:
    pasid = _hex(match["pasid"] or match["old_pasid"])
    code = match["code"]  # decimal before Linux 5.13
    interrupt = match["what"] == "INTR-REMAP"
    return IommuFault(
        "intel",
        PciAddress(
            int(match["domain"] or "0", 16), int(match["bus"], 16), int(match["device"], 16), int(match["function"])
        ),
        address=None if interrupt else int(match["address"], 16),
        write=None if interrupt else match["what"] == "DMA Write",
        reason=match["reason"].strip(),
        code=int(code, 16) if code.startswith("0x") else int(code),
        pasid=None if pasid == _NO_PASID else pasid,
        interrupt=interrupt,
    )


# --- AMD ---

_AMD = re.compile(
    r"(?:(?P<source>[0-9a-f]{4,8}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-7]): AMD-Vi: )?(?:Event logged \[|^)"
    r"(?P<name>IO_PAGE_FAULT|INVALID_DEVICE_REQUEST|ILLEGAL_DEV_TABLE_ENTRY|DEV_TAB_HARDWARE_ERROR|"
    r"PAGE_TAB_HARDWARE_ERROR|IOTLB_INV_TIMEOUT|RMP_PAGE_FAULT|RMP_HW_ERROR|INVALID_PPR_REQUEST) (?P<fields>[^\]]*)\]"
)
# AMD I/O Virtualization Technology (IOMMU) Specification, 2.5.3: bits of the event's flags, as the kernel shifts them
_AMD_INTERRUPT, _AMD_PRESENT, _AMD_WRITE, _AMD_DENIED, _AMD_RESERVED = 1 << 3, 1 << 4, 1 << 5, 1 << 6, 1 << 7
_AMD_REASONS = {
    "IO_PAGE_FAULT": "page not mapped",
    "INVALID_DEVICE_REQUEST": "a request that the device may not make",
    "ILLEGAL_DEV_TABLE_ENTRY": "illegal device table entry",
}


def _amd(match: re.Match[str]) -> IommuFault:
    fields = dict(part.split("=", 1) for part in match["fields"].split() if "=" in part)
    flags = _hex(fields.get("flags")) or 0
    reason = _AMD_REASONS.get(match["name"], match["name"])
    if match["name"] == "IO_PAGE_FAULT":
        if flags & _AMD_RESERVED:
            reason = "reserved bits set in the page table"
        elif flags & _AMD_DENIED:
            reason = "permission denied"
        elif flags & _AMD_PRESENT:
            reason = "access denied, though the page is present"
    interrupt = bool(flags & _AMD_INTERRUPT)
    # RW is defined with PR only, but hardware sets it for writes without PR too: clear, it says nothing then
    write = True if flags & _AMD_WRITE else False if flags & _AMD_PRESENT else None
    pasid = _hex(fields.get("pasid"))
    return IommuFault(
        "amd",
        _address(match["source"] or fields.get("device")),
        address=None if interrupt else _hex(fields.get("address")),
        write=None if interrupt else write,
        reason=reason,
        code=flags,
        pasid=pasid or None,
        interrupt=interrupt,
    )


def _address(text: str | None) -> PciAddress | None:
    try:
        return None if text is None else PciAddress.parse(text)
    except PciAddressError:
        return None


# --- Arm SMMU, version 1 and 2 ---

_SMMU2 = re.compile(
    r"Unhandled context fault: fsr=(?P<fsr>0x[0-9a-f]+), iova=(?P<iova>0x[0-9a-f]+), "
    r"fsynr=(?P<fsynr>0x[0-9a-f]+)(?:, cbfrsynra=(?P<sid>0x[0-9a-f]+))?"
)
# Arm SMMU architecture 2.0, SMMU_CBn_FSR and SMMU_CBn_FSYNR0
_FSR = {
    1: "translation fault",
    2: "access flag fault",
    3: "permission fault",
    4: "external fault",
    5: "TLB match conflict",
    6: "TLB lock fault",
}
_FSYNR_WRITE = 1 << 4
_SMMU2_UNKNOWN = re.compile(r"Blocked unknown Stream ID (?P<sid>0x[0-9a-f]+);")


def _smmu2(match: re.Match[str]) -> IommuFault:
    fsr = int(match["fsr"], 16)
    sid = _hex(match["sid"])
    return IommuFault(
        "arm-smmu",
        None,
        stream=None if sid is None else sid & 0xFFFF,
        address=int(match["iova"], 16),
        write=bool(int(match["fsynr"], 16) & _FSYNR_WRITE),
        reason=", ".join(word for bit, word in _FSR.items() if fsr >> bit & 1) or "context fault",
        code=fsr,
    )


def _smmu2_unknown(match: re.Match[str]) -> IommuFault:
    return IommuFault("arm-smmu", None, stream=int(match["sid"], 16), reason="no context for this stream ID")


# --- virtio ---

_VIRTIO = re.compile(
    r"virtio_iommu \S+ (?P<reason>.+) fault from EP (?P<endpoint>\d+)(?: PASID (?P<pasid>\d+))?"
    r"(?: at (?P<address>0x[0-9a-f]+|0) \[(?P<flags>[RWX]*)\])?"
)
_VIRTIO_REASONS = {"domain": "the endpoint is attached to no domain", "page": "page not mapped, or permission denied"}


def _virtio(match: re.Match[str]) -> IommuFault:
    flags = match["flags"] or ""
    pasid = match["pasid"]
    return IommuFault(
        "virtio",
        None,
        stream=int(match["endpoint"]),
        address=_hex(match["address"]),
        write=True if "W" in flags else False if flags else None,
        reason=_VIRTIO_REASONS.get(match["reason"], f"{match['reason']} fault"),
        pasid=None if pasid is None else int(pasid),
    )


_ONE_LINE = (
    (_INTEL, _intel),
    (_AMD, _amd),
    (_SMMU2, _smmu2),
    (_SMMU2_UNKNOWN, _smmu2_unknown),
    (_VIRTIO, _virtio),
)


# --- Arm SMMU, version 3 ---

_SMMU3 = re.compile(r"arm-smmu-v3 (?P<smmu>\S+): ?(?P<text>.*)")
_SMMU3_BEGIN = re.compile(r"event (0x[0-9a-f]+) received")
_SMMU3_WORD = re.compile(r"\s*(0x[0-9a-f]{16})\s*$")
_SMMU3_CLIENT = re.compile(
    r"event: (?P<name>\w+) client: (?P<client>.*?) sid: (?P<sid>\S+) ssid: (?P<ssid>\S+)(?: iova: (?P<iova>\S+))?"
)
_SMMU3_ACCESS = re.compile(r"\s*(?:un)?priv (?:inst|data) (?P<way>read|write) (?P<stage>s[12]) \"(?P<class>[^\"]*)\"")
# Arm SMMU architecture 3, 7.3
_SMMU3_NAMES = {
    0x01: "F_UUT",
    0x02: "C_BAD_STREAMID",
    0x03: "F_STE_FETCH",
    0x04: "C_BAD_STE",
    0x05: "F_BAD_ATS_TREQ",
    0x06: "F_STREAM_DISABLED",
    0x07: "F_TRANSL_FORBIDDEN",
    0x08: "C_BAD_SUBSTREAMID",
    0x09: "F_CD_FETCH",
    0x0A: "C_BAD_CD",
    0x0B: "F_WALK_EABT",
    0x10: "F_TRANSLATION",
    0x11: "F_ADDR_SIZE",
    0x12: "F_ACCESS",
    0x13: "F_PERMISSION",
    0x20: "F_TLB_CONFLICT",
    0x21: "F_CFG_CONFLICT",
    0x24: "E_PAGE_REQUEST",
}
_SMMU3_CODES = {name: code for code, name in _SMMU3_NAMES.items()}
_SMMU3_WORDS = {
    "F_TRANSLATION": "page not mapped",
    "F_ADDR_SIZE": "address out of range",
    "F_ACCESS": "access flag not set",
    "F_PERMISSION": "permission denied",
    "C_BAD_STREAMID": "unknown stream ID",
}
_WITH_ADDRESS = range(0x10, 0x14)
_SSV, _READ = 1 << 11, 1 << 35


class _Smmu3Event:
    """One event record: its four 64-bit words, then, since Linux 6.15, two lines in words."""

    def __init__(self, code: int | None) -> None:
        self._code = code
        self._words: list[int] = []
        self._fault = IommuFault("arm-smmu-v3", None, code=code)

    def take(self, text: str) -> bool:
        """Take the next line of the same SMMU; True when nothing more can come."""
        word = _SMMU3_WORD.match(text)
        if word and len(self._words) < 4:
            self._words.append(int(word[1], 16))
            return False
        client = _SMMU3_CLIENT.match(text)
        if client:
            self._fault = replace(
                self._fault,
                source=_address(client["client"]),
                stream=int(client["sid"], 16),
                address=_hex(client["iova"]),
                pasid=int(client["ssid"], 16) or None,
                reason=_smmu3_reason(client["name"]),
                code=_SMMU3_CODES.get(client["name"], self._code),
            )
            return False
        access = _SMMU3_ACCESS.match(text)
        if access:
            self._fault = replace(self._fault, write=access["way"] == "write")
        return True

    def fault(self) -> IommuFault:
        """What is known; the words of the record where the lines in words did not come."""
        if len(self._words) < 4 or self._code is None:
            name = _SMMU3_NAMES.get(self._code or 0, "event")
            return self._fault if self._fault.reason else replace(self._fault, reason=_smmu3_reason(name))
        first, second, address, _ = self._words
        fault = replace(self._fault, stream=first >> 32)
        if self._code in _WITH_ADDRESS:
            fault = replace(fault, address=address, write=not second & _READ)
        if first & _SSV:
            fault = replace(fault, pasid=first >> 12 & 0xFFFFF)
        if not fault.reason:
            fault = replace(fault, reason=_smmu3_reason(_SMMU3_NAMES.get(self._code, f"event {self._code:#x}")))
        return fault


def _smmu3_reason(name: str) -> str:
    words = _SMMU3_WORDS.get(name)
    return f"{words} ({name})" if words else name

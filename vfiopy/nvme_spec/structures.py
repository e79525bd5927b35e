"""What lies in memory between host and controller, as numpy structured types. Everything is little-endian.

Sources: NVM Express Base Specification 2.0 (the figure or section is named at each type) and NVM Command Set
Specification 1.0. Fields that nobody needs yet are left out; offsets are explicit, so nothing moves for it.
"""

from __future__ import annotations

from typing import Any

import numpy as np

__all__ = [
    "CQE",
    "ERROR_LOG_ENTRY",
    "IDENTIFY_CONTROLLER",
    "IDENTIFY_NAMESPACE",
    "IDENTIFY_SIZE",
    "LBA_FORMAT",
    "NAMESPACE_OF_ANY_SET",
    "POWER_STATE",
    "RANGE",
    "SMART_LOG",
    "SQE",
    "uint128",
]

IDENTIFY_SIZE = 4096


def _layout(size: int, **fields: tuple[Any, int]) -> np.dtype[np.void]:
    """Return a structured type from ``name=(type, offset)``."""
    return np.dtype(
        {
            "names": list(fields),
            "formats": [kind for kind, _ in fields.values()],
            "offsets": [offset for _, offset in fields.values()],
            "itemsize": size,
        }
    )


def uint128(value: bytes | np.bytes_ | np.ndarray[Any, Any]) -> int:
    """Read one of the 16-byte counters of a log page."""
    return int.from_bytes(bytes(value), "little")


SQE = _layout(
    64,
    opcode=("u1", 0),
    flags=("u1", 1),
    cid=("<u2", 2),
    nsid=("<u4", 4),
    cdw2=("<u4", 8),
    cdw3=("<u4", 12),
    mptr=("<u8", 16),
    prp1=("<u8", 24),
    prp2=("<u8", 32),
    cdw10=("<u4", 40),
    cdw11=("<u4", 44),
    cdw12=("<u4", 48),
    cdw13=("<u4", 52),
    cdw14=("<u4", 56),
    cdw15=("<u4", 60),
)
"""Submission queue entry (Base 2.0, 3.3.3.1)."""

CQE = _layout(
    16,
    dw0=("<u4", 0),
    dw1=("<u4", 4),
    sqhd=("<u2", 8),
    sqid=("<u2", 10),
    cid=("<u2", 12),
    status=("<u2", 14),
)
"""Completion queue entry (Base 2.0, 3.3.3.2 and figure 91). Bit 0 of ``status`` is the phase tag."""

POWER_STATE = _layout(
    32,
    mp=("<u2", 0),
    flags=("u1", 3),
    enlat=("<u4", 4),
    exlat=("<u4", 8),
    rrt=("u1", 12),
    rrl=("u1", 13),
    rwt=("u1", 14),
    rwl=("u1", 15),
    idlp=("<u2", 16),
    ips=("u1", 18),
    actp=("<u2", 20),
    aps=("u1", 22),
)
"""Power state descriptor (Base 2.0, figure 276)."""

IDENTIFY_CONTROLLER = _layout(
    IDENTIFY_SIZE,
    vid=("<u2", 0),
    ssvid=("<u2", 2),
    sn=("S20", 4),
    mn=("S40", 24),
    fr=("S8", 64),
    rab=("u1", 72),
    ieee=("3u1", 73),
    cmic=("u1", 76),
    mdts=("u1", 77),
    cntlid=("<u2", 78),
    ver=("<u4", 80),
    rtd3r=("<u4", 84),
    rtd3e=("<u4", 88),
    oaes=("<u4", 92),
    ctratt=("<u4", 96),
    rrls=("<u2", 100),
    cntrltype=("u1", 111),
    fguid=("V16", 112),
    oacs=("<u2", 256),
    acl=("u1", 258),
    aerl=("u1", 259),
    frmw=("u1", 260),
    lpa=("u1", 261),
    elpe=("u1", 262),
    npss=("u1", 263),
    avscc=("u1", 264),
    apsta=("u1", 265),
    wctemp=("<u2", 266),
    cctemp=("<u2", 268),
    mtfa=("<u2", 270),
    hmpre=("<u4", 272),
    hmmin=("<u4", 276),
    tnvmcap=("V16", 280),
    unvmcap=("V16", 296),
    rpmbs=("<u4", 312),
    edstt=("<u2", 316),
    kas=("<u2", 320),
    mntmt=("<u2", 324),
    mxtmt=("<u2", 326),
    sanicap=("<u4", 328),
    nsetidmax=("<u2", 338),
    endgidmax=("<u2", 340),
    anatt=("u1", 342),
    anacap=("u1", 343),
    sqes=("u1", 512),
    cqes=("u1", 513),
    maxcmd=("<u2", 514),
    nn=("<u4", 516),
    oncs=("<u2", 520),
    fuses=("<u2", 522),
    fna=("u1", 524),
    vwc=("u1", 525),
    awun=("<u2", 526),
    awupf=("<u2", 528),
    nwpc=("u1", 531),
    acwu=("<u2", 532),
    sgls=("<u4", 536),
    mnan=("<u4", 540),
    subnqn=("S256", 768),
    psd=((POWER_STATE, 32), 2048),
)
"""Identify Controller, CNS 01h (Base 2.0, figure 275)."""

LBA_FORMAT = _layout(4, ms=("<u2", 0), lbads=("u1", 2), rp=("u1", 3))
"""LBA format: metadata bytes, log2 of the data bytes, relative performance (NVM 1.0, 4.1.5.1)."""

IDENTIFY_NAMESPACE = _layout(
    IDENTIFY_SIZE,
    nsze=("<u8", 0),
    ncap=("<u8", 8),
    nuse=("<u8", 16),
    nsfeat=("u1", 24),
    nlbaf=("u1", 25),
    flbas=("u1", 26),
    mc=("u1", 27),
    dpc=("u1", 28),
    dps=("u1", 29),
    nmic=("u1", 30),
    rescap=("u1", 31),
    fpi=("u1", 32),
    dlfeat=("u1", 33),
    nawun=("<u2", 34),
    nawupf=("<u2", 36),
    nacwu=("<u2", 38),
    nabsn=("<u2", 40),
    nabo=("<u2", 42),
    nabspf=("<u2", 44),
    noiob=("<u2", 46),
    nvmcap=("V16", 48),
    npwg=("<u2", 64),
    npwa=("<u2", 66),
    npdg=("<u2", 68),
    npda=("<u2", 70),
    nows=("<u2", 72),
    mssrl=("<u2", 74),
    mcl=("<u4", 76),
    msrc=("u1", 80),
    anagrpid=("<u4", 92),
    nsattr=("u1", 99),
    nvmsetid=("<u2", 100),
    endgid=("<u2", 102),
    nguid=("V16", 104),
    eui64=("V8", 120),
    lbaf=((LBA_FORMAT, 64), 128),
)
"""Identify Namespace of the NVM command set, CNS 00h (NVM 1.0, 4.1.5.1)."""

NAMESPACE_OF_ANY_SET = _layout(
    IDENTIFY_SIZE,
    nsfeat=("u1", 0),
    nmic=("u1", 1),
    rescap=("u1", 2),
    fpi=("u1", 3),
    anagrpid=("<u4", 4),
    nsattr=("u1", 8),
    nvmsetid=("<u2", 10),
    endgid=("<u2", 12),
    nstat=("u1", 14),
)
"""I/O Command Set Independent Identify Namespace, CNS 08h (Base 2.0, figure 280)."""

SMART_LOG = _layout(
    512,
    critical_warning=("u1", 0),
    composite_temperature=("<u2", 1),
    available_spare=("u1", 3),
    available_spare_threshold=("u1", 4),
    percentage_used=("u1", 5),
    endurance_group_warning=("u1", 6),
    data_units_read=("V16", 32),
    data_units_written=("V16", 48),
    host_read_commands=("V16", 64),
    host_write_commands=("V16", 80),
    controller_busy_time=("V16", 96),
    power_cycles=("V16", 112),
    power_on_hours=("V16", 128),
    unsafe_shutdowns=("V16", 144),
    media_errors=("V16", 160),
    error_log_entries=("V16", 176),
    warning_temperature_time=("<u4", 192),
    critical_temperature_time=("<u4", 196),
    temperature_sensors=(("<u2", 8), 200),
)
"""SMART / Health Information, log page 02h (Base 2.0, 5.16.1.3). Temperatures are in kelvin; 0 means not reported."""

ERROR_LOG_ENTRY = _layout(
    64,
    error_count=("<u8", 0),
    sqid=("<u2", 8),
    cid=("<u2", 10),
    status=("<u2", 12),
    parameter_location=("<u2", 14),
    lba=("<u8", 16),
    nsid=("<u4", 24),
    vendor_page=("u1", 28),
    transport=("u1", 29),
    command_information=("<u8", 32),
    transport_information=("<u2", 40),
)
"""Error Information, log page 01h, one entry (Base 2.0, 5.16.1.2). ``error_count`` 0: the entry is not valid."""

RANGE = _layout(16, attributes=("<u4", 0), blocks=("<u4", 4), slba=("<u8", 8))
"""Range of a Dataset Management command (NVM 1.0, 3.2.3)."""

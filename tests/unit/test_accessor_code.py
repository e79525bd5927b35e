"""The accessors as machine code, read from the fault table: one plain load or store each, also where nothing can trap.

The processor-level proof is test_region_width.py; this one covers arm64 by cross-compiling.
"""

from __future__ import annotations

import re
import shutil
import struct
import subprocess
from collections import Counter
from pathlib import Path

import pytest
from mmio_audit.decode import decode_width

NATIVE = Path(__file__).parents[2] / "native"
TOOLCHAINS = {"x86_64": "x86_64-linux-gnu-", "aarch64": "aarch64-linux-gnu-"}

# Nothing but the accessors, so that the count is known.
SOURCE = """
#include "region/access.h"
#define ONE(bits) \\
    uint##bits##_t get##bits(void *p, int *f) { return vfiopy_read##bits(p, f); } \\
    uint##bits##_t get_relaxed##bits(void *p, int *f) { return vfiopy_load##bits(p, f); } \\
    void put##bits(void *p, uint##bits##_t v, int *f) { vfiopy_write##bits(p, v, f); } \\
    void put_relaxed##bits(void *p, uint##bits##_t v, int *f) { vfiopy_store##bits(p, v, f); }
ONE(8) ONE(16) ONE(32) ONE(64)
"""


def section(tools: str, library: Path, name: str) -> tuple[int, bytes]:
    """Return address and content of a section."""
    shown = subprocess.run(
        [f"{tools}readelf", "--section-headers", "--wide", library], capture_output=True, text=True, check=True
    ).stdout
    match = re.search(rf" {re.escape(name)} +PROGBITS +([0-9a-f]+) +([0-9a-f]+) +([0-9a-f]+)", shown)
    assert match, shown
    address, offset, size = (int(part, 16) for part in match.groups())
    return address, library.read_bytes()[offset : offset + size]


def decode_arm64(code: bytes) -> tuple[str, int]:
    """Decode LDR/STR (immediate, unsigned offset) of a general register: Arm ARM, section C4.1, loads and stores."""
    (word,) = struct.unpack("<I", code[:4])
    assert word >> 24 & 0x3F == 0b111001, f"not a load or store with an unsigned offset: {word:#010x}"
    assert word >> 10 & 0xFFF == 0, f"the address is not a bare register: {word:#010x}"
    operation = word >> 22 & 3
    assert operation in (0, 1), f"sign-extending or prefetch: {word:#010x}"
    return "R" if operation else "W", 1 << (word >> 30)


def decode_x86(code: bytes) -> tuple[str, int]:
    """Decode with the auditor's decoder, which wants to know the direction."""
    try:
        return "R", decode_width(code, is_write=False)
    except ValueError:
        return "W", decode_width(code, is_write=True)


@pytest.mark.parametrize("optimization", ["-O0", "-O2", "-O3", "-Os"])
@pytest.mark.parametrize("machine", TOOLCHAINS)
def test_each_entry_of_the_fault_table_is_one_plain_access(machine: str, optimization: str, tmp_path: Path) -> None:
    tools = TOOLCHAINS[machine]
    if shutil.which(f"{tools}gcc") is None:
        pytest.skip(f"no {tools}gcc here")
    source, library = tmp_path / "accessors.c", tmp_path / "accessors.so"
    source.write_text(SOURCE)
    flags = ["-std=gnu11", "-Wall", "-Wextra", "-Werror", optimization, "-fPIC", "-shared", "-nostdlib"]
    subprocess.run([f"{tools}gcc", *flags, f"-I{NATIVE}", "-o", library, source], check=True)

    text_address, text = section(tools, library, ".text")
    table_address, table = section(tools, library, "vfiopy_faults")
    found: Counter[tuple[str, int]] = Counter()
    starts, resumes = set(), set()
    for at in range(0, len(table), 8):
        to_access, to_fixup = struct.unpack_from("<ii", table, at)
        start = table_address + at + to_access - text_address
        assert 0 <= start < len(text)
        starts.add(start)
        resumes.add(table_address + at + 4 + to_fixup)
        found[(decode_arm64 if machine == "aarch64" else decode_x86)(text[start : start + 15].ljust(15, b"\x90"))] += 1
    assert set(found) == {(direction, width) for direction in "RW" for width in (1, 2, 4, 8)}
    # One where the compiler made a function of each accessor, two where it inlined them into their two callers.
    assert set(found.values()) in ({1}, {2})
    assert len(starts) == len(resumes) == sum(found.values())

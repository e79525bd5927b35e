"""Second reader: what ctypesgen makes of the headers, held against what the compiler stated.

ctypesgen writes a Python module; another interpreter runs it and reports values, sizes and offsets as ctypes
computes them. Each disagreement with the compiler needs a reason of :data:`.choices.REASONS`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .choices import CTYPESGEN_VERSION, REMEDIES
from .judge import left_out
from .model import Constant, Facts, LeafFacts, StructFacts, UapiError

__all__ = ["Disagreement", "disagreements", "read_with_ctypesgen"]

_GENERATE = "import sys; from ctypesgen.main import main; sys.exit(main())"

_REPORT = """
import ctypes, json, runpy, sys

def leaves(kind, above, base):
    anonymous = getattr(kind, "_anonymous_", ())
    for name, inner, *bits in kind._fields_:
        field = getattr(kind, name)
        path = above if name in anonymous else above + [name]
        if issubclass(inner, (ctypes.Structure, ctypes.Union)):
            yield from leaves(inner, path, base + field.offset)
            continue
        array = issubclass(inner, ctypes.Array)
        single = inner._type_ if array else inner
        code = "P" if issubclass(single, ctypes._Pointer) else single._type_
        yield {
            "path": path, "offset": base + field.offset, "size": ctypes.sizeof(inner),
            "pointer": code in ("P", "z"), "signed": code in "bhilqc", "bits": bool(bits),
            "count": inner._length_ if array else None,
        }

module = runpy.run_path(sys.argv[1])
structs, values = {}, {}
for name, value in module.items():
    if isinstance(value, type) and issubclass(value, ctypes.Structure) and name.startswith("struct_"):
        if hasattr(value, "_fields_"):
            size = ctypes.sizeof(value)
            structs[name[7:]] = {"size": size, "leaves": list(leaves(value, [], 0))}
    elif isinstance(value, (int, str)) and not name.startswith("_"):
        values[name] = value
json.dump({"structs": structs, "values": values}, sys.stdout)
"""


@dataclass(frozen=True)
class Disagreement:
    """One point where ctypesgen does not say what the compiler says, and the reason if one is known."""

    subject: str
    aspect: str
    compiler: object
    ctypesgen: object
    reason: str | None

    def __str__(self) -> str:
        """Say who says what."""
        return f"{self.subject}: {self.aspect} is {self.compiler}, ctypesgen says {self.ctypesgen}"


def read_with_ctypesgen(cc: str, include: Path, headers: list[str]) -> dict[str, Any]:
    """Run ctypesgen on the headers and return its structures and values.

    Raises :class:`UapiError` if ctypesgen is missing, of another version than the reasons were written for,
    or reports an error of its own.
    """
    found = subprocess.run(
        [sys.executable, "-c", "import ctypesgen; print(ctypesgen.VERSION)"],
        capture_output=True,
        text=True,
        check=False,
    )
    if found.stdout.strip() != CTYPESGEN_VERSION:
        raise UapiError(
            f"the second reader needs ctypesgen {CTYPESGEN_VERSION}, found {found.stdout.strip() or 'none'}; "
            f"remedy: {sys.executable} -m pip install ctypesgen=={CTYPESGEN_VERSION}"
        )
    with tempfile.TemporaryDirectory(prefix="vfiopy-uapi-") as folder:
        module = Path(folder, "headers.py")
        command = [sys.executable, "-c", _GENERATE, f"--cpp={cc} -E", f"-I{include}", "-o", str(module)]
        command += [f"-D{remedy}" for remedy in REMEDIES]
        command += [str(include / "linux" / header) for header in headers]
        # The C locale keeps the preprocessor's markers as ctypesgen expects them.
        run = subprocess.run(
            command, capture_output=True, text=True, check=False, env={**os.environ, "LC_ALL": "C"}
        )
        errors = [line for line in run.stderr.splitlines() if line.startswith("ERROR")]
        if run.returncode or errors or not module.exists():
            raise UapiError("ctypesgen cannot read the headers:\n" + "\n".join(errors or [run.stderr]))
        report = subprocess.run(
            [sys.executable, "-c", _REPORT, str(module)], capture_output=True, text=True, check=False
        )
        if report.returncode:
            raise UapiError(f"ctypesgen's module cannot be run:\n{report.stderr}")
    answer: dict[str, Any] = json.loads(report.stdout)
    return answer


def disagreements(facts: Facts, second: dict[str, Any]) -> list[Disagreement]:
    """Return every disagreement, with its reason where the table has one."""
    found: list[Disagreement] = []
    values, structs = dict(second["values"]), dict(second["structs"])
    for constant in facts.all_constants():
        found += _constant(constant, values.pop(constant.name, None))
    for struct in facts.all_structs():
        found += _struct(struct, structs.pop(struct.name, None))
    for name in [*values, *structs]:
        if name.startswith(_PREFIXES) and not left_out(name):
            found.append(Disagreement(name, "declaration", "unknown", "known", None))
    return found


_PREFIXES = ("VFIO", "vfio", "IOMMU", "iommu", "DMA_", "dma_", "UDMABUF", "udmabuf", "SYNC_", "sync_")


def _constant(constant: Constant, said: object) -> Iterator[Disagreement]:
    if isinstance(said, int) and said & ((1 << 64) - 1) == constant.value:
        return
    if isinstance(said, int) and said < 0 and said & 0xFFFFFFFF == constant.value:
        return  # restated unsigned on purpose: choices.UNSIGNED
    reason = None
    if said is None and constant.ioctl:
        reason = "ioctl"
    elif said is None and constant.name.endswith("_FD_FLAGS"):
        reason = "fcntl"
    elif said == chr(constant.value & 0xFF) and constant.value < 0x80:
        reason = "character"
    yield Disagreement(constant.name, "value", constant.value, said, reason)


def _struct(struct: StructFacts, said: dict[str, Any] | None) -> Iterator[Disagreement]:
    if said is None:
        yield Disagreement(struct.name, "declaration", "known", "unknown", None)
        return
    if said["size"] != struct.size:
        last = struct.leaves[-1]
        as_pointer = last.count == 0 and said["size"] == _pointer_at(last.offset) + 8
        reason = "flexible" if as_pointer else None
        yield Disagreement(struct.name, "size", struct.size, said["size"], reason)
    paths = [list(leaf.path) for leaf in struct.leaves]
    theirs = [leaf["path"] for leaf in said["leaves"]]
    if paths != theirs:
        yield Disagreement(struct.name, "members", paths, theirs, None)
        return
    for leaf, other in zip(struct.leaves, said["leaves"], strict=True):
        yield from _leaf(struct.name, leaf, other)


def _pointer_at(offset: int) -> int:
    """Return where a pointer goes that takes the place of a flexible array at ``offset``."""
    return (offset + 7) & ~7


def _leaf(name: str, leaf: LeafFacts, other: dict[str, Any]) -> Iterator[Disagreement]:
    subject = f"{name}.{'.'.join(leaf.path)}"
    pairs: list[tuple[str, object]] = [
        ("offset", leaf.offset),
        ("size", leaf.size),
        ("count", leaf.count),
        ("pointer", leaf.pointer),
        ("bits", False),
    ]
    if not leaf.pointer and not other["pointer"] and leaf.ctype != "char":
        pairs.append(("signed", leaf.signed))
    for aspect, value in pairs:
        if other[aspect] != value:
            as_pointer = leaf.count == 0 and other["pointer"] and other["offset"] == _pointer_at(leaf.offset)
            reason = "flexible" if as_pointer else None
            yield Disagreement(subject, aspect, value, other[aspect], reason)

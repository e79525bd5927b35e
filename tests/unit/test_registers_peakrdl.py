"""Packages that PeakRDL-python generates, unchanged, over a region: single, wide, block, memory, asyncio."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from array import array
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from register_support import recorded

from vfiopy import AccessError, registers

PythonExporter = pytest.importorskip("peakrdl_python", reason="a peer of ours (extra 'dev')").PythonExporter
RDLCompiler = pytest.importorskip("systemrdl").RDLCompiler

TREE = Path(__file__).parents[2]
RDL = """
addrmap gadget {
  default regwidth = 32; default accesswidth = 32;
  reg { field { sw = rw; hw = r; } value[31:0] = 0; } plain @ 0x0;
  reg { regwidth = 64; field { sw = rw; hw = r; } value[63:0] = 0; } wide @ 0x8;
  reg { field { sw = rw; hw = r; } value[31:0] = 0; } row[4] @ 0x20;
  external mem { mementries = 8; memwidth = 32; sw = rw; } table @ 0x40;
};
"""


@pytest.fixture(params=["plain", "async"])
def package(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Any, Any, bool]]:
    asynchronous = request.param == "async"
    (tmp_path / "gadget.rdl").write_text(RDL)
    compiler = RDLCompiler()
    compiler.compile_file(str(tmp_path / "gadget.rdl"))
    PythonExporter().export(
        compiler.elaborate().top, str(tmp_path), asyncoutput=asynchronous, skip_test_case_generation=True
    )
    sys.path.insert(0, str(tmp_path))
    try:
        yield import_module("gadget.reg_model").RegModel, import_module("gadget.lib"), asynchronous
    finally:
        sys.path.remove(str(tmp_path))
        for name in [name for name in sys.modules if name.partition(".")[0] == "gadget"]:
            del sys.modules[name]


def test_a_generated_package(package: tuple[Any, Any, bool]) -> None:
    model, lib, asynchronous = package
    region, recorder = recorded(0x100)
    if asynchronous:
        regs = model(callbacks=registers.peakrdl_async_callbacks(region, lib.AsyncCallbackSet, offset=0x10))
    else:
        regs = model(callbacks=registers.peakrdl_callbacks(region, lib.NormalCallbackSet, offset=0x10))

    def call(answer: Any) -> Any:
        return asyncio.run(answer) if asynchronous else answer

    call(regs.plain.write(0x1234_5678))
    assert call(regs.plain.read()) == 0x1234_5678
    assert recorder.taken() == [("w", 0x10, 4, 0x1234_5678), ("r", 0x10, 4, 0x1234_5678)]
    call(regs.wide.write(0x1122_3344_5566_7788))
    assert call(regs.wide.read()) == 0x1122_3344_5566_7788
    assert [entry[:3] for entry in recorder.taken()] == [("w", 0x18, 4), ("w", 0x1C, 4), ("r", 0x18, 4), ("r", 0x1C, 4)]
    call(regs.table.write(start_entry=2, data=[1, 2, 3]))
    assert call(regs.table.read(start_entry=2, number_entries=3)) == [1, 2, 3]
    assert recorder.taken() == [
        *(("w", 0x58 + 4 * i, 4, i + 1) for i in range(3)),
        *(("r", 0x58 + 4 * i, 4, i + 1) for i in range(3)),
    ]
    if not asynchronous:
        with regs.row.single_read_modify_write() as row:
            for index in range(4):
                row[index].write(index + 10)
        accesses = recorder.taken()
        assert [entry for entry in accesses if entry[0] == "w"] == [("w", 0x30 + 4 * i, 4, i + 10) for i in range(4)]


def test_the_four_callbacks_by_their_contract() -> None:
    region, recorder = recorded(0x100)
    callbacks = registers.PeakRdlCallbacks(region, 0x10)
    callbacks.write(0x8, 64, 16, 0x4444_3333_2222_1111)
    assert recorder.taken() == [("w", 0x18 + 2 * i, 2, 0x1111 * (i + 1)) for i in range(4)]
    assert callbacks.read(addr=0x8, width=64, accesswidth=16) == 0x4444_3333_2222_1111
    assert callbacks.read_block(addr=0x8, width=16, accesswidth=16, length=2) == [0x1111, 0x2222]
    legacy = registers.PeakRdlCallbacks(region, 0x10, arrays=True)
    assert legacy.read_block(0x8, 32, 32, 2) == array("I", [0x2222_1111, 0x4444_3333])
    legacy.write_block(0x8, 32, 32, array("I", [1, 2]))
    recorder.taken()
    for wrong in (
        lambda: callbacks.read(0, 12, 12),
        lambda: callbacks.write(0, 8, 8, 256),
        lambda: callbacks.read(1, 32, 32),
    ):
        with pytest.raises(AccessError):
            wrong()
    assert recorder.taken() == []


def test_the_example() -> None:
    command = [sys.executable, "examples/registers.py", "emulated:edu"]
    answer = subprocess.run(command, cwd=TREE, env={"PYTHONPATH": "."}, capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.endswith("10! = 3628800 by names, 12! = 479001600 by the generated package\n")

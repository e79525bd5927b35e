"""``vfiopy read``, ``write``, ``dump``: the accesses that were asked for, values in words, and refusals."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import vfiopy
from vfiopy.cli.app import app
from vfiopy.cli.complete import _REGIONS
from vfiopy.cli.place import REGIONS, opened
from vfiopy.emulated import Bar, Identity, PciDevice, PowerManagement
from vfiopy.errors import DeviceGoneError
from vfiopy.registers import config_registers

pytest.importorskip("systemrdl", reason="maps are read by systemrdl-compiler (extra 'rdl')")
runner = CliRunner()
EDU = "emulated:edu"
TREE = Path(__file__).parents[2]
RDL = str(TREE / "examples/edu.rdl")


class Board(PciDevice):
    """Remembers what is done to it; register 0x40 counts its reads."""

    name = "board"
    identity = Identity(vendor=0x1234, device=0x0001, class_code=0xFF0000)
    bars = {0: Bar(0x1000)}  # noqa: RUF012
    capabilities = (PowerManagement(),)

    def __init__(self) -> None:
        super().__init__()
        self.log: list[tuple[Any, ...]] = []

    def reset(self) -> None:
        self.values: dict[int, int] = {}

    def read(self, bar: int, offset: int, width: int) -> int:
        self.log.append(("r", offset, width))
        return self.values.get(offset, 0)

    def write(self, bar: int, offset: int, width: int, value: int) -> None:
        self.log.append(("w", offset, width, value))
        self.values[offset] = value

    def taken(self) -> list[tuple[Any, ...]]:
        log, self.log = self.log, []
        return log


@pytest.fixture
def board(tmp_path: Path) -> Iterator[tuple[str, Board]]:
    """A device that stays what it is from one command to the next, because a server holds it."""
    device = Board()
    with vfiopy.serve(device, tmp_path / "board.sock") as server:
        server.start()
        yield f"vfio-user:{tmp_path / 'board.sock'}", device


@pytest.fixture
def rdl(tmp_path: Path) -> str:
    path = tmp_path / "board.rdl"
    path.write_text(
        """addrmap board { default regwidth = 32;
        reg { field { sw = rw; } level_a[7:0]; field { sw = rw; } level_b[15:8]; } levels @ 0x10;
        reg { field { sw = r; hw = w; onread = rclr; } count[31:0]; } events @ 0x40;
        reg { field { sw = rw; } low[31:0]; } after @ 0x44;
        reg { regwidth = 64; accesswidth = 32; field { sw = rw; } v[63:0]; } wide @ 0x48; };"""
    )
    return str(path)


def ran(*words: str, status: int = 0) -> str:
    answer = runner.invoke(app, list(words))
    assert answer.exit_code == status, answer.output
    return answer.output


def test_one_read_is_one_access_of_its_width(board: tuple[str, Board]) -> None:
    target, device = board
    assert ran("read", target, "bar0", "0x20") == "0x00000000\n"
    assert device.taken() == [("r", 0x20, 4)]
    for width in (1, 2, 8):
        ran("read", target, "bar0", "0x20", "--width", str(width))
        assert device.taken() == [("r", 0x20, width)]
    ran("read", target, "bar0", "0x20", "--count", "3", "--width", "2", "--repeat", "2")
    assert device.taken() == [("r", 0x20 + 2 * i, 2) for i in range(3)] * 2


def test_a_write_reads_nothing_unless_asked(board: tuple[str, Board]) -> None:
    target, device = board
    assert ran("write", target, "bar0", "0x20", "0xABCD") == "0x20: 0x0000abcd\n"
    assert device.taken() == [("w", 0x20, 4, 0xABCD)]
    assert ran("write", target, "bar0", "0x20", "7", "--width", "2", "--read-back") == "0x20: 0x0007 reads 0x0007\n"
    assert device.taken() == [("w", 0x20, 2, 7), ("r", 0x20, 2)]
    assert ran("write", target, "bar0", "0x20", "0x80", "--mask", "0xf0") == "0x20: 0x00000007 -> 0x00000087\n"
    assert device.taken() == [("r", 0x20, 4), ("w", 0x20, 4, 0x87)]


def test_names_of_a_map(board: tuple[str, Board], rdl: str) -> None:
    target, device = board
    device.values[0x10] = 0x1234
    shown = ran("read", target, "bar0", "levels", "--map", rdl)
    assert "levels at 0x10  0x00001234" in shown
    assert "15:8  level_b  0x12" in shown
    assert ran("read", target, "bar0", "levels.level_a", "--map", rdl) == "0x34\n"
    assert ran("read", target, "bar0", "levels", "--map", rdl, "--no-fields") == "0x00001234\n"
    assert "level_b" in ran("read", target, "bar0", "0x10", "--map", rdl, "--fields")
    assert device.taken() == [("r", 0x10, 4)] * 4
    ran("write", target, "bar0", "levels.level_b", "0xff", "--map", rdl)
    ran("write", target, "bar0", "levels", "1", "--field", "level_a", "--map", rdl)
    assert device.taken() == [("r", 0x10, 4), ("w", 0x10, 4, 0xFF34), ("r", 0x10, 4), ("w", 0x10, 4, 0xFF01)]
    ran("write", target, "bar0", "wide", "0x100000002", "--map", rdl)
    assert device.taken() == [("w", 0x48, 4, 2), ("w", 0x4C, 4, 1)]


def test_what_a_read_would_change_is_left_out_and_told(board: tuple[str, Board], rdl: str) -> None:
    target, device = board
    shown = ran("dump", target, "bar0", "0x40", "8", "--map", rdl)
    assert "not read: reading clears count" in shown
    assert device.taken() == [("r", 0x44, 4)]
    ran("read", target, "bar0", "events", "--map", rdl)  # named: it is meant
    assert device.taken() == [("r", 0x40, 4)]
    said = ran("write", target, "bar0", "events", "0", "--mask", "0xff", "--map", rdl, status=2)
    assert "changing a part takes a read, and reading clears count" in said
    assert device.taken() == []


def test_dump_reads_its_range_and_no_more(board: tuple[str, Board], tmp_path: Path) -> None:
    target, device = board
    device.values[0x24] = 0x41424344
    lines = ran("dump", target, "bar0", "0x20", "0x18").splitlines()
    assert lines == [
        "00000020  00000000 41424344 00000000 00000000  ....DCBA........",
        "00000030  00000000 00000000                    ........",
    ]
    assert device.taken() == [("r", offset, 4) for offset in range(0x20, 0x38, 4)]
    file = tmp_path / "dump.bin"
    ran("dump", target, "bar0", "0x20", "8", "--width", "4", "-o", str(file))
    assert file.read_bytes() == b"\0\0\0\0DCBA"
    assert "nothing reads a whole region" in ran("dump", target, "bar0", "0", status=2)
    device.taken()
    nowhere = str(tmp_path / "no folder" / "dump.bin")
    assert nowhere in ran("dump", target, "bar0", "0x20", "8", "-o", nowhere, status=1)
    assert device.taken() == []


def test_dump_and_watch_know_the_names_that_read_knows() -> None:
    row = ran("dump", EDU, "config", "0x42", "2", "--width", "2")
    assert ran("dump", EDU, "config", "msi+2", "2", "--width", "2") == row
    assert ran("dump", EDU, "config", "MSI.control") == ran("dump", EDU, "config", "msi.control")
    assert ran("dump", EDU, "config", "msi.control.enable") == ran("dump", EDU, "config", "msi.control")
    assert "say how many bytes" in ran("dump", EDU, "config", "msi+2", status=2)
    target = "emulated:nvme"
    assert ran("dump", target, "config", "PCIe") == ran("dump", target, "config", "express")
    assert "express.link_status" in ran("watch", target, "config", "pcie", "--times", "1")


REFUSED = [
    (("read", EDU, "bar0", "0x6"), 2, "take width 2, or offset 0x4 or 0x8"),
    (("read", EDU, "bar0", "0x100000"), 2, "the last one is at 0xffffc"),
    (("read", EDU, "bar0", "-4"), 2, ""),
    (("read", EDU, "bar0", "0", "--width", "3"), 2, "widths are 1, 2, 4, 8 bytes"),
    (("read", EDU, "config", "0", "--width", "8"), 2, "widths are 1, 2, 4 bytes"),
    (("read", EDU, "bar1", "0"), 1, "it has BAR 0"),
    (("read", EDU, "bar6", "0"), 2, "is none of bar0"),
    (("read", EDU, "bar0", "status"), 2, "give --map FILE.rdl"),
    (("read", EDU, "bar0", "staus", "--map", RDL), 2, "it has status"),
    (("read", EDU, "bar0", "dma", "--map", RDL), 2, "'vfiopy dump' shows all of a group"),
    (("read", EDU, "bar0", "irq_raise", "--map", RDL), 2, "it is write-only"),
    (("read", EDU, "bar0", "status", "--map", RDL, "--width", "2"), 2, "leave --width out"),
    (("read", EDU, "bar0", "0", "--map", "/nonexistent.rdl"), 2, "no such file"),
    (("read", EDU, "config", "msix.control"), 2, "it has msi"),
    (("read", EDU, "config", "msix+2"), 2, "it has no capability 'msix'"),
    (("read", EDU, "config", "msi"), 2, "it is a capability"),
    (("read", "emulated:nothing", "bar0", "0"), 1, "there is no emulated device"),
    (("read", EDU, "bar0", "0", "--backend", "iommufd"), 1, "leave backend out"),
    (("write", EDU, "bar0", "0x4", "0x100000000"), 2, "does not fit into 4 bytes"),
    (("write", EDU, "bar0", "0x4", "five"), 2, "is not a number"),
    (("write", EDU, "bar0", "0x4", "0x100", "--mask", "0xff"), 2, "outside of the mask"),
    (("write", EDU, "bar0", "0x4", "1", "--field", "x"), 2, "give --map, or --mask"),
    (("write", EDU, "bar0", "irq_status", "1", "--map", RDL), 2, "it is read-only"),
    (("write", EDU, "bar0", "status.computing", "1", "--map", RDL), 2, "it is read-only"),
    (("dump", EDU, "bar0", "0", "6"), 2, "take a range of multiples of 4, or --width 2"),
    (("dump", EDU, "bar0", "0xffff0", "0x20"), 2, "outside of its 0x100000 bytes"),
    (("dump", EDU, "bar0", "0x28", "4", "--map", RDL), 2, "no register that lies in 0x28 to 0x2b"),
]


@pytest.mark.parametrize(("words", "status", "text"), REFUSED)
def test_refusals_name_the_remedy(words: tuple[str, ...], status: int, text: str) -> None:
    said = " ".join(ran(*words, status=status).replace("│", " ").split())
    assert text in said
    assert "Traceback" not in said


@pytest.mark.parametrize("name", ["0x4", "0x10", "command.memory", "bar0", "msi.control", "rom", "msi+0x2", "bist"])
def test_configuration_space_is_guarded(name: str) -> None:
    width = ("--width", "2") if name[0] in "0m" and "." not in name else ()
    said = ran("write", EDU, "config", name, "0", *width, status=2)
    assert "--force writes it anyway" in said
    ran("write", EDU, "config", name, "0", *width, "--force")


def test_configuration_space_by_name() -> None:
    assert "command at 0x4" in ran("read", EDU, "config", "command")
    assert ran("read", EDU, "config", "command.memory") == "0x1\n"
    assert ran("read", EDU, "config", "vendor", "--no-fields") == "0x1234\n"
    assert "3:1  vectors          0  1" in ran("read", EDU, "config", "MSI.control")
    assert ran("read", EDU, "config", "cap05+2", "--width", "2") == "0x0080\n"
    assert "msi.address_high" in ran("dump", EDU, "config", "msi")
    assert "subsystem_device" in ran("dump", EDU, "config", "0", "64", "--names")
    assert ran("write", EDU, "config", "interrupt_line", "9", "--read-back").endswith("0x09 reads 0x09\n")


def test_all_ones_are_told_with_the_cause(board: tuple[str, Board], rdl: str, tmp_path: Path) -> None:
    target, device = board
    device.values[0x20] = 0xFFFF_FFFF
    said = ran("read", target, "bar0", "0x20")
    assert "device gone or sleeping? in configuration space it answers" in said
    assert [sample["all_ones"] for sample in sampled(target, "bar0", "0x20", "--count", "2")] == [True, False]
    assert ran("dump", target, "bar0", "0x20", "4").count("all ones") == 1
    (note,) = json.loads(ran("dump", target, "bar0", "0x20", "4", "--json"))["notes"]
    assert "in configuration space it answers" in note
    file = tmp_path / "ones"
    assert "all ones" in ran("dump", target, "bar0", "0x20", "4", "-o", str(file))
    assert file.read_bytes() == b"\xff" * 4
    assert json.loads(ran("dump", target, "bar0", "0x24", "4", "--json"))["notes"] == []
    device.values[0x10] = 0xFFFF_FFFF
    assert "all ones" in ran("dump", target, "bar0", "levels", "--map", rdl)


def sampled(*words: str) -> list[dict[str, Any]]:
    values: list[dict[str, Any]] = json.loads(ran("read", *words, "--json"))["samples"][0]["values"]
    return values


def test_a_device_that_does_not_answer_says_why(board: tuple[str, Board]) -> None:
    target, _ = board

    def read_without(change: Callable[[vfiopy.Device], None]) -> None:
        with opened(target, "bar0", None) as place:
            change(place.device)
            place.locate("0").read()

    with pytest.raises(DeviceGoneError, match="its memory decode is off"):
        read_without(lambda device: setattr(device, "memory_enabled", False))
    with pytest.raises(DeviceGoneError, match="it is in D3hot"):
        read_without(lambda device: config_registers(device.config).pm.control.power_state.write("D3hot"))
    assert ran("read", target, "bar0", "0") == "0x00000000\n"  # opened again, it is awake
    (power_state, *_) = sampled(target, "config", "pm.control")[0]["fields"]
    assert power_state == {"name": "power_state", "bits": "1:0", "value": 0, "words": "D0", "text": ""}


def test_repeats_keep_their_interval(board: tuple[str, Board]) -> None:
    target, _ = board
    answer = json.loads(ran("read", target, "bar0", "0", "--repeat", "3", "--interval", "0.05", "--json"))
    seconds = [sample["seconds"] for sample in answer["samples"]]
    assert seconds[2] >= 0.1
    assert seconds == sorted(seconds)


def test_in_a_pipe_it_is_plain() -> None:
    command = [sys.executable, "-m", "vfiopy", "dump", EDU, "bar0", "0", "0x28", "--map", RDL]
    environment = {**os.environ, "PYTHONPATH": str(TREE)}
    answer = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert "\x1b" not in answer.stdout
    assert "0x0000  identification" in answer.stdout


def test_completed_regions_are_the_regions() -> None:
    assert set(_REGIONS) == set(REGIONS)

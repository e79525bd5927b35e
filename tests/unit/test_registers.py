"""Register maps: which accesses a name makes, and what is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from register_support import Recorder, recorded

import vfiopy
from vfiopy import AccessError, AddressRangeError, RegisterMapError, RegisterNameError, registers
from vfiopy.registers import FieldSpec, GroupSpec, RegisterMap, Registers, RegisterSpec

pytest.importorskip("systemrdl", reason="maps are read by systemrdl-compiler (extra 'rdl')")
RDL = """
enum speed { slow = 0 { desc = "10 Mb/s"; }; fast = 1; };
addrmap board {
  default regwidth = 32; default accesswidth = 32;
  reg {
    desc = "what it does";
    field { sw = rw; } enable[0:0] = 1;
    field { sw = rw; encode = speed; } speed[2:1] = 0;
    field { sw = r; hw = w; } ready[7:7];
    field { sw = rw; hw = w; onwrite = woclr; } error[8:8];
    field { sw = rw; hw = w; onwrite = wzc; } fault[9:9];
  } control @ 0x0;
  reg { field { sw = r; hw = w; onread = rclr; } count[31:0]; } events @ 0x4;
  reg { field { sw = rw; onread = rclr; } a[0:0]; } odd @ 0x8;
  reg { field { sw = rw; onwrite = wclr; } a[0:0]; field { sw = rw; } b[1:1]; } fragile @ 0xc;
  reg { regwidth = 64; field { sw = rw; } data[63:0] = 0; } wide @ 0x10;
  reg { regwidth = 16; accesswidth = 8; field { sw = rw; } data[15:0]; } narrow @ 0x18;
  reg { field { sw = w; } go[3:0]; field { sw = w; } stop[31:31] = 1; } command @ 0x1c;
  regfile {
    reg { field { sw = rw; } amount[7:0] = 0; } gain[2] += 0x8;
    reg { field { sw = rw; } x[0:0]; } last @ 0x10;
  } channel[3] @ 0x100 += 0x20;
  external mem { mementries = 4; memwidth = 16; } table @ 0x200;
};
"""


@pytest.fixture
def rdl(tmp_path: Path) -> Path:
    path = tmp_path / "board.rdl"
    path.write_text(RDL)
    return path


@pytest.fixture
def board(rdl: Path) -> tuple[Registers, Recorder]:
    region, recorder = recorded()
    return registers.load(rdl).on(region), recorder


def test_nothing_is_read_that_was_not_asked_for(board: tuple[Registers, Recorder]) -> None:
    regs, recorder = board
    seen = [regs, regs.control, regs.control.ready, regs.channel, regs.channel[1], regs.channel[1].gain[0], regs.table]
    assert "<register channel[1].gain[0] at 0x120 of board BAR 0, 4 bytes>" in [repr(one) for one in seen]
    assert "channel" in dir(regs)
    assert "speed" in dir(regs.control)
    assert [one.path for one in regs.registers(0, 0x10)] == ["control", "events", "odd", "fragile"]
    assert [one.path for one in regs.registers(0x120, 0x138)] == [
        "channel[1].gain[0]",
        "channel[1].gain[1]",
        "channel[1].last",
    ]
    assert regs.control.decode(0x83) == {"enable": 1, "speed": 1, "ready": 1, "error": 0, "fault": 0}
    assert regs.control.compose(speed="fast") == 0b11  # enable has its reset value
    copy.copy(regs.control)
    assert not hasattr(regs, "nothing")
    assert recorder.taken() == []


@pytest.mark.parametrize(
    ("use", "accesses"),
    [
        (lambda regs: regs.control.read(), [("r", 0x0, 4, 0)]),
        (lambda regs: regs.control.ready.read(), [("r", 0x0, 4, 0)]),
        (lambda regs: regs.events.read(), [("r", 0x4, 4, 0)]),
        (lambda regs: regs.wide.read(), [("r", 0x10, 4, 0), ("r", 0x14, 4, 0)]),
        (lambda regs: regs.wide.write(0x1122334455667788), [("w", 0x10, 4, 0x55667788), ("w", 0x14, 4, 0x11223344)]),
        (lambda regs: regs.narrow.write(0x1234), [("w", 0x18, 1, 0x34), ("w", 0x19, 1, 0x12)]),
        (lambda regs: regs.command.write(regs.command.compose(go=2)), [("w", 0x1C, 4, 0x8000_0002)]),
        (lambda regs: regs.command.go.write(3), [("w", 0x1C, 4, 3)]),  # nothing to read there
        (lambda regs: regs["channel[2].gain[1]"].write(5), [("w", 0x148, 4, 5)]),
        (lambda regs: regs.channel[0].last.x.write(1), [("r", 0x110, 4, 0), ("w", 0x110, 4, 1)]),
        (lambda regs: regs.table.write(3, 7), [("w", 0x206, 2, 7)]),
        (lambda regs: regs.table.read(0), [("r", 0x200, 2, 0)]),
    ],
)
def test_accesses_are_those_that_were_asked_for(
    use: Callable[[Any], object], accesses: list[tuple[str, int, int, int]], board: tuple[Registers, Recorder]
) -> None:
    regs, recorder = board
    use(regs)
    assert recorder.taken() == accesses


def test_changing_a_field_leaves_the_others_as_they_are(board: tuple[Registers, Recorder]) -> None:
    regs, recorder = board
    recorder.data[0:4] = (0xABCD_0000 | 0b11_1000_0001).to_bytes(4, "little")
    regs.control.speed.write("fast")
    # error is cleared by a 1, fault by a 0: neither is; what is no field stays
    assert recorder.taken() == [("r", 0, 4, 0xABCD_0381), ("w", 0, 4, 0xABCD_0000 | 0b10_0000_0011)]
    regs.control.modify(error=1, enable=0)
    assert recorder.taken()[1] == ("w", 0, 4, 0xABCD_0000 | 0b11_0000_0010)


@pytest.mark.parametrize(
    ("use", "error", "text"),
    [
        (lambda regs: regs.events.write(1), AccessError, "events: it is read-only"),
        (lambda regs: regs.command.read(), AccessError, "command: it is write-only"),
        (lambda regs: regs.command.go.read(), AccessError, "command.go: it is write-only"),
        (lambda regs: regs.control.ready.write(1), AccessError, "control.ready: it is read-only"),
        (lambda regs: regs.control.speed.write(4), AccessError, "0x4 does not fit into its bits 2:1"),
        (lambda regs: regs.control.speed.write("warp"), AccessError, "it has slow, fast"),
        (lambda regs: regs.control.write(1 << 32), AccessError, "does not fit into 4 bytes"),
        (lambda regs: regs.odd.a.write(1), AccessError, "reading clears a"),
        (lambda regs: regs.fragile.b.write(1), AccessError, "its field a cannot be left as it is"),
        (lambda regs: regs["contrl"], RegisterNameError, "it has control"),
        (lambda regs: regs["control.spee"], RegisterNameError, "it has speed"),
        (lambda regs: regs["control[0]"], RegisterNameError, "it is no array"),
        (lambda regs: regs["channel[3]"], AddressRangeError, "there is no element 3; it has 3"),
        (lambda regs: regs["control..x"], RegisterNameError, "is not a path"),
        (lambda regs: regs["channel[0].gain[0].amount.x"], RegisterNameError, "it has no member x"),
        (lambda regs: regs.table.read(4), AddressRangeError, "there is no entry 4"),
        (lambda regs: regs.contrl, AttributeError, "it has control"),
    ],
)
def test_refusals_touch_nothing(
    use: Callable[[Any], object], error: type[Exception], text: str, board: tuple[Registers, Recorder]
) -> None:
    regs, recorder = board
    with pytest.raises(error) as caught:
        use(regs)
    assert text in str(caught.value)
    assert recorder.taken() == []


def test_a_map_of_another_device_is_refused(rdl: Path) -> None:
    region, _ = recorded(0x100)
    with pytest.raises(AccessError, match=r"takes 0x208 bytes from 0x0 on, the region has 0x100"):
        registers.load(rdl).on(region)


def test_a_map_may_begin_later(rdl: Path) -> None:
    region, recorder = recorded()
    registers.load(rdl).on(region, 0x400).control.read()
    assert recorder.taken() == [("r", 0x400, 4, 0)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("addrmap x { reg { field {} a; } }", "line 1, column 33: "),
        ("addrmap x { nonsense y; };", "nonsense"),
        ("addrmap x { msb0; reg { field {} a[0:3]; } odd; };", "msb0"),
        ("addrmap x { reg { regwidth = 128; field {} a[128]; } big; };", "accesses of 128 bits"),
        ("addrmap x { external mem { mementries = 2; memwidth = 24; } odd; };", "entries have 24 bits"),
        ("", "board.rdl"),
    ],
)
def test_files_that_are_no_map_say_why(rdl: Path, text: str, expected: str, capfd: pytest.CaptureFixture[str]) -> None:
    rdl.write_text(text)
    with pytest.raises(RegisterMapError) as caught:
        registers.load(rdl)
    assert expected in str(caught.value)
    assert capfd.readouterr() == ("", "")


def test_files_that_are_none(rdl: Path, tmp_path: Path) -> None:
    with pytest.raises(RegisterMapError, match="no such file"):
        registers.load(tmp_path / "x.rdl")
    rdl.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RegisterMapError):
        registers.load(rdl)
    rdl.write_text(RDL)
    with pytest.raises(RegisterMapError, match="other"):
        registers.load(rdl, top="other")


def test_parameters_and_includes(tmp_path: Path) -> None:
    (tmp_path / "inc").mkdir()
    (tmp_path / "inc/common.rdl").write_text("reg word { field {} v[31:0]; };")
    file = tmp_path / "p.rdl"
    file.write_text('`include "common.rdl"\naddrmap p #(longint unsigned N = 1) { word words[N]; };')
    regs = registers.load(file, parameters={"N": 3}, include=(tmp_path / "inc",)).on(recorded()[0])
    assert len(regs.words) == 3


def test_big_endian_maps_have_the_high_word_first(tmp_path: Path) -> None:
    file = tmp_path / "b.rdl"
    file.write_text("addrmap b { bigendian; reg { regwidth = 64; accesswidth = 32; field {} v[63:0]; } wide; };")
    region, recorder = recorded()
    registers.load(file).on(region).wide.write(0x1111_1111_2222_2222)
    assert recorder.taken() == [("w", 0, 4, 0x1111_1111), ("w", 4, 4, 0x2222_2222)]


def test_a_map_written_in_python() -> None:
    spec = RegisterSpec("status", 4, 4, 4, (FieldSpec("busy", 0), FieldSpec("code", 8, 4, names={1: "ok"})))
    region, recorder = recorded()
    regs = RegisterMap(GroupSpec("mine", 0, 8, {"status": spec})).on(region)
    regs.status.code.write("OK")
    assert recorder.taken() == [("r", 4, 4, 0), ("w", 4, 4, 0x100)]
    with pytest.raises(RegisterMapError, match="not naturally aligned"):
        RegisterMap(GroupSpec("mine", 0, 16, {"odd": RegisterSpec("odd", 2, 4, 4)}))
    with pytest.raises(RegisterMapError, match="no register of a bus"):
        RegisterMap(GroupSpec("mine", 0, 16, {"odd": RegisterSpec("odd", 0, 3, 3)}))


def test_on_configuration_space() -> None:
    spec = GroupSpec("ids", 0, 4, {"vendor": RegisterSpec("vendor", 0, 2, 2), "wide": RegisterSpec("wide", 0, 8, 8)})
    with vfiopy.open("emulated:edu") as device:
        regs = RegisterMap(spec).on(device.config)
        assert regs.vendor.read() == 0x1234
        with pytest.raises(AccessError, match="no accesses of 8 bytes"):
            regs.wide.read()

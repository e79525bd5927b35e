"""tools/uapi as a command: generate, check, and what headers of other kernels may bring."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from uapi_sample import SAMPLE, compare, judge, main, make_headers, second, with_more


def declared(**structs: tuple[int, dict[str, tuple[int, str]]]) -> compare.Declared:
    return compare.Declared((7, 3), {"VFIO_A": 1, "VFIO_PCI_NUM_IRQS": 5}, structs)


OLD = declared(vfio_a=(8, {"argsz": (0, "I"), "resv": (4, "I")}))


def test_additions_are_no_change() -> None:
    new = declared(
        vfio_a=(16, {"argsz": (0, "I"), "cap_offset": (4, "I"), "more": (8, "Q")}),
        vfio_b=(4, {"x": (0, "I")}),
    )
    new.constants |= {"VFIO_B": 2, "VFIO_PCI_NUM_IRQS": 6}
    found = compare.changes(OLD, new)
    assert (found.removed, found.changed) == ([], [])
    assert found.added == [
        "VFIO_PCI_NUM_IRQS grew from 5 to 6",
        "VFIO_B = 0x2",
        "struct vfio_a grew from 8 to 16 bytes",
        "struct vfio_a.resv got another name",
        "struct vfio_a.cap_offset",
        "struct vfio_a.more",
        "struct vfio_b",
    ]


@pytest.mark.parametrize(
    ("constants", "structs", "text"),
    [
        ({"VFIO_A": 2}, {}, "VFIO_A was 0x1, is 0x2"),
        ({"VFIO_A": None}, {}, "VFIO_A is gone (was 0x1)"),
        ({"VFIO_PCI_NUM_IRQS": 4}, {}, "VFIO_PCI_NUM_IRQS was 0x5, is 0x4"),
        ({}, {"vfio_a": None}, "struct vfio_a is gone"),
        ({}, {"vfio_a": (4, {"argsz": (0, "I")})}, "struct vfio_a shrank from 8 to 4 bytes"),
        ({}, {"vfio_a": (8, {"resv": (4, "I")})}, "struct vfio_a.argsz is gone"),
        ({}, {"vfio_a": (8, {"argsz": (4, "I")})}, "struct vfio_a.argsz was at (0, 'I'), is at (4, 'I')"),
        ({}, {"vfio_a": (8, {"argsz": (0, "i")})}, "struct vfio_a.argsz was at (0, 'I'), is at (0, 'i')"),
    ],
)
def test_changes_and_removals_are_named(
    constants: dict[str, int | None], structs: dict[str, Any], text: str
) -> None:
    new = declared(**OLD.structs)
    new.constants = {
        name: value for name, value in {**new.constants, **constants}.items() if value is not None
    }
    new.structs = {name: value for name, value in {**new.structs, **structs}.items() if value is not None}
    found = compare.changes(OLD, new)
    assert text in found.removed + found.changed


@pytest.fixture
def tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Return the command line, at work in a tree of its own on the sample header alone."""
    pytest.importorskip("ctypesgen", reason="the second reader is of the dev extra")
    tree = tmp_path / "tree"
    (tree / "vfiopy").mkdir(parents=True)
    (tree / "native/uapi").mkdir(parents=True)
    monkeypatch.setattr(main, "_ROOT", tree)
    monkeypatch.setattr(main, "HEADERS", ("vfio.h",))
    monkeypatch.setattr(main, "REASONS", {"ioctl": "-", "character": "-", "flexible": "-"})
    monkeypatch.setattr(judge, "LEFT_OUT", {})
    monkeypatch.setattr(judge, "UNSIGNED", {})
    monkeypatch.delenv("VFIOPY_LAB_HEADERS", raising=False)

    def run(*options: str, text: str = SAMPLE, version: tuple[int, int] = (7, 3)) -> int:
        return main.main(["--headers", str(make_headers(tmp_path, text, version)), *options])

    return run


def test_generate_then_check(
    tool: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    module = tmp_path / "tree/vfiopy/uapi.py"
    assert tool() == 0
    written = module.read_text()
    assert tool("--check") == 0
    module.write_text(written.replace("VFIO_DO_IT: Final = 0x3B71", "VFIO_DO_IT: Final = 0x3B72"))
    capsys.readouterr()
    assert tool("--check") == 1
    errors = capsys.readouterr().err
    assert "-VFIO_DO_IT: Final = 0x3B72\n+VFIO_DO_IT: Final = 0x3B71" in errors
    assert "remedy: run tools/uapi" in errors
    assert "0x3B72" in module.read_text(), "--check must not write"
    assert tool() == 0
    assert module.read_text() == written
    (tmp_path / "tree/native/uapi/vfiopy_uapi.h").unlink()
    assert tool("--check") == 1


def test_headers_of_a_newer_kernel_may_add(
    tool: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert tool() == 0
    grown = with_more("#define VFIO_NEW 9\nstruct vfio_fresh { __u32 a; };").replace(
        "struct vfio_inner { __u16 id; __u16 version; __u32 next; };",
        "struct vfio_inner { __u16 id; __u16 version; __u32 next; };\nstruct vfio_more { __u64 b; };",
    )
    assert tool("--check", text=grown) == 1, "headers of the same kernel must be the same"
    capsys.readouterr()
    assert tool("--check", text=grown, version=(7, 4)) == 0
    shown = capsys.readouterr().out
    for line in ("VFIO_NEW = 0x9", "struct vfio_fresh", "struct vfio_more"):
        assert f"  new in 7.4: {line}\n" in shown


@pytest.mark.parametrize(
    ("old", "new", "text"),
    [
        ("VFIO_SECOND = 17", "VFIO_SECOND = 16", "VFIO_SECOND was 0x11, is 0x10"),
        ("#define VFIO_FLAG_ONE (1 << 0)", "", "VFIO_FLAG_ONE is gone (was 0x1)"),
        ("__u32 count;", "__u32 count; __u64 a;", "struct vfio_tail.list was at (8, ''), is at (16, '')"),
        ("__u8 bus;", "__s8 bus;", "struct vfio_outer.bus was at (12, 'B'), is at (12, 'b')"),
        # An encoded number carries the size of its structure, which so cannot grow.
        ("__u64 *data;", "__u64 *data; __u64 a;", "VFIO_DO_MORE was 0xc0406203, is 0xc0486203"),
    ],
)
def test_headers_of_a_newer_kernel_may_not_change(
    tool: Callable[..., int], capsys: pytest.CaptureFixture[str], old: str, new: str, text: str
) -> None:
    assert tool() == 0
    assert tool("--check", text=SAMPLE.replace(old, new), version=(7, 4)) == 1
    assert f"broken since 7.3: {text}" in capsys.readouterr().err


def test_headers_of_an_older_kernel_must_be_contained(
    tool: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert tool() == 0
    older = SAMPLE.replace("#define VFIO_FLAG_FIVE (1 << 5)", "#define VFIO_ABANDONED 6")
    assert tool("--check", text=older, version=(6, 19)) == 0
    assert "6.19 is older than the committed 7.3" in capsys.readouterr().out
    contradicting = SAMPLE.replace("VFIO_SECOND = 17", "VFIO_SECOND = 16")
    assert tool("--check", text=contradicting, version=(6, 19)) == 1
    assert "VFIO_SECOND was 0x10, is 0x11" in capsys.readouterr().err


def test_stale_tables_and_unexplained_disagreements_stop_the_tool(
    tool: Callable[..., int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(judge, "LEFT_OUT", {"VFIO_GONE": "was there once"})
    assert tool() == 1
    assert "apply to nothing: LEFT_OUT VFIO_GONE" in capsys.readouterr().err
    monkeypatch.setattr(judge, "LEFT_OUT", {})
    honest = second.read_with_ctypesgen

    def lying(*arguments: Any) -> dict[str, Any]:
        said = honest(*arguments)
        said["structs"]["vfio_inner"]["size"] = 12
        return said

    monkeypatch.setattr(main, "read_with_ctypesgen", lying)
    assert tool() == 1
    assert "without a reason in choices.REASONS:\n  vfio_inner: size is 8" in capsys.readouterr().err


def test_where_the_headers_come_from(
    tool: Callable[..., int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main.main([]) == 1
    assert "which kernel's headers?" in capsys.readouterr().err
    lab = tmp_path / "tree/tools/lab"
    lab.parent.mkdir()
    lab.write_text(f"#!/bin/sh\n[ $1 = headers ] && echo {make_headers(tmp_path)}\n")
    lab.chmod(0o755)
    assert main.main([]) == 0
    assert "wrote vfiopy/uapi.py" in capsys.readouterr().out
    monkeypatch.setenv("VFIOPY_LAB_HEADERS", str(tmp_path))
    assert main.main(["--check"]) == 1
    assert "not a folder of installed kernel headers" in capsys.readouterr().err
    monkeypatch.setenv("VFIOPY_LAB_HEADERS", str(make_headers(tmp_path)))
    assert main.main(["--check"]) == 0

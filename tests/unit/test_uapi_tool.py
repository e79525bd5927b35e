"""tools/uapi: what it reads in a header, what it refuses, where its second reader may disagree."""

from __future__ import annotations

import copy
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from uapi_sample import (
    choices,
    compare,
    facts_of,
    make_headers,
    model,
    read,
    render,
    second,
    with_more,
)

from vfiopy.layout import Layout


def test_names_are_those_of_the_header_itself(tmp_path: Path) -> None:
    names = read.read_names("cc", make_headers(tmp_path), "vfio.h")
    assert [macro.name for macro in names.macros] == [
        "VFIO_KIND",
        "VFIO_FLAG_ONE",
        "VFIO_FLAG_FIVE",
        "VFIO_WIDE",
        "VFIO_DO_IT",
        "VFIO_DO_MORE",
    ]
    assert [macro.name for macro in names.macros if macro.ioctl] == ["VFIO_DO_IT", "VFIO_DO_MORE"]
    assert names.enumerators == ["VFIO_FIRST", "VFIO_SECOND", "VFIO_THIRD", "VFIO_NAMED"]
    assert list(names.structs) == ["vfio_inner", "vfio_outer", "vfio_tail", "vfio_bytes"]


def test_the_compiler_states_values_and_places(tmp_path: Path) -> None:
    facts = facts_of(make_headers(tmp_path))
    assert facts.version == (7, 3)
    declared = compare.declared_by(facts)
    assert declared.constants == {
        "VFIO_KIND": 59,
        "VFIO_FLAG_ONE": 1,
        "VFIO_FLAG_FIVE": 32,
        "VFIO_WIDE": 0xFEDCBA9876543210,
        "VFIO_DO_IT": 0x3B71,
        "VFIO_DO_MORE": 0xC0406203,
        "VFIO_FIRST": 0,
        "VFIO_SECOND": 17,
        "VFIO_THIRD": 18,
        "VFIO_NAMED": 3,
    }
    assert declared.structs["vfio_outer"] == (
        64,
        {
            "header_id": (0, "H"),
            "header_version": (2, "H"),
            "header_next": (4, "I"),
            "group_id": (8, "I"),
            "devid": (8, "i"),
            "bus": (12, "B"),
            "size": (16, "Q"),
            "idr": (24, "6I"),
            "name": (48, "5s"),
            "data": (56, "Q"),
        },
    )
    assert declared.structs["vfio_tail"] == (8, {"argsz": (0, "I"), "count": (4, "I"), "list": (8, "")})
    assert declared.structs["vfio_bytes"] == (4, {"argsz": (0, "I"), "data": (4, "")})


@pytest.mark.parametrize(
    ("declaration", "text"),
    [
        ('#define VFIO_TEXT "vfio-pci"', "VFIO_TEXT is not an integer: name it in choices.LEFT_OUT"),
        ("#define VFIO_HALF 0.5", "VFIO_HALF is not an integer"),
        ("#define VFIO_UNKNOWN (vfio_never_declared + 1)", "VFIO_UNKNOWN"),
        ("#define VFIO_BAD -1", "VFIO_BAD is -1: say in choices.UNSIGNED why"),
        ("struct vfio_bits { __u32 a : 3; };", "struct vfio_bits.a is a bit field"),
        ("struct vfio_grid { __u8 a[2][3]; };", "struct vfio_grid.a has two dimensions"),
        ("struct vfio_float { double a; };", "struct vfio_float.a is of type double"),
        ("struct vfio_many { struct vfio_inner a[2]; };", "struct vfio_many.a is of type struct vfio_inner"),
        ("struct vfio_pointers { void *a[2]; };", "struct vfio_pointers.a: only single 64-bit pointers"),
        ("struct vfio_twice { struct vfio_inner a; __u32 a_id; };", "struct vfio_twice: flattened"),
        ("struct vfio_self { __u32 extra; };", "named self or extra"),
        ("int vfio_variable;", "neither an enum nor a structure"),
        ("struct vfio_broken { __u32 ; a };", "pycparser cannot read linux/vfio.h"),
        ('#include "missing.h"', "cannot preprocess linux/vfio.h"),
    ],
)
def test_what_cannot_be_restated_is_refused_by_name(tmp_path: Path, declaration: str, text: str) -> None:
    include = make_headers(tmp_path, with_more(declaration))
    with pytest.raises(model.UapiError) as caught:
        facts_of(include)
    assert text in str(caught.value)


def test_a_folder_without_headers_is_refused(tmp_path: Path) -> None:
    with pytest.raises(model.UapiError, match="is this a folder of installed kernel headers"):
        read.read_names("cc", tmp_path, "vfio.h")


def test_names_left_out_have_a_reason_and_stale_entries_show(tmp_path: Path) -> None:
    text = with_more("#define VFIO_EEH 5\nstruct vfio_eeh_pe_op { __u32 op; };")
    facts = facts_of(make_headers(tmp_path, text))
    assert facts.left_out == {"VFIO_EEH": "ppc64 EEH only", "vfio_eeh_pe_op": "ppc64 EEH only"}
    assert any("ZPCI" in entry for entry in facts.stale)
    assert not any("EEH" in entry for entry in facts.stale)
    assert "UNSIGNED VFIO_PCI_DEVID_NOT_OWNED" in facts.stale


def test_negative_numbers_with_a_reason_become_32_bit_patterns(tmp_path: Path) -> None:
    facts = facts_of(make_headers(tmp_path, with_more("#define VFIO_PCI_DEVID_NOT_OWNED -1")))
    assert compare.declared_by(facts).constants["VFIO_PCI_DEVID_NOT_OWNED"] == 0xFFFFFFFF
    assert "VFIO_PCI_DEVID_NOT_OWNED: Final = 0xFFFFFFFF" in render.render_module(facts)


def test_the_module_says_what_the_facts_say(tmp_path: Path) -> None:
    facts = facts_of(make_headers(tmp_path))
    text = render.render_module(facts)
    assert text == render.render_module(facts_of(make_headers(tmp_path)))
    assert compare.parse_module(text) == compare.declared_by(facts)
    module: dict[str, Any] = {}
    exec(compile(text, "uapi.py", "exec"), module)
    assert isinstance(module["vfio_outer"], Layout)
    assert module["VFIO_DO_IT"] == 0x3B71
    assert set(module["__all__"]) == {
        *compare.declared_by(facts).constants,
        *_structs(facts),
        "KERNEL_VERSION",
    }


def _structs(facts: model.Facts) -> list[str]:
    return [item.name for item in facts.all_structs()]


def test_the_header_compiles_beside_the_original(tmp_path: Path) -> None:
    include = make_headers(tmp_path)
    text = render.render_header(facts_of(include))
    assert "VFIOPY_VFIO_WIDE 0xFEDCBA9876543210ull" in text
    source = (
        "#include <linux/vfio.h>\n"
        + text
        + "extern struct vfio_outer a;\nextern struct vfiopy_vfio_outer b;\n"
    )
    command = [
        "cc",
        "-std=c11",
        "-Wall",
        "-Wextra",
        "-Werror",
        f"-I{include}",
        "-fsyntax-only",
        "-x",
        "c",
        "-",
    ]
    run = subprocess.run(command, input=source, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


def test_ctypesgen_disagrees_only_where_the_reasons_say(tmp_path: Path) -> None:
    pytest.importorskip("ctypesgen", reason="the second reader is of the dev extra")
    include = make_headers(tmp_path)
    found = second.disagreements(facts_of(include), second.read_with_ctypesgen("cc", include, ["vfio.h"]))
    assert {(item.subject, item.reason) for item in found} == {
        ("VFIO_KIND", "character"),
        ("VFIO_DO_IT", "ioctl"),
        ("VFIO_DO_MORE", "ioctl"),
        ("vfio_tail", "flexible"),
        ("vfio_tail.list", "flexible"),
        ("vfio_bytes", "flexible"),
        ("vfio_bytes.data", "flexible"),
    }


def test_every_other_disagreement_has_no_reason(tmp_path: Path) -> None:
    """Falsify what the second reader said, point by point: each lie must be found, and not be excused."""
    pytest.importorskip("ctypesgen", reason="the second reader is of the dev extra")
    include = make_headers(tmp_path)
    facts = facts_of(include)
    honest = second.read_with_ctypesgen("cc", include, ["vfio.h"])

    def lie(change: Callable[[dict[str, Any]], object]) -> set[str]:
        said = copy.deepcopy(honest)
        change(said)
        return {str(item) for item in second.disagreements(facts, said) if item.reason is None}

    def leaf(said: dict[str, Any], struct: str, index: int) -> dict[str, Any]:
        found: dict[str, Any] = said["structs"][struct]["leaves"][index]
        return found

    assert lie(lambda said: None) == set()
    assert lie(lambda said: said["values"].update(VFIO_FLAG_FIVE=33)) == {
        "VFIO_FLAG_FIVE: value is 32, ctypesgen says 33"
    }
    assert lie(lambda said: said["values"].pop("VFIO_SECOND")) == {
        "VFIO_SECOND: value is 17, ctypesgen says None"
    }
    assert lie(lambda said: said["values"].update(VFIO_DO_IT=0x3B72)) == {
        "VFIO_DO_IT: value is 15217, ctypesgen says 15218"
    }
    assert lie(lambda said: said["values"].update(VFIO_MORE=1)) == {
        "VFIO_MORE: declaration is unknown, ctypesgen says known"
    }
    assert lie(lambda said: said["structs"].pop("vfio_inner")) == {
        "vfio_inner: declaration is known, ctypesgen says unknown"
    }
    assert lie(lambda said: said["structs"]["vfio_outer"].update(size=72)) == {
        "vfio_outer: size is 64, ctypesgen says 72"
    }
    assert lie(lambda said: leaf(said, "vfio_outer", 3).update(offset=12)) == {
        "vfio_outer.group_id: offset is 8, ctypesgen says 12"
    }
    assert lie(lambda said: leaf(said, "vfio_outer", 4).update(signed=False)) == {
        "vfio_outer.devid: signed is True, ctypesgen says False"
    }
    assert lie(lambda said: leaf(said, "vfio_outer", 7).update(count=5)) == {
        "vfio_outer.idr: count is 6, ctypesgen says 5"
    }
    assert lie(lambda said: leaf(said, "vfio_tail", 0).update(path=["argc"]))
    assert lie(lambda said: said["structs"]["vfio_tail"].update(size=24)) == {
        "vfio_tail: size is 8, ctypesgen says 24"
    }
    assert lie(lambda said: leaf(said, "vfio_bytes", 1).update(offset=16))


def test_ctypesgens_own_errors_are_reported(tmp_path: Path) -> None:
    pytest.importorskip("ctypesgen", reason="the second reader is of the dev extra")
    include = make_headers(tmp_path, with_more("typedef __float80 vfio_strange;"))
    with pytest.raises(model.UapiError, match="ctypesgen cannot read the headers:\nERROR"):
        second.read_with_ctypesgen("cc", include, ["vfio.h"])


def test_every_entry_of_the_tables_has_a_reason() -> None:
    for table in (choices.LEFT_OUT, choices.UNSIGNED, choices.GROWING, choices.REMEDIES, choices.REASONS):
        assert all(len(reason) > 10 for reason in table.values())

"""SystemRDL files (Accellera SystemRDL 2.0), through systemrdl-compiler: pip install 'vfiopy[rdl]'."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vfiopy.errors import NotSupportedError, RegisterMapError
from vfiopy.registers.registermap import RegisterMap
from vfiopy.registers.spec import FieldSpec, GroupSpec, MemberSpec, MemorySpec, RegisterSpec

if TYPE_CHECKING:
    from systemrdl.node import AddressableNode, AddrmapNode, FieldNode, MemNode, Node, RegNode

__all__ = ["from_systemrdl", "load"]


def load(
    path: str | os.PathLike[str],
    *,
    top: str | None = None,
    parameters: Mapping[str, Any] | None = None,
    include: tuple[str | os.PathLike[str], ...] = (),
) -> RegisterMap:
    """Read a SystemRDL file. Put the map on a region with :meth:`RegisterMap.on`.

    Args:
        path: the file.
        top: name of the address map in it; None for the last one.
        parameters: values of its parameters.
        include: folders that `` `include`` looks into.

    Raises:
        RegisterMapError: no such file; or what the compiler says, with line and column.
        NotSupportedError: systemrdl-compiler is not installed.
    """
    try:
        from systemrdl.compiler import RDLCompiler  # noqa: PLC0415  an extra
        from systemrdl.messages import MessagePrinter, RDLCompileError, Severity  # noqa: PLC0415
        from systemrdl.source_ref import DetailedFileSourceRef  # noqa: PLC0415
    except ModuleNotFoundError as error:
        raise NotSupportedError(
            f"a SystemRDL file takes {error.name}", object=os.fspath(path), hint="pip install 'vfiopy[rdl]'"
        ) from None

    said: list[str] = []

    class Collect(MessagePrinter):
        """What the compiler would print goes into the error instead."""

        def print_message(self, severity: Severity, text: str, src_ref: Any) -> None:
            if severity < Severity.ERROR or (said and src_ref is None):  # "aborted" says nothing new
                return
            where = ""
            if isinstance(src_ref, DetailedFileSourceRef):
                other = "" if src_ref.path == os.fspath(path) else f"{src_ref.path}, "
                where = f"{other}line {src_ref.line}, column {src_ref.line_selection[0] + 1}: "
            said.append(where + text)

    file = Path(path)
    if not file.is_file():
        raise RegisterMapError("there is no such file", object=os.fspath(path))
    compiler = RDLCompiler(message_printer=Collect())
    try:
        compiler.compile_file(os.fspath(file), incl_search_paths=[os.fspath(one) for one in include])
        root = compiler.elaborate(top, parameters=dict(parameters or {}))
    except (RDLCompileError, ValueError) as error:  # ValueError: no such parameter
        raise RegisterMapError("; ".join(said or [str(error)]), object=os.fspath(path)) from None
    except UnicodeDecodeError:
        raise RegisterMapError("it is not text", object=os.fspath(path)) from None
    return from_systemrdl(root.top)


def from_systemrdl(node: AddrmapNode) -> RegisterMap:
    """Take a map from a node that systemrdl-compiler elaborated, whoever called it: an importer of IP-XACT, say.

    Raises:
        RegisterMapError: it has a register that no access of 1, 2, 4 or 8 bytes reaches.
    """
    spec = _member(node)
    if not isinstance(spec, GroupSpec):
        raise RegisterMapError("it is no address map", object=node.inst_name)
    return RegisterMap(spec)


def _member(node: Node) -> MemberSpec:
    from systemrdl.node import MemNode, RegNode  # noqa: PLC0415

    if isinstance(node, RegNode):
        return _register(node)
    return _memory(node) if isinstance(node, MemNode) else _group(node)  # type: ignore[arg-type]


def _where(node: AddressableNode) -> dict[str, Any]:
    array = node.is_array
    return {
        "name": node.inst_name,
        "offset": node.raw_address_offset,
        "dims": tuple(node.array_dimensions or ()) if array else (),
        "stride": node.array_stride or 0 if array else 0,
        "text": _text(node),
    }


def _text(node: Node) -> str:
    for name in ("desc", "name"):
        text = node.get_property(name)
        if text and not (name == "name" and text == node.inst_name):
            return str(text).strip().splitlines()[0].strip()
    return ""


def _group(node: AddressableNode) -> GroupSpec:
    members = (_member(child) for child in node.children(unroll=False) if hasattr(child, "raw_address_offset"))
    return GroupSpec(**{**_where(node), "offset": _offset(node)}, size=node.size, members={m.name: m for m in members})


def _offset(node: AddressableNode) -> int:
    # Of the map on top: where it sits in a machine is no business of the BAR that it is put on.
    from systemrdl.node import RootNode  # noqa: PLC0415

    return 0 if isinstance(node.parent, RootNode) else node.raw_address_offset


def _register(node: RegNode) -> RegisterSpec:
    bits, access = node.get_property("regwidth"), node.get_property("accesswidth")
    access = min(access, bits)
    if node.owning_addrmap and node.owning_addrmap.get_property("msb0"):
        raise RegisterMapError(
            "its map numbers bits from the most significant one (msb0), which tools understand in different ways",
            object=node.get_path(),
            hint="write it in lsb0",
        )
    if access > 64:
        raise RegisterMapError(f"accesses of {access} bits; those of a bus have at most 64", object=node.get_path())
    return RegisterSpec(
        **_where(node),
        size=bits // 8,
        access=access // 8,
        fields=tuple(_field(one) for one in sorted(node.fields(), key=lambda one: one.low)),
        big_endian=bool(node.owning_addrmap and node.owning_addrmap.get_property("bigendian")),
    )


def _memory(node: MemNode) -> MemorySpec:
    width = node.get_property("memwidth")
    if width not in (8, 16, 32, 64):
        raise RegisterMapError(f"its entries have {width} bits; accesses have 8, 16, 32 or 64", object=node.get_path())
    return MemorySpec(
        **_where(node),
        width=width // 8,
        entries=node.get_property("mementries"),
        readable=node.is_sw_readable,
        writable=node.is_sw_writable,
    )


def _field(node: FieldNode) -> FieldSpec:
    on_read, on_write = node.get_property("onread"), node.get_property("onwrite")
    encode, reset = node.get_property("encode"), node.get_property("reset")
    return FieldSpec(
        name=node.inst_name,
        low=node.low,
        width=node.width,
        readable=node.is_sw_readable,
        writable=node.is_sw_writable,
        on_read=on_read.name if on_read else None,
        on_write=on_write.name if on_write else None,
        reset=reset if isinstance(reset, int) else None,
        names={} if encode is None else {one.value: one.rdl_name or one.name for one in encode},
        text=_text(node),
    )

"""First reader: the preprocessor names the macros, pycparser names enumerators, structures and members."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

from pycparser import c_ast, c_generator, c_parser  # type: ignore[import-untyped]

from .model import Aggregate, Leaf, Macro, Member, Names, UapiError

__all__ = ["kernel_version", "preprocess", "read_names"]

# pycparser knows standard C only; the attributes do not matter here, since the compiler states all offsets.
_STANDARD_C = (
    "-D__attribute__(x)=",
    "-D__extension__=",
    "-D__signed__=signed",
    "-D__int128=long",
    "-D__inline__=",
)
_MARKER = re.compile(r'# (\d+) "([^"]*)"')
_DEFINE = re.compile(r"#define (\w+)(\()?(.*)")
_IOCTL = re.compile(r"\b_IO(R|W|WR)?\(")
_HEXADECIMAL = re.compile(r"0[xX]|<<|\|")


def preprocess(cc: str, include: Path, header: str, *options: str) -> str:
    """Return ``linux/<header>`` of the folder ``include`` as the preprocessor leaves it."""
    command = [*shlex.split(cc), "-E", "-x", "c", f"-I{include}", *options, "-"]
    result = subprocess.run(
        command, input=f"#include <linux/{header}>\n", capture_output=True, text=True, check=False
    )
    if result.returncode:
        raise UapiError(f"{cc} cannot preprocess linux/{header} of {include}:\n{result.stderr.strip()}")
    return result.stdout


def kernel_version(cc: str, include: Path) -> tuple[int, int]:
    """Return the headers' kernel version, major and minor: patch levels change no interface."""
    text = preprocess(cc, include, "version.h", "-dM")
    match = re.search(r"#define LINUX_VERSION_CODE (\d+)", text)
    if match is None:
        raise UapiError(f"{include}/linux/version.h does not say which kernel it comes from")
    code = int(match[1])
    return code >> 16, code >> 8 & 0xFF


def read_names(cc: str, include: Path, header: str) -> Names:
    """Read what ``linux/<header>`` itself declares, not what it includes."""
    path = include / "linux" / header
    if not path.is_file():
        raise UapiError(f"{path} is missing: is this a folder of installed kernel headers?")
    names = Names(header)
    names.macros = _macros(preprocess(cc, include, header, "-dD"), path)
    _declarations(preprocess(cc, include, header, *_STANDARD_C), path, names)
    return names


def _macros(text: str, path: Path) -> list[Macro]:
    here = False
    macros: list[Macro] = []
    for line in text.splitlines():
        if marker := _MARKER.match(line):
            here = Path(marker[2]) == path
        elif here and (define := _DEFINE.match(line)):
            name, function, body = define.groups()
            if not function and body.strip():
                macros.append(Macro(name, bool(_IOCTL.search(body)), bool(_HEXADECIMAL.search(body))))
    return macros


def _declarations(text: str, path: Path, names: Names) -> None:
    try:
        tree = c_parser.CParser().parse(text, str(path))
    except Exception as error:  # pycparser's own error type moved between its versions
        raise UapiError(f"pycparser cannot read linux/{names.header}: {error}") from error
    for declaration in tree.ext:
        if declaration.coord is None or Path(declaration.coord.file) != path:
            continue
        kind = declaration.type if isinstance(declaration, c_ast.Decl) else None
        if isinstance(kind, c_ast.Enum):
            names.enumerators += [item.name for item in kind.values.enumerators]
        elif isinstance(kind, c_ast.Struct) and kind.name and kind.decls:
            names.structs[kind.name] = tuple(_member(item, kind.name) for item in kind.decls)
        else:
            raise UapiError(f"{declaration.coord}: a declaration that is neither an enum nor a structure")


def _member(node: Any, struct: str) -> Member:
    if not isinstance(node, c_ast.Decl):
        raise UapiError(f"struct {struct} has a member of an unknown kind at {node.coord}")
    if node.bitsize is not None:
        raise UapiError(f"struct {struct}.{node.name} is a bit field: it has no offset to restate")
    kind = node.type
    array = isinstance(kind, c_ast.ArrayDecl)
    flexible = array and kind.dim is None
    inner = kind.type if array else kind
    if isinstance(inner, c_ast.ArrayDecl):
        raise UapiError(f"struct {struct}.{node.name} has two dimensions")
    if isinstance(inner, c_ast.PtrDecl):
        return Leaf(node.name, "pointer", array, flexible)
    base = inner.type if isinstance(inner, c_ast.TypeDecl) else inner
    if isinstance(base, c_ast.Struct | c_ast.Union) and not array:
        word = "struct" if isinstance(base, c_ast.Struct) else "union"
        if node.name is None and base.decls is None:
            raise UapiError(f"struct {struct} has an unnamed member that declares nothing")
        members = tuple(_member(item, struct) for item in base.decls or ())
        return Aggregate(word, node.name, base.name if node.name else None, members)
    return Leaf(node.name, c_generator.CGenerator().visit(base), array, flexible)

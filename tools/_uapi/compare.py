"""What lies between two states of the interfaces: kernels may add, they may not change or take away."""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass, field
from typing import Any

from .choices import GROWING, PLACEHOLDER
from .model import Facts, UapiError

__all__ = ["Changes", "Declared", "changes", "declared_by", "parse_module"]


@dataclass
class Declared:
    """Constants and layouts by name, as :mod:`vfiopy.uapi` has them."""

    version: tuple[int, int]
    constants: dict[str, int] = field(default_factory=dict)
    structs: dict[str, tuple[int, dict[str, tuple[int, str]]]] = field(default_factory=dict)


@dataclass
class Changes:
    """Sentences: what was added (harmless), what was removed, what was changed (both break programs)."""

    added: list[str] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)


def declared_by(facts: Facts) -> Declared:
    """Return what a module generated from ``facts`` declares."""
    return Declared(
        facts.version,
        {item.name: item.value for item in facts.all_constants()},
        {
            item.name: (item.size, {leaf.flat: (leaf.offset, leaf.code) for leaf in item.leaves})
            for item in facts.all_structs()
        },
    )


def parse_module(text: str) -> Declared:
    """Return what the text of a generated module declares, without running it."""
    version: Any = None
    constants: dict[str, int] = {}
    structs: dict[str, tuple[int, dict[str, tuple[int, str]]]] = {}
    for node in ast.parse(text).body:
        if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name) or node.value is None:
            continue
        name = node.target.id
        if isinstance(node.value, ast.Call):
            _, size, fields = (ast.literal_eval(argument) for argument in node.value.args)
            structs[name] = (size, fields)
        elif name == "KERNEL_VERSION":
            version = ast.literal_eval(node.value)
        else:
            constants[name] = ast.literal_eval(node.value)
    if version is None:
        raise UapiError("the committed module does not say of which kernel it is: generate it anew")
    return Declared(version, constants, structs)


def changes(old: Declared, new: Declared) -> Changes:
    """Compare two states, the older first.

    A structure may grow at its end, a reserved field may get a name, and the constants of
    :data:`.choices.GROWING` may grow; everything else that is not new breaks programs.
    """
    result = Changes()
    for name, value in old.constants.items():
        now = new.constants.get(name)
        if now is None:
            result.removed.append(f"{name} is gone (was {value:#x})")
        elif now > value and name in GROWING:
            result.added.append(f"{name} grew from {value} to {now}")
        elif now != value:
            result.changed.append(f"{name} was {value:#x}, is {now:#x}")
    result.added += [
        f"{name} = {new.constants[name]:#x}" for name in new.constants if name not in old.constants
    ]
    for name, (size, fields) in old.structs.items():
        if name not in new.structs:
            result.removed.append(f"struct {name} is gone")
        else:
            _struct(name, (size, fields), new.structs[name], result)
    result.added += [f"struct {name}" for name in new.structs if name not in old.structs]
    return result


def _struct(
    name: str,
    old: tuple[int, dict[str, tuple[int, str]]],
    new: tuple[int, dict[str, tuple[int, str]]],
    result: Changes,
) -> None:
    size, fields = old
    new_size, new_fields = new
    if new_size > size:
        result.added.append(f"struct {name} grew from {size} to {new_size} bytes")
    elif new_size < size:
        result.changed.append(f"struct {name} shrank from {size} to {new_size} bytes")
    for item, place in fields.items():
        where = f"struct {name}.{item}"
        if item in new_fields:
            if new_fields[item] != place and not re.fullmatch(PLACEHOLDER, item):
                result.changed.append(f"{where} was at {place}, is at {new_fields[item]}")
        elif re.fullmatch(PLACEHOLDER, item):
            result.added.append(f"{where} got another name")
        else:
            result.removed.append(f"{where} is gone")
    result.added += [f"struct {name}.{item}" for item in new_fields if item not in fields]

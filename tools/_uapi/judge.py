"""The judge: a program made by the C compiler states every value, size and offset."""

from __future__ import annotations

import re
import shlex
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from .choices import LEFT_OUT, UNSIGNED
from .model import (
    Constant,
    Facts,
    Leaf,
    LeafFacts,
    Macro,
    Member,
    Names,
    StructFacts,
    UapiError,
)

__all__ = ["judge", "left_out", "run_probe"]


def left_out(name: str) -> str | None:
    """Return the pattern of the table that leaves ``name`` out, or None."""
    return next((pattern for pattern in LEFT_OUT if re.fullmatch(pattern, name)), None)


def judge(cc: str, include: Path, version: tuple[int, int], names: list[Names]) -> Facts:
    """Ask the compiler for the value of every name that is not left out.

    Raises :class:`UapiError` if a macro is not a number, or a number is negative without a stated reason.
    """
    facts = Facts(version)
    structs = {name: members for header in names for name, members in header.structs.items()}
    probe = _Probe(structs)
    unused = set(LEFT_OUT)
    for header in names:
        for name in [*(macro.name for macro in _numbers(header)), *header.structs]:
            if pattern := left_out(name):
                unused.discard(pattern)
                facts.left_out[name] = LEFT_OUT[pattern]
            elif name in header.structs:
                probe.struct(name)
            else:
                probe.constant(name)
    answers = run_probe(cc, include, [header.header for header in names], probe.lines)
    for header in names:
        facts.constants[header.header] = [
            _constant(macro, answers) for macro in _numbers(header) if macro.name not in facts.left_out
        ]
        facts.structs[header.header] = [
            _struct(name, members, structs, answers)
            for name, members in header.structs.items()
            if name not in facts.left_out
        ]
    facts.stale = [f"LEFT_OUT {pattern}" for pattern in sorted(unused)]
    facts.stale += [f"UNSIGNED {name}" for name in UNSIGNED if answers.get(f"V {name}", ["", "0"])[1] != "1"]
    return facts


def _numbers(header: Names) -> list[Macro]:
    return header.macros + [Macro(name, False, False) for name in header.enumerators]


def run_probe(cc: str, include: Path, headers: list[str], lines: list[str]) -> dict[str, list[str]]:
    """Compile and run a program of the given statements, each printing ``key=word word ...``."""
    source = "\n".join(
        [
            "#include <fcntl.h>",
            "#include <stddef.h>",
            "#include <stdio.h>",
            *(f"#include <linux/{header}>" for header in headers),
            "int main(void)",
            "{",
            *lines,
            "    return 0;",
            "}",
            "",
        ]
    )
    with tempfile.TemporaryDirectory(prefix="vfiopy-uapi-") as folder:
        path = Path(folder, "probe.c")
        path.write_text(source)
        program = Path(folder, "probe")
        command = [*shlex.split(cc), "-std=gnu11", "-w", "-D_GNU_SOURCE", f"-I{include}"]
        command += ["-o", str(program), str(path)]
        built = subprocess.run(command, capture_output=True, text=True, check=False)
        if built.returncode:
            raise UapiError(f"the compiler refuses the probe:\n{built.stderr[:4000]}")
        run = subprocess.run([str(program)], capture_output=True, text=True, check=False)
        if run.returncode:
            raise UapiError(f"the probe ended with status {run.returncode}")
    answers: dict[str, list[str]] = {}
    for line in run.stdout.splitlines():
        key, _, words = line.partition("=")
        answers[key] = words.split()
    return answers


class _Probe:
    """Statements of the program; each carries a ``#line`` with the name, so that an error says which one."""

    def __init__(self, structs: dict[str, tuple[Member, ...]]) -> None:
        self.lines: list[str] = []
        self._structs = structs

    def _print(self, what: str, key: str, form: str, *values: str) -> None:
        self.lines += [f'#line 1 "{what}"', f'    printf("{key}={form}\\n", {", ".join(values)});']

    def constant(self, name: str) -> None:
        integer = f"__builtin_classify_type({name}) == 1"
        self._print(name, f"V {name}", "%d %d %lld", integer, f"({name}) < 0", f"(long long)({name})")

    def struct(self, name: str) -> None:
        kind = f"struct {name}"
        self._print(name, f"S {name}", "%zu", f"sizeof({kind})")
        for path, leaf in leaves(self._structs[name], self._structs):
            where = ".".join(path)
            key = f"F {name} {where}"
            value = f"(({kind} *)0)->{where}"
            size = "(size_t)0" if leaf.flexible else f"sizeof({value})"
            element = f"sizeof({value}[0])" if leaf.array else size
            number = not leaf.ctype.startswith("struct") and leaf.ctype != "pointer"
            sample = f"{value}[0]" if leaf.array else value
            signed = f"((__typeof__({sample}))-1 < 1)" if number else "0"
            integer = f"(__builtin_classify_type({sample}) == 1)" if number else "0"
            self._print(
                f"{name}.{where}",
                key,
                "%zu %zu %zu %d %d",
                f"offsetof({kind}, {where})",
                size,
                element,
                signed,
                integer,
            )


def leaves(
    members: tuple[Member, ...], structs: dict[str, tuple[Member, ...]], above: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], Leaf]]:
    """Iterate over the leaves of a structure, through unions and structures inside it."""
    for member in members:
        if isinstance(member, Leaf):
            yield (*above, member.name), member
            continue
        inner = member.members or structs.get(member.tag or "")
        if not inner:
            raise UapiError(f"{member.kind} {member.tag} is declared in none of the headers")
        yield from leaves(inner, structs, (*above, member.name) if member.name else above)


def _constant(macro: Macro, answers: dict[str, list[str]]) -> Constant:
    integer, negative, text = answers[f"V {macro.name}"]
    if integer != "1":
        raise UapiError(f"{macro.name} is not an integer: name it in choices.LEFT_OUT")
    value = int(text)
    if negative == "1":
        if macro.name not in UNSIGNED or value < -(1 << 31):
            raise UapiError(f"{macro.name} is {value}: say in choices.UNSIGNED why it may be negative")
        value &= 0xFFFFFFFF
    elif value < 0:
        value &= (1 << 64) - 1
    hexadecimal = macro.hexadecimal or macro.name in UNSIGNED
    return Constant(macro.name, value, macro.ioctl, hexadecimal)


def _struct(
    name: str,
    members: tuple[Member, ...],
    structs: dict[str, tuple[Member, ...]],
    answers: dict[str, list[str]],
) -> StructFacts:
    found: list[LeafFacts] = []
    for path, leaf in leaves(members, structs):
        words = answers[f"F {name} {'.'.join(path)}"]
        offset, size, element, signed, integer = (int(word) for word in words)
        record = leaf.ctype.startswith("struct ")
        pointer = leaf.ctype == "pointer"
        if not integer and not pointer and not (record and leaf.flexible):
            raise UapiError(
                f"struct {name}.{'.'.join(path)} is of type {leaf.ctype}: neither number nor pointer"
            )
        if pointer and (size != 8 or leaf.array):
            raise UapiError(f"struct {name}.{'.'.join(path)}: only single 64-bit pointers are known")
        count = (0 if leaf.flexible else size // element) if leaf.array else None
        found.append(LeafFacts(path, offset, size, element, bool(signed), pointer, count, leaf.ctype))
    flat = [leaf.flat for leaf in found]
    if len(set(flat)) != len(flat) or {"self", "extra"} & set(flat):
        raise UapiError(f"struct {name}: flattened, two fields get one name, or one named self or extra")
    return StructFacts(name, int(answers[f"S {name}"][0]), found, members)

"""Parts of pages that are made from the code: ``<!-- made from the code: NAME -->`` in a page stands for one."""

from __future__ import annotations

import errno
import io
import os
import re
from collections.abc import Callable

from sphinx.application import Sphinx
from sphinx.errors import ExtensionError

import vfiopy
from vfiopy.doctor import SYMPTOMS
from vfiopy.errno_table import TABLE

from . import ioctls, pictures

__all__ = ["PARTS", "setup"]

_PLACE = re.compile(r"^<!-- made from the code: (\w+) -->$", re.MULTILINE)


def setup(app: Sphinx) -> dict[str, object]:
    """Hook in."""
    app.connect("source-read", _fill)
    return {"parallel_read_safe": True, "parallel_write_safe": True}


def _fill(_app: Sphinx, page: str, source: list[str]) -> None:
    def part(match: re.Match[str]) -> str:
        if match[1] not in PARTS:
            raise ExtensionError(f"{page}: nothing is called {match[1]}; there are {', '.join(PARTS)}")
        return PARTS[match[1]]()

    source[0] = _PLACE.sub(part, source[0])


def _symptoms() -> str:
    lines = ["| | what you see | why | what finds it |", "|---|---|---|---|"]
    for one in SYMPTOMS:
        ways = [f"`vfiopy doctor`: {', '.join(one.checks)}"] if one.checks else []
        ways += [f"`vfiopy doctor --log`: {', '.join(one.log)}"] if one.log else []
        explained = ", ".join(f"{number} {call}" for number, call in one.errors[:2])
        ways += [f"`vfiopy doctor --explain '{explained.split(', ')[0]}'`"] if explained else []
        ways += [f"with vfiopy: {one.library}"] if one.library else []
        lines.append(f"| {one.number} | {_cell(one.title)} | {_cell(one.cause)} | {'; '.join(map(_cell, ways))} |")
    return "\n".join(lines)


def _errors() -> str:
    lines: list[str] = []
    for call, rows in TABLE.items():
        lines += [f"## {call}", "", "| errno | what it means here | what to do | raised as |", "|---|---|---|---|"]
        for number, row in sorted(rows.items()):
            module = "vfiopy" if hasattr(vfiopy, row.kind) else "vfiopy.errors"
            raised = f"{{py:exc}}`~{module}.{row.kind}`"
            name = errno.errorcode[number]
            lines.append(f"| {name} | {_cell(row.meaning)} | {_cell(row.hint)} | {raised} |")
        lines.append("")
    return "\n".join(lines)


def _commands() -> str:
    os.environ["TYPER_USE_RICH"] = "0"  # the same words, as plain lines; read when typer is imported
    from typer.main import get_command  # noqa: PLC0415
    from typer.testing import CliRunner  # noqa: PLC0415

    from vfiopy.cli.app import app  # noqa: PLC0415

    lines: list[str] = []
    for name in get_command(app).commands:  # type: ignore[attr-defined]  # a group
        shown = CliRunner().invoke(app, [name, "--help"], prog_name="vfiopy", terminal_width=100)
        if shown.exit_code:
            raise ExtensionError(f"vfiopy {name} --help: {shown.output}")
        lines += [f"## vfiopy {name}", "", "```text", shown.output.strip(), "```", ""]
    return "\n".join(lines)


def _other_names() -> str:
    """What vfiopy exports and its page does not name yet: nothing gets lost, and whoever adds a name may place it."""
    page = (pictures.DOCS / "reference" / "api" / "vfiopy.md").read_text()
    named = set(re.findall(r"^\.\. auto\w+:: (\w+)$", page, re.MULTILINE))
    others = [name for name in vfiopy.__all__ if name not in named]
    if not others:
        return ""
    lines = ["## More", "", "```{eval-rst}", ".. currentmodule:: vfiopy", ""]
    for name in others:
        thing = getattr(vfiopy, name)
        kind = "class" if isinstance(thing, type) else "function" if callable(thing) else "data"
        lines += [f".. auto{kind}:: {name}", ""]
    return "\n".join([*lines, "```"])


def _figures(heading: str) -> Callable[[], str]:
    """A section of benchmarks.md: machine, conditions, tables, remarks."""

    def markdown() -> str:
        sections = re.split(r"^## ", (pictures.DOCS / "benchmarks.md").read_text(), flags=re.MULTILINE)
        found = [section for section in sections if section.startswith(f"{heading}: ")]
        if len(found) != 1:
            raise ExtensionError(f"docs/benchmarks.md: {len(found)} sections are called {heading!r}, one was expected")
        title, _, text = found[0].partition("\n")
        return f"Measured with {title.partition(': ')[2]}.\n{text}"

    return markdown


def _picture(draw: Callable[[io.StringIO], str]) -> Callable[[], str]:
    """A drawing as part of the page: no file that somebody could forget to draw again."""

    def markdown() -> str:
        file = io.StringIO()
        words = draw(file)
        svg = file.getvalue()
        svg = re.sub(r"\n\s*", "\n", svg[svg.index("<svg") :])  # an empty line would end the block
        return f'<div class="picture" role="img" aria-label="{words}">\n{svg}\n</div>\n'

    return markdown


def _cell(text: str) -> str:
    return re.sub(r"([|<])", r"\\\1", text)


PARTS: dict[str, Callable[[], str]] = {
    "ioctls": ioctls.in_markdown,
    "other_names": _other_names,
    "symptoms": _symptoms,
    "errors": _errors,
    "commands": _commands,
    "space": _picture(pictures.space),
    "registers": _picture(pictures.registers),
    "figures_registers": _figures("Registers"),
    "figures_mapping": _figures("Map and unmap"),
    "figures_interrupts": _figures("Interrupts"),
    "figures_book": _figures("The book"),
    "figures_socket": _figures("A register behind a socket"),
    "figures_peer": _figures("Peer to peer"),
}

"""The snippets of README.md and docs/: which there are, and where each can run.

A Python block runs anywhere, unless a comment on the line above it says otherwise:

``<!--- run on: 0000:00:05.0=emulated:edu -->``
    it names a real function; in tests an emulated device stands in, and in the lab's guest a real one
``<!--- guest: 0000:3a:00.0=nvme -->``
    it needs a kernel with VFIO; it runs in the lab's guest, on the lab's device of that name (:data:`DEVICES`)
``<!--- guest bound: ... -->``
    the same, and the device is on vfio-pci before
``<!--- needs: numba -->``
    it runs where that can be imported
``<!--- not run: reason -->``
    it runs nowhere; ``tests/docs`` has the list of these

What a reader need not see goes into ``<!--- invisible-code-block: python``, which runs like the others.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sybil import Document, Example
from sybil.evaluators.python import pad
from sybil.parsers.markdown import CodeBlockParser

__all__ = ["DEVICES", "PAGES", "Command", "Snippet", "commands", "run", "snippets", "words_in_text"]

TREE = Path(__file__).resolve().parents[2]
PAGES = [TREE / "README.md", *sorted((TREE / "docs").rglob("*.md"))]

DEVICES = {
    "edu": ("1234:11e8", 0),
    "nvme": ("1b36:0010", 0),
    "nvme1": ("1b36:0010", 1),
    "ivshmem": ("1af4:1110", 0),
    "emulated:edu": ("1234:11e8", 0),
}
"""The lab's devices by the names that comments use: id, and which one with that id."""

_PLACE = re.compile(r"^[ \t]*<!--- (run on|guest bound|guest|needs|not run): ?(.*) -->\s*\Z", re.MULTILINE)
_WORDS = re.compile(r"`(vfiopy [a-z][^`\n]*)`")


@dataclass(frozen=True)
class Snippet:
    """A Python block of a page."""

    page: str
    line: int
    source: str
    place: str
    """``run on``, ``guest``, ``guest bound``, ``needs``, ``not run``, or nothing: anywhere."""
    reason: str
    devices: dict[str, str] = field(default_factory=dict)
    """Address in the text → device that it stands for."""

    def __str__(self) -> str:
        """Where it is."""
        return f"{self.page}:{self.line}"


@dataclass(frozen=True)
class Command:
    """A line of a shell block, or a command that the text names."""

    page: str
    line: int
    words: tuple[str, ...]
    named: bool = False
    """It is named in the text, and may be incomplete."""

    def __str__(self) -> str:
        """Where it is, and what."""
        return f"{self.page}:{self.line}: {shlex.join(self.words)}"


def _blocks(page: Path, language: str) -> Iterator[tuple[int, Any, re.Match[str] | None]]:
    """Number of the line with the fence, text, and the comment above it."""
    text = page.read_text()
    regions = CodeBlockParser(language, _no_evaluator)(Document(text, str(page)))
    for region in sorted(regions, key=lambda region: region.start):
        yield text.count("\n", 0, region.start) + 1, region.parsed, _PLACE.search(text[: region.start])


def _no_evaluator(_example: Example) -> None:
    """Sybil finds the blocks; :func:`run` runs them."""


def snippets(page: Path) -> list[Snippet]:
    """The Python blocks of a page, in order."""
    name = str(page.relative_to(TREE))
    found = []
    for line, source, place in _blocks(page, "python"):
        kind, words = (place[1], place[2]) if place else ("", "")
        devices = dict(word.split("=", 1) for word in words.split()) if "=" in words else {}
        reason = words if kind in ("needs", "not run") else ""
        found.append(Snippet(name, line + source.line_offset, str(source), kind, reason, devices))
    return found


def run(snippet: Snippet, namespace: dict[str, Any], stand_ins: dict[str, str] | None = None) -> None:
    """Run one; the lines of a traceback are those of the page.

    ``stand_ins``: address in the text → another name. The sources that ran so far are in the namespace as ``shown``,
    for invisible blocks that write files of them.
    """
    source = snippet.source
    for address, device in (stand_ins or {}).items():
        if f'"{address}"' not in source:
            raise AssertionError(f"{snippet}: no {address} is in it")
        source = source.replace(f'"{address}"', f'"{device}"')
    exec(compile(pad(source, snippet.line), str(TREE / snippet.page), "exec", dont_inherit=True), namespace)
    namespace.setdefault("shown", []).append(snippet.source)


def commands(page: Path) -> list[Command]:
    """The lines of a page's shell blocks."""
    name = str(page.relative_to(TREE))
    found = []
    for language in ("sh", "console"):
        for start, text, _place in _blocks(page, language):
            for number, line in enumerate(text.replace("\\\n", "  ").splitlines(), start + 1):
                shown = line.removeprefix("$ ") if language == "console" else line
                if language == "console" and not line.startswith("$ "):
                    continue  # what the command prints
                if words := shlex.split(shown, comments=True):
                    found.append(Command(name, number, tuple(words)))
    return found


def words_in_text(page: Path) -> list[Command]:
    """Commands of ``vfiopy`` that the text of a page names."""
    name = str(page.relative_to(TREE))
    lines = enumerate(page.read_text().splitlines(), 1)
    return [
        Command(name, number, tuple(shlex.split(words)), named=True)
        for number, line in lines
        if "**Not yet**" not in line
        for words in _WORDS.findall(line)
    ]

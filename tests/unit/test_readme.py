"""README keeps what it promises: its first program runs, and what it names exists."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path

import pytest

TREE = Path(__file__).resolve().parents[2]
PAGES = ["README.md", *sorted(str(page.relative_to(TREE)) for page in (TREE / "docs").glob("*.md"))]
README = (TREE / "README.md").read_text()
FOLDERS = ("docs", "examples", "native", "tests", "tools", "vfiopy")
FILES = [path.relative_to(TREE) for folder in FOLDERS for path in (TREE / folder).rglob("*.*")]


def test_the_first_program_runs(capsys: pytest.CaptureFixture[str]) -> None:
    program = re.search(r"```python\n(.*?)```", README, re.DOTALL)
    assert program is not None
    exec(textwrap.dedent(program[1]).replace('open("0000:00:05.0")', 'open("emulated:edu")'), {})
    assert capsys.readouterr().out == "0x10000ed\n"


@pytest.mark.parametrize("page", PAGES)
def test_files_that_are_named_exist(page: str) -> None:
    text = (TREE / page).read_text()
    # Not the middle of a longer path: that is a file of somebody else's.
    named = set(re.findall(r"(?<![\w/.-])[\w/*-]+\.(?:py|c|md)\b", text)) - {"tests/guest/test_x.py"}
    assert page != "README.md" or len(named) > 30, "the pattern finds nothing any more"
    named = {name for name in named if not name.startswith("drivers/")}  # the kernel's
    missing = [name for name in sorted(named) if not any(path.match(name) for path in FILES)]
    assert missing == []


@pytest.mark.parametrize("page", PAGES)
def test_tests_that_are_named_exist(page: str) -> None:
    named = re.findall(r"(test_\w+\.py)::(test_\w+\*?)", (TREE / page).read_text())
    assert page != "docs/selftests.md" or len(named) > 15, "the pattern finds nothing any more"
    missing = [
        (file, test)
        for file, test in named
        if not any(f"def {test}(".partition("*")[0] in path.read_text() for path in (TREE / "tests").rglob(file))
    ]
    assert missing == []

"""What the pages show works: Python blocks run, and commands are ones that there are."""

from __future__ import annotations

import gc
import re
import warnings
from importlib.util import find_spec
from itertools import dropwhile, takewhile
from pathlib import Path
from typing import Any

import pytest
from typer.core import TyperGroup
from typer.main import get_command

from tools._docs.snippets import PAGES, TREE, Command, commands, run, snippets, words_in_text
from vfiopy.cli.app import app
from vfiopy.lives import drain_finalizers

SNIPPETS = [snippet for page in PAGES for snippet in snippets(page)]
RUN_HERE = ("", "run on", "needs")
WITH_SNIPPETS = [page for page in PAGES if any(one.place in RUN_HERE for one in snippets(page))]
COMMANDS = [command for page in PAGES for command in [*commands(page), *words_in_text(page)]]
NOT_RUN = {"docs/registers.md: the package has to be generated first; examples/registers.py does, and runs it"}
"""``page: reason`` of what runs nowhere. Each one that is added here is a promise that nobody checks."""
PROMISED: set[str] = set()
"""Commands that pages name and that are not there yet."""
FILE = re.compile(r"[\w-]+\.(txt|py|json)")
SYSTEM = {".", "echo", "ls", "modprobe", "qemu-system-x86_64", "sudo", "systemctl"}
"""Programs that are not ours: nothing is known of their options."""


@pytest.mark.parametrize("page", WITH_SNIPPETS, ids=lambda page: str(page.relative_to(TREE)))
def test_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("examples").symlink_to(TREE / "examples")
    namespace: dict[str, Any] = {"__name__": "snippet"}
    here = [snippet for snippet in snippets(page) if snippet.place in RUN_HERE]
    for snippet in here:
        if snippet.place == "needs" and find_spec(snippet.reason) is None:
            continue
        run(snippet, namespace, snippet.devices)
    namespace.clear()
    gc.collect()
    assert drain_finalizers() == 0, "something was dropped without close()"


def test_what_runs_nowhere_is_known() -> None:
    assert {f"{snippet.page}: {snippet.reason}" for snippet in SNIPPETS if snippet.place == "not run"} == NOT_RUN


def test_comments_stand_before_blocks() -> None:
    kinds = ("run on", "guest", "needs", "not run")
    comments = sum(page.read_text().count(f"<!--- {kind}") for page in PAGES for kind in kinds)
    assert comments == sum(snippet.place != "" for snippet in SNIPPETS), "one is not on the line above a block"


@pytest.mark.parametrize("command", COMMANDS, ids=str)
def test_command_is_one(command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    words = list(dropwhile(lambda word: re.match(r"[A-Z_]+=", word), command.words))
    if words[0] == "sudo" and words[1].endswith("vfiopy"):
        words.pop(0)
    if Path(words[0]).name == "vfiopy":
        parse(words[1:], named=command.named)
    elif words[0] in ("python", "pytest") or words[0].startswith("tools/"):
        for word in words:
            if word.startswith(("tools/", "examples/", "tests/")) and "test_x.py" not in word:
                assert (TREE / word).exists(), word
    else:
        assert words[0] in SYSTEM, f"{words[0]}: neither ours nor in SYSTEM"


def parse(words: list[str], *, named: bool = False) -> None:
    """As the command line does it, up to where the command would run; ``...`` in a page stands for anything."""
    group = get_command(app)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        context = group.make_context("vfiopy", [words[0]], resilient_parsing=True)
        assert isinstance(group, TyperGroup)
        if words[0] in PROMISED:
            return
        command = group.commands.get(words[0])
        assert command is not None, f"vfiopy {words[0]}: no such command"
        for word in words:
            if FILE.fullmatch(word):
                Path(word).touch()
        more = words[-1:] == ["..."] and not words[-2].startswith("-")
        ours = takewhile(lambda word: word != "--", words)
        options = [word.partition("=")[0] for word in ours if word.startswith("--")]
        assert set(options) <= command_options(command), f"vfiopy {words[0]}: no such option among {options}"
        if not named and len(words) > 1:
            command.make_context(words[0], words[1 : -1 if more else None], parent=context)


def command_options(command: Any) -> set[str]:
    """Names of the options."""
    return {"--help"}.union(*({*option.opts, *option.secondary_opts} for option in command.params))


def test_parse_refuses() -> None:
    with pytest.raises(AssertionError, match="no such command"):
        parse(["lisst"])
    with pytest.raises(AssertionError, match="no such option"):
        parse(["list", "--clas", "nvme"])
    with pytest.raises(Exception, match="Missing"):
        parse(["serve", "edu"])

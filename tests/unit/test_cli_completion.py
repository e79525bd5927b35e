"""Completions: what is offered, and that a real bash takes it although addresses have colons."""

from __future__ import annotations

import os
import pty
import select
import subprocess
import sys
import time
from pathlib import Path

import pytest
from pci_tree import FakeKernel
from typer.testing import CliRunner

from vfiopy.cli.app import app
from vfiopy.cli.bash_words import join

TREE = Path(__file__).parents[2]
runner = CliRunner()


@pytest.fixture
def kernel(tmp_path: Path) -> FakeKernel:
    kernel = FakeKernel.make(tmp_path / "machine")
    for address in ("0000:01:00.0", "0000:01:00.1", "0000:3a:00.0"):
        kernel.add(address, group=int(address[-1]))
    return kernel


def offered(kernel: FakeKernel, *words: str) -> list[str]:
    """What fish is offered: value and help with a tab between."""
    environment = {
        "_ROOT_COMPLETE": "complete_fish",
        "_TYPER_COMPLETE_FISH_ACTION": "get-args",
        "_TYPER_COMPLETE_ARGS": " ".join(("vfiopy", *words)),
    }
    answer = runner.invoke(app, [], obj=kernel, env=environment)
    return [line.partition("\t")[0] for line in answer.stdout.splitlines()]


def test_what_is_offered(kernel: FakeKernel) -> None:
    addresses = ["0000:01:00.0", "0000:01:00.1", "0000:3a:00.0"]
    assert offered(kernel, "info", "0000:01") == addresses[:2]
    assert offered(kernel, "read", "0000:3") == addresses[2:]
    assert offered(kernel, "read", "emulated:e") == ["emulated:edu"]
    assert offered(kernel, "read", "vf") == ["vfio-user:"]
    assert offered(kernel, "read", "emulated:edu", "bar") == [f"bar{index}" for index in range(6)]
    assert offered(kernel, "read", "emulated:edu", "c") == ["config"]
    assert "type1v2" in offered(kernel, "shell", "emulated:edu", "--backend", "ty")
    for command in ("doctor", "bind", "unbind", "restore", "list", "selftest", "serve", "shell", "watch"):
        assert offered(kernel, command, "0000:3") == addresses[2:], command


@pytest.mark.parametrize(
    ("words", "index", "joined", "at"),
    [
        (["vfiopy", "info", "0000", ":", "01", ":", "0"], 6, ["vfiopy", "info", "0000:01:0"], 2),
        (["vfiopy", "info", "0000", ":"], 3, ["vfiopy", "info", "0000:"], 2),
        (["vfiopy", "read", "emulated", ":", "edu", "ba"], 5, ["vfiopy", "read", "emulated:edu", "ba"], 3),
        (["vfiopy", "read", "0000", ":", "01", ":", "00.0", ""], 7, ["vfiopy", "read", "0000:01:00.0", ""], 3),
        (["vfiopy", "re"], 1, ["vfiopy", "re"], 1),
        (["vfiopy", ""], 1, ["vfiopy", ""], 1),
    ],
)
def test_words_are_joined_again(words: list[str], index: int, joined: list[str], at: int) -> None:
    assert join(words, index) == (joined, at)


@pytest.fixture
def program(kernel: FakeKernel, tmp_path: Path) -> Path:
    """A folder with a ``vfiopy`` that sees the made-up machine."""
    folder = tmp_path / "bin"
    folder.mkdir()
    path = folder / "vfiopy"
    path.write_text(
        f"#!{sys.executable}\n"
        "import sys\n"
        "from pathlib import Path\n"
        f"sys.path[:0] = [{str(TREE)!r}, {str(TREE / 'tests/unit')!r}]\n"
        "from pci_tree import FakeKernel\n"
        "from vfiopy.cli import complete, main\n"
        f"root = Path({str(kernel.sys.parent)!r})\n"
        "kernel = FakeKernel(sys=root / 'sys', proc=root / 'proc', dev=root / 'dev', share=(root / 'share',))\n"
        "complete.system_of = lambda context: kernel\n"
        "main.main()\n"
    )
    path.chmod(0o755)
    return folder


TYPED = [
    ("vfiopy info 0000:3\t", "vfiopy info 0000:3a:00.0 "),
    ("vfiopy read 0000:3a:00.0 con\t", "vfiopy read 0000:3a:00.0 config "),
    ("vfiopy read emulated:e\t", "vfiopy read emulated:edu "),
    ("vfiopy info 0000:01:00.\t\t", "00.0  00.1"),
]


def test_a_real_bash(program: Path) -> None:
    environment = {**os.environ, "PATH": f"{program}:{os.environ['PATH']}", "TERM": "dumb", "PS1": "$ "}
    process, fd = pty.fork()
    if not process:
        os.execvpe("bash", ["bash", "--norc", "--noprofile", "-i"], environment)

    def until(wanted: str) -> None:
        said = ""
        deadline = time.monotonic() + 60
        while wanted not in said:
            assert time.monotonic() < deadline, said
            if select.select([fd], [], [], 0.2)[0]:
                said += os.read(fd, 4096).decode()

    try:
        os.write(fd, b'bind "set bell-style none"; eval "$(vfiopy --show-completion bash)"; echo re""ady\n')
        until("ready")
        for keys, shown in TYPED:
            os.write(fd, keys.encode())
            until(shown)
            os.write(fd, b"\x15")  # the line goes
    finally:
        os.close(fd)
        os.waitpid(process, 0)


def test_installing_it_writes_a_file_of_the_shell(tmp_path: Path) -> None:
    answer = subprocess.run(
        [sys.executable, "-m", "vfiopy", "--install-completion", "bash"],
        cwd=TREE,
        env={**os.environ, "HOME": str(tmp_path), "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert answer.returncode == 0, answer.stderr
    assert [path.name for path in (tmp_path / ".bash_completions").iterdir()] != []

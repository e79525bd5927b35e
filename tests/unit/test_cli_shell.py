"""``vfiopy shell``, ``run`` and ``watch``: what they hand out, and that the device is closed whatever happens."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_cli_registers import RDL, TREE, Board
from typer.testing import CliRunner

import vfiopy
from vfiopy.cli.app import app

runner = CliRunner()
EDU = "emulated:edu"


@pytest.fixture
def board(tmp_path: Path) -> Iterator[tuple[str, Board]]:
    device = Board()
    with vfiopy.serve(device, tmp_path / "board.sock") as server:
        server.start()
        yield f"vfio-user:{tmp_path / 'board.sock'}", device


def environment(tmp_path: Path) -> dict[str, str]:
    return {
        **os.environ,
        "PYTHONPATH": str(TREE),
        "IPYTHONDIR": str(tmp_path / "ipython"),
        "TERM": "xterm",
        "NO_COLOR": "1",
    }


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "vfiopy", *words]


# --- shell ---


@pytest.mark.parametrize("kind", ["ipython", "plain", "without IPython"])
def test_a_shell_has_the_names_and_reads_nothing(kind: str, board: tuple[str, Board], tmp_path: Path) -> None:
    target, device = board
    words = command("shell", target, *(["--plain"] if kind == "plain" else []))
    if kind == "without IPython":
        program = "import sys; sys.modules['IPython'] = None; from vfiopy.cli.main import main; main()"
        words = [sys.executable, "-c", program, "shell", target]
    typed = (
        "print('before', device.name)\n"
        "names = (device.bars is bars, bars[0] is bar0, device.config is config, device.dma is dma)\n"
        "print(names, device.irqs is irqs, np.__name__, vfiopy.__name__)\n"
        "bar0.write32(0x10, 0x1234)\n"
        "device.bus_master = True\n"
    )
    answer = subprocess.run(
        words, input=typed, capture_output=True, text=True, check=True, env=environment(tmp_path), timeout=60
    )
    said = answer.stdout + answer.stderr
    assert "bar0 " in said
    assert "nothing was read of it" in said
    assert ("In [1]" in said) == (kind == "ipython")
    assert ("pip install 'vfiopy[shell]'" in said) == (kind == "without IPython")
    assert "(True, True, True, True) True numpy vfiopy" in said
    assert device.taken() == [("w", 0x10, 4, 0x1234)]
    with vfiopy.open(target) as again:  # it was let go
        assert not again.bus_master


def test_a_shell_with_a_map(tmp_path: Path) -> None:
    answer = subprocess.run(
        command("shell", EDU, "--plain", "--map", RDL),
        input="print(regs.identification.magic.read())\nimport sys; sys.exit(3)\n",
        capture_output=True,
        text=True,
        check=True,
        env=environment(tmp_path),
        timeout=60,
    )
    assert "237" in answer.stdout


# --- run ---


@pytest.fixture
def script(tmp_path: Path) -> Path:
    (tmp_path / "beside.py").write_text("WORD = 'beside'\n")
    path = tmp_path / "script.py"
    path.write_text(
        "import sys\n"
        "import beside\n"
        "def fail():\n"
        "    raise ValueError('mine')\n"
        "device.bars[0].write32(0x10, 7)\n"
        "print(__name__, sys.argv[1:], sys.argv[0] == __file__, device.name, vfiopy.__name__, beside.WORD)\n"
        "if '--fail' in sys.argv: fail()\n"
        "if '--gone' in sys.argv: device.bars[5]\n"
        "if '--interrupt' in sys.argv: raise KeyboardInterrupt\n"
        "if '--text' in sys.argv: sys.exit('that was it')\n"
        "sys.exit(len(sys.argv) - 1)\n"
    )
    return path


def run(script: Path, target: str, *words: str) -> tuple[int, str, str]:
    answer = subprocess.run(
        command("run", str(script), target, *words),
        capture_output=True,
        text=True,
        check=False,
        env=environment(script.parent),
        timeout=60,
    )
    return answer.returncode, answer.stdout, answer.stderr


def test_a_script_sees_the_device_and_its_own_arguments(board: tuple[str, Board], script: Path) -> None:
    target, device = board
    status, out, err = run(script, target, "--json", "-x", "a b")
    assert (status, err) == (3, "")
    assert out == f"__main__ ['--json', '-x', 'a b'] True {target} vfiopy beside\n"
    assert device.taken() == [("w", 0x10, 4, 7)]


def test_how_a_script_ends(board: tuple[str, Board], script: Path) -> None:
    target, _ = board
    status, _, err = run(script, target, "--fail")
    assert status == 1
    lines = err.splitlines()
    assert lines[0] == "Traceback (most recent call last):"
    assert lines[1] == f'  File "{script}", line 7, in <module>'
    assert lines[-1] == "ValueError: mine"
    assert "runpy" not in err
    status, _, err = run(script, target, "--gone")
    assert status == 1
    assert "NotSupportedError" in err
    assert run(script, target, "--interrupt")[0] == 130
    assert run(script, target, "--text")[0::2] == (1, "that was it\n")
    script.write_text("def broken(:\n")
    status, _, err = run(script, target)
    assert status == 1
    assert "SyntaxError" in err
    assert "runpy" not in err
    with vfiopy.open(target):  # it was let go each time
        pass


def test_a_script_that_is_not_there() -> None:
    answer = runner.invoke(app, ["run", "/nonexistent.py", EDU])
    assert answer.exit_code == 2


# --- watch ---


def test_a_line_for_each_change_in_a_pipe(board: tuple[str, Board]) -> None:
    target, device = board
    words = command("watch", target, "bar0", "0x10", "0x14", "--interval", "0.02")
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=environment(Path("/tmp"))) as watcher:
        assert watcher.stdout is not None
        lines = [watcher.stdout.readline().split() for _ in range(2)]
        assert [line[1:] for line in lines] == [["0x0010", "0x00000000"], ["0x0014", "0x00000000"]]
        device.values[0x14] = 5
        assert watcher.stdout.readline().split()[1:] == ["0x0014", "0x00000000", "->", "0x00000005"]
        watcher.send_signal(signal.SIGINT)
        assert watcher.wait(10) == 0
    assert {entry[:3] for entry in device.taken()} == {("r", 0x10, 4), ("r", 0x14, 4)}
    with vfiopy.open(target):  # it was let go
        pass


def test_watching_by_name_and_as_json(board: tuple[str, Board]) -> None:
    answer = runner.invoke(
        app, ["watch", EDU, "bar0", "status", "dma", "--map", RDL, "--times", "2", "--interval", "0.01"]
    )
    assert answer.exit_code == 0, answer.output
    names = [line.split()[1] for line in answer.stdout.splitlines()]
    assert names == ["status", "dma.source", "dma.destination", "dma.count", "dma.command"]
    answer = runner.invoke(app, ["watch", EDU, "config", "command", "--times", "1", "--json"])
    assert json.loads(answer.stdout)["value"] == 2


def on_a_terminal(words: list[str], tmp_path: Path, until: str, columns: int = 80) -> tuple[str, int]:
    """What a command writes to a terminal until it says something; then Ctrl-C."""
    process, fd = pty.fork()
    if not process:
        os.execve(words[0], words, {**environment(tmp_path), "COLUMNS": str(columns), "LINES": "30"})
    said = ""
    deadline = time.monotonic() + 30
    try:
        while until not in said and time.monotonic() < deadline:
            if select.select([fd], [], [], 0.1)[0]:
                said += os.read(fd, 65536).decode(errors="replace")
        os.write(fd, b"\x03")
        while True:
            said += os.read(fd, 65536).decode(errors="replace")
    except OSError:  # EIO: it closed the terminal
        pass
    finally:
        os.close(fd)
        status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    return said, status


def test_a_table_on_a_terminal(tmp_path: Path) -> None:
    words = command("watch", EDU, "bar0", "identification", "status", "--map", RDL, "--interval", "0.05")
    said, status = on_a_terminal(words, tmp_path, "look 3;")
    assert status == 0
    assert "emulated:edu bar0, every 0.05 s" in said
    assert "major=1 magic=0xed" in said
    said, status = on_a_terminal([*words, "--changes"], tmp_path, "status  0x")
    assert status == 0
    assert "look" not in said

"""``vfiopy trace`` on whole programs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import textwrap
import warnings
from pathlib import Path

import pytest
from json_schema import check_schema
from test_trace import check_chrome_trace

import vfiopy
from vfiopy.trace.event import KINDS

ROOT = Path(__file__).parents[2]
EDU = ROOT / "examples" / "edu.py"


def run(*arguments: str | Path, **more: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "default", **more}
    return subprocess.run(
        [sys.executable, "-m", "vfiopy", *arguments],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
        env=environment,
    )


def program(folder: Path, text: str) -> Path:
    path = folder / "program.py"
    begin = "import vfiopy\ndevice = vfiopy.open('emulated:edu')\nbar = device.bars[0]\n"
    path.write_text(begin + textwrap.dedent(text))
    return path


def test_the_example_as_text() -> None:
    answer = run("trace", EDU, "emulated:edu")
    assert answer.returncode == 0
    assert "9 of 9 checks passed" in answer.stdout
    assert "write   bar0+0x4/4 <- 0x12345678" in answer.stderr
    assert "edu.py:" in answer.stderr
    assert "more of the same" in answer.stderr
    assert answer.stderr.splitlines()[-1].endswith(" events")
    assert "LOST" not in answer.stderr


def test_a_command_and_a_perfetto_file(tmp_path: Path) -> None:
    out = tmp_path / "edu.json"
    answer = run("trace", "--out", out, "--", sys.executable, str(EDU), "emulated:edu")
    assert answer.returncode == 0
    assert f"events in {out}" in answer.stderr
    events = check_chrome_trace(out.read_text())
    assert any(event["name"].startswith("irq msi taken") for event in events)


def test_json_and_a_filter(tmp_path: Path) -> None:
    path = program(
        tmp_path,
        """
        print("hello")
        bar.read32(0)
        bar.write32(4, 1)
        device.bus_master = True
        device.close()
        """,
    )
    answer = run("trace", "--json", "--filter", "bar0:4", path)
    first, *events, last = [json.loads(line) for line in answer.stdout.splitlines()]
    assert first["kind"] == "begin"
    assert first["program"][-1] == str(path)
    assert [event["kind"] for event in events] == ["open", "write", "close"]
    assert last == {"kind": "end", "events": 3, "lost": 0}
    assert "hello" in answer.stderr


def test_the_exit_status_and_a_device_that_is_never_closed(tmp_path: Path) -> None:
    path = program(tmp_path, "bar.write32(4, 7)\nimport sys\nsys.exit(5)")
    out = tmp_path / "trace.jsonl"
    answer = run("trace", "--out", out, path)
    assert answer.returncode == 5
    assert [json.loads(line)["kind"] for line in out.read_text().splitlines()] == ["begin", "open", "write", "end"]


def test_a_program_that_is_killed(tmp_path: Path) -> None:
    path = program(tmp_path, "bar.write32(4, 7)\nimport os\nos.kill(os.getpid(), 9)")
    answer = run("trace", "--json", "--sync", path)
    assert answer.returncode == 128 + signal.SIGKILL
    kinds = [json.loads(line)["kind"] for line in answer.stdout.splitlines()]
    assert kinds == ["begin", "open", "write", "lost", "end"]
    assert "ended without closing its trace" in answer.stdout


def test_processes_that_a_program_starts(tmp_path: Path) -> None:
    path = program(
        tmp_path,
        """
        import os
        device.close()
        pid = os.fork()
        with vfiopy.open("emulated:edu") as mine:
            mine.bars[0].write32(4, 1 if pid else 2)
        if pid:
            os.waitpid(pid, 0)
        """,
    )
    answer = run("trace", "--json", "--filter", "bar0", path)
    events = [json.loads(line) for line in answer.stdout.splitlines()]
    assert sorted(event["value"] for event in events if event["kind"] == "write") == [1, 2]


def test_only_one_device(tmp_path: Path) -> None:
    path = program(tmp_path, "bar.read32(0)")
    answer = run("trace", "--device", "0000:00:05.0", path)
    assert answer.returncode == 0
    assert "opened no device" in answer.stderr


def test_schema_of_json(tmp_path: Path) -> None:
    path = program(
        tmp_path,
        """
        from contextlib import suppress

        from vfiopy.drivers.edu import EduDriver

        edu = EduDriver(device)
        device.bus_master = True
        edu.enable_interrupts()
        edu.factorial(5)
        buffer = device.dma.allocate(4096)
        buffer[0] = 1
        edu.load(buffer.iova, 64)
        buffer.free()
        bar.poll32(0, 0, 0, 1.0)
        with suppress(vfiopy.AddressRangeError):
            bar.read32(bar.size)
        with suppress(vfiopy.NotMappedError):
            device.space.unmap(0x7000)
        device.space.unmap(0x7000, 4096)
        """,
    )
    answer = run("trace", "--json", "--contents", path)
    first, *events, last = [json.loads(line) for line in answer.stdout.splitlines()]
    seen = {kind: [event for event in events if event["kind"] == kind] for kind in KINDS}
    # those that a program that runs through does not have
    assert {kind for kind, some in seen.items() if not some} == {"hold", "reset", "lost", "close"}
    check_schema("trace", {"format": first["format"], "begin": first, "events": seen, "end": last})


@pytest.mark.parametrize(
    ("arguments", "status", "text"),
    [
        (["--filter", "bar9", "x.py"], 2, "is no place"),
        (["--json", "--out", "x", "x.py"], 2, "--json writes JSON lines"),
        (["/no/such/command"], 1, "/no/such/command: no script or command"),
        (["no_such.py"], 1, "no_such.py: no script or command"),
        (["--out", "/no/such/folder/x", str(EDU)], 1, "/no/such/folder/x: No such file or directory"),
        ([], 2, "Missing argument"),
    ],
)
def test_bad_usage(arguments: list[str], status: int, text: str) -> None:
    answer = run("trace", *arguments, COLUMNS="200")
    assert answer.returncode == status
    assert text in answer.stderr


def test_a_path_in_the_environment(tmp_path: Path) -> None:
    path = program(tmp_path, "bar.read32(0)")
    out = tmp_path / "trace.jsonl"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "VFIOPY_TRACE": str(out)}
    subprocess.run([sys.executable, path], check=True, env=environment, timeout=60)
    assert [json.loads(line)["kind"] for line in out.read_text().splitlines()] == ["begin", "open", "read", "end"]


def test_nobody_listens(tmp_path: Path) -> None:
    path = program(tmp_path, "print(hex(bar.read32(0)))")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "VFIOPY_TRACE": f"unix:{tmp_path}/gone"}
    answer = subprocess.run(
        [sys.executable, path], check=True, env=environment, timeout=60, capture_output=True, text=True
    )
    assert answer.stdout == "0x10000ed\n"
    assert "emulated:edu is not traced" in answer.stderr


def test_an_older_trace_survives_a_command_that_cannot_be_run(tmp_path: Path) -> None:
    out = tmp_path / "trace.jsonl"
    out.write_text("precious")
    assert run("trace", "--out", out, "/no/such/command").returncode == 1
    assert out.read_text() == "precious"


PATIENT = """
import os, pathlib, socket, sys, time
bar.write32(4, 1)
{}
time.sleep(0.5)
for _ in range(1000):
    bar.read32(0)
device.close()
print("went on")
sys.exit(4)
"""


def test_a_program_outlives_a_sink_that_fails(tmp_path: Path) -> None:
    # the pipe's reader is gone before the first event comes: as with | head -1
    path = program(tmp_path, PATIENT.format(""))
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    for options, stream in ((["--json"], "stdout"), ([], "stderr")):
        reader, writer = os.pipe()
        files = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, stream: writer}
        with subprocess.Popen(
            [sys.executable, "-m", "vfiopy", "trace", *options, path], text=True, env=environment, **files
        ) as process:
            os.close(writer)
            if options:
                os.read(reader, 10)
            os.close(reader)
            out, err = process.communicate(timeout=60)
        assert process.returncode == 4
        assert "went on" in (out or "") + (err or "")
        if options:
            assert "Broken pipe" in err
            assert "events were lost" in err
            assert "Traceback" not in err


def test_a_full_disk_is_told_before_the_program_is_run(tmp_path: Path) -> None:
    path = program(tmp_path, "print('ran')")
    before = set(Path(tempfile.gettempdir()).glob("vfiopy-trace-*"))
    answer = run("trace", "--out", "/dev/full", "--format", "jsonl", path, TMPDIR=str(tmp_path))
    assert answer.returncode == 1
    assert answer.stderr == "vfiopy: /dev/full: No space left on device\n"
    assert not answer.stdout
    assert set(Path(tempfile.gettempdir()).glob("vfiopy-trace-*")) == before
    assert not list(tmp_path.glob("vfiopy-trace-*"))


def test_who_writes_nonsense_into_the_socket_is_not_listened_to(tmp_path: Path) -> None:
    path = program(
        tmp_path,
        PATIENT.format(
            """
            channel = socket.socket(socket.AF_UNIX)
            channel.connect(os.environ["VFIOPY_TRACE"].removeprefix("unix:"))
            channel.sendall(b"nonsense\\n")
            """.replace("\n            ", "\n")
        ),
    )
    answer = run("trace", "--json", path)
    assert answer.returncode == 4
    assert "went on" in answer.stderr
    last = json.loads(answer.stdout.splitlines()[-1])
    assert last == {"kind": "end", "events": 1000 + 4, "lost": 0}


def test_who_ends_the_trace_ends_the_program(tmp_path: Path) -> None:
    path = program(tmp_path, "bar.write32(4, 1)\nprint('begun', flush=True)\nimport time\ntime.sleep(50)")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)}
    out = tmp_path / "trace.jsonl"
    with subprocess.Popen(
        [sys.executable, "-m", "vfiopy", "trace", "--sync", "--out", out, path],
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "begun\n"
        process.terminate()
        assert process.stdout.read() == "", "the program holds the other end of the pipe until it ends"
        assert process.wait(20) == 128 + signal.SIGTERM
    assert not list(tmp_path.glob("vfiopy-trace-*"))
    assert [json.loads(line)["kind"] for line in out.read_text().splitlines()][-2:] == ["lost", "end"]


# --- VFIOPY_TRACE by hand ---


def python(path: Path, **more: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "default", **more}
    return subprocess.run(
        [sys.executable, path], capture_output=True, text=True, timeout=100, check=False, env=environment
    )


def test_each_process_has_a_file_of_its_own(tmp_path: Path) -> None:
    path = program(
        tmp_path,
        """
        import os, subprocess, sys
        bar.write32(4, 1)
        if "CHILD" not in os.environ:
            subprocess.run([sys.executable, __file__], env={**os.environ, "CHILD": "1"}, check=True)
        bar.write32(4, 2)
        device.close()
        """,
    )
    for _ in range(2):  # what was there before is not overwritten either
        answer = python(path, VFIOPY_TRACE=str(tmp_path / "trace.jsonl"))
        assert answer.returncode == 0
        assert not answer.stderr
    files = sorted(tmp_path.glob("trace*.jsonl"))
    assert len(files) == 4
    assert tmp_path / "trace.jsonl" in files
    for file in files:
        records = [json.loads(line) for line in file.read_text().splitlines()]
        assert len({record["thread"] for record in records if "thread" in record}) == 1
        assert [record["value"] for record in records if record["kind"] == "write" and record["region"] == "bar0"] == [
            1,
            2,
        ]
        assert records[-1]["lost"] == 0


def test_options_that_are_none_are_told(tmp_path: Path) -> None:
    path = program(tmp_path, "print(hex(bar.read32(0)))")
    for options in ("[]", '{"only": 3}', "nonsense"):
        answer = python(path, VFIOPY_TRACE=str(tmp_path / "trace.jsonl"), VFIOPY_TRACE_OPTIONS=options)
        assert answer.returncode == 0
        assert answer.stdout == "0x10000ed\n"
        assert "emulated:edu is not traced" in answer.stderr
        assert f"{path}:2" in answer.stderr, "the line that opens the device"


def test_a_device_is_closed_where_the_warning_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VFIOPY_TRACE", str(tmp_path / "no folder" / "trace.jsonl"))
    with vfiopy.AddressSpace("mine") as space:
        with pytest.raises(RuntimeWarning, match="is not traced"), warnings.catch_warnings(action="error"):
            vfiopy.open("emulated:edu", space=space)
        assert not list(space.members())

"""Following a guest: here a shell that plays one, on the real sockets."""

from __future__ import annotations

import contextlib
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import lab_import  # noqa: F401
import pytest

from tools._lab.console import Console
from tools._lab.watch import BOOT_FAILED, HUNG, KERNEL_COMPLAINED, Outcome, Watch

NAMES = ("console", "monitor", "ctl", "out", "err")


@contextlib.contextmanager
def guest(script: str, folder: Path) -> Iterator[Watch]:
    """A shell whose descriptors are the guest's ports: $console, $ctl, $out, $err."""
    pairs = {name: socket.socketpair() for name in NAMES}
    far = {name: pair[1] for name, pair in pairs.items()}
    process = subprocess.Popen(
        ["/bin/bash", "-c", script],
        env={name: str(end.fileno()) for name, end in far.items()},
        pass_fds=[end.fileno() for end in far.values()],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    console = Console(folder / "console.log")
    try:
        for end in far.values():
            end.close()
        yield Watch(process, {name: pair[0] for name, pair in pairs.items()}, console, stacks_seconds=0.2)
    finally:
        process.kill()
        process.wait()
        assert process.stdout
        process.stdout.close()
        console.close()
        for near, _ in pairs.values():
            near.close()


def follow(script: str, folder: Path, *, timeout: float = 30.0, idle: float = 30.0) -> Outcome:
    with guest(script, folder) as watch:
        return watch.follow(timeout, idle)


def test_status_and_both_streams_come_back(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    outcome = follow(
        "echo start >&$ctl; echo to out >&$out; echo to err >&$err; echo exit 3 >&$ctl; exec sleep 60", tmp_path
    )
    assert (outcome.status, outcome.booted, outcome.problem, outcome.code) == (3, True, "", 3)
    assert capfd.readouterr() == ("to out\n", "to err\n")


def test_much_output_arrives_whole(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    outcome = follow("echo start >&$ctl; seq 200000 >&$out; echo exit 0 >&$ctl; exec sleep 60", tmp_path)
    assert outcome.code == 0
    assert capfd.readouterr().out.splitlines() == [str(number) for number in range(1, 200001)]


def test_a_qemu_that_says_much_is_not_stopped_by_it(tmp_path: Path) -> None:
    script = "echo start >&$ctl; seq 200000; echo exit 0 >&$ctl; exec sleep 60"  # far more than a pipe takes
    assert follow(script, tmp_path).code == 0
    outcome = follow("echo start >&$ctl; seq 200000; echo the reason", tmp_path)
    assert outcome.problem.startswith("the guest ended by itself during the job; QEMU said: ")
    assert outcome.problem.endswith("; 200000; the reason")


def test_silence_is_cut_off_and_the_console_is_shown(tmp_path: Path) -> None:
    outcome = follow("echo start >&$ctl; echo last words >&$console; exec sleep 60", tmp_path, idle=1.0)
    assert outcome.code == HUNG
    assert outcome.problem == "no output for 1 s"
    assert "last words" in outcome.tail


def test_console_noise_does_not_count_as_a_sign_of_life(tmp_path: Path) -> None:
    script = "echo start >&$ctl; while echo noise >&$console; do sleep 0.1; done"
    assert follow(script, tmp_path, idle=1.0).problem == "no output for 1 s"


def test_time_limit(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    outcome = follow("echo start >&$ctl; while echo busy >&$out; do sleep 0.1; done", tmp_path, timeout=1.0)
    assert (outcome.code, outcome.problem) == (HUNG, "the job took longer than 1 s")


def test_guest_that_dies_before_the_job(tmp_path: Path) -> None:
    outcome = follow("echo no such device; echo panic text >&$console; exit 1", tmp_path)
    assert outcome.code == BOOT_FAILED
    assert outcome.problem == "the guest ended by itself before the job; QEMU said: no such device"
    assert outcome.tail == ["panic text"]


def test_guest_that_dies_during_the_job(tmp_path: Path) -> None:
    outcome = follow("echo start >&$ctl; sleep 0.2; exit 0", tmp_path)
    assert (outcome.code, outcome.problem) == (HUNG, "the guest ended by itself during the job")


@pytest.mark.parametrize(
    ("status", "complaints", "code"),
    [(0, [], 0), (0, ["BUG: x"], KERNEL_COMPLAINED), (5, ["BUG: x"], 5), (None, ["BUG: x"], KERNEL_COMPLAINED)],
)
def test_exit_code(status: int | None, complaints: list[str], code: int) -> None:
    assert Outcome(status=status, booted=True, complaints=complaints).code == code

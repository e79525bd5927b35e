"""Boots the guest, runs one job in it, brings everything back and leaves nothing behind."""

from __future__ import annotations

import dataclasses
import os
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .console import Console
from .errands import Errands
from .machines import Machine
from .paths import TREE, cache, say, scratch
from .process import dies_with_us
from .served import Servers
from .watch import Outcome, Watch

__all__ = ["Job", "run_job"]

INIT = Path(__file__).resolve().with_name("init.sh")
NINE_P = "trans=virtio,version=9p2000.L,msize=512000"
COVERED = ("/run", "/tmp", "/var/tmp", "/dev")
"""Where the guest mounts a tmpfs; what it needs from below these is shared by name."""

PASSED_ON = ("CI", "TERM", "COLUMNS", "LINES", "FORCE_COLOR", "NO_COLOR", "PY_COLORS", "PYTEST_ADDOPTS")
PASSED_ON_PREFIXES = ("VFIOPY_", "HYPOTHESIS_")


@dataclasses.dataclass
class Job:
    """What to run in the guest."""

    command: list[str]
    """Program and arguments. The guest sees the host's files under the same paths, read-only."""
    folder: Path = TREE
    """Where it starts."""
    environment: dict[str, str] = dataclasses.field(default_factory=dict)
    bind: tuple[str, ...] = ()
    """Addresses of functions to give to vfio-pci first."""
    interactive: bool = False
    """A terminal of its own, joined to ours, instead of separate output and error streams."""
    timeout: float = 900.0
    """Seconds for the command."""
    idle: float = 300.0
    """Seconds without any output after which the guest counts as hung."""
    out: Path | None = None
    """Receives what the command leaves in ``$VFIOPY_LAB_OUT``."""


def _shares() -> list[tuple[str, Path]]:
    """(mount tag, path) of the host folders that the guest sees beside the root."""
    wanted = [("tree", TREE), ("cache", cache()), ("python", Path(sys.base_prefix))]
    return [
        (tag, path.resolve())
        for tag, path in wanted
        if tag == "tree" or any(path.resolve().is_relative_to(covered) for covered in COVERED)
    ]


def _script(job: Job, machine: Machine) -> str:
    """Text of the shell script that is the guest's job."""
    environment = {
        "PATH": f"{TREE}/.venv/bin:{os.environ.get('PATH', '/usr/bin:/bin')}:/usr/sbin:/sbin",
        "HOME": "/tmp/home",
        "LANG": "C.UTF-8",
        "XDG_CACHE_HOME": str(cache().parent),
        "PYTHONDONTWRITEBYTECODE": "1",
        "HYPOTHESIS_STORAGE_DIRECTORY": "/tmp/hypothesis",
        "VFIOPY_LAB": machine.name,
        "VFIOPY_LAB_OUT": "/run/lab/out",
    }
    for name, value in os.environ.items():
        if name in PASSED_ON or name.startswith(PASSED_ON_PREFIXES):
            environment.setdefault(name, value)
    environment.update(job.environment)

    # Somebody at a prompt edits files on the host and expects to see them; a batch run wants speed.
    caching = "none" if job.interactive else "loose"
    lines = ["#!/bin/sh"]
    for tag, path in _shares():
        where = shlex.quote(str(path))
        options = f"ro,{NINE_P},cache={caching}"
        lines += [f"mkdir -p {where} 2>/dev/null", f"mount -t 9p -o {options} {tag} {where} || exit 125"]
    lines += [f"export {name}={shlex.quote(value)}" for name, value in environment.items()]
    if job.interactive and sys.stdout.isatty():
        size = os.get_terminal_size(sys.stdout.fileno())
        lines.append(f"stty rows {size.lines} cols {size.columns}")
    for address in job.bind:
        function = f"/sys/bus/pci/devices/{address}"
        lines.append(f"echo vfio-pci > {function}/driver_override || exit 125")
        lines.append(f"[ ! -e {function}/driver ] || echo {address} > {function}/driver/unbind")
        lines.append(f"echo {address} > /sys/bus/pci/drivers_probe || exit 125")
    lines += ['mkdir -p "$HOME"', f"cd {shlex.quote(str(job.folder))} || exit 125"]
    lines += [f"exec {shlex.join(job.command)}"]
    return "\n".join(lines) + "\n"


@contextmanager
def _qemu(command: list[str], sockets: dict[str, socket.socket]) -> Iterator[subprocess.Popen[bytes]]:
    """QEMU with the far ends of ``sockets``; killed when the block ends."""
    process = subprocess.Popen(
        dies_with_us(command),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        pass_fds=[far.fileno() for far in sockets.values()],
        start_new_session=True,
    )
    try:
        for far in sockets.values():
            far.close()
        yield process
    finally:
        process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


def _plumbing(job: Job, run: Path, far: dict[str, socket.socket]) -> list[str]:
    """QEMU arguments for serial port, monitor, named ports and shared folders."""
    arguments = ["-device", "virtio-serial-pci,addr=18.0,max_ports=8"]
    for name, end in far.items():
        arguments += ["-chardev", f"socket,id={name},fd={end.fileno()}"]
    arguments += ["-serial", "chardev:console", "-monitor", "chardev:monitor", "-mon", "chardev=qmp,mode=control"]
    for name in ("ctl", "out", "err", "errands"):
        arguments += ["-device", f"virtserialport,chardev={name},name={name}"]
    if job.interactive:
        arguments += ["-device", "virtconsole,chardev=tty,name=tty"]
    shares = [("/dev/root", Path("/"), True), ("lab", run / "share", False)]
    shares += [(tag, path, True) for tag, path in _shares()]
    for number, (tag, path, readonly) in enumerate(shares):
        options = f"security_model=none,multidevs=remap{',readonly=on' if readonly else ''}"
        arguments += ["-fsdev", f"local,id=fs{number},path={str(path).replace(',', ',,')},{options}"]
        arguments += ["-device", f"virtio-9p-pci,fsdev=fs{number},mount_tag={tag},addr={0x19 + number:x}.0"]
    return arguments


def run_job(job: Job, machine: Machine, *, qemu: list[str], kernel: Path, log: Path) -> Outcome:
    """Boot ``machine`` with ``kernel``, run ``job``, return how it went; the console goes to ``log``.

    ``qemu`` is its command line up to and including the accelerator.
    """
    watched = ["console", "monitor", "ctl", "out", "err"] + (["tty"] if job.interactive else [])
    with scratch("run") as run:
        share = run / "share"
        (share / "out").mkdir(parents=True)
        (share / "job.sh").write_text(_script(job, machine))
        if job.interactive:
            (share / "interactive").touch()
        pairs = {name: socket.socketpair() for name in (*watched, "errands", "qmp")}
        near = {name: pair[0] for name, pair in pairs.items()}
        far = {name: pair[1] for name, pair in pairs.items()}
        # no_timer_check: on a busy host the emulated timer comes too late for the kernel's check of it, which panics
        cmdline = (
            "console=ttyS0 no_timer_check root=/dev/root rootfstype=9p ro "
            f"rootflags={NINE_P},cache=loose init={INIT} panic=-1 oops=panic nokaslr mitigations=off "
            f"vfiopy.lab={machine.name} {machine.cmdline}"
        )
        command = [*qemu, "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]
        command += [
            *machine.arguments(run),
            *_plumbing(job, run, far),
            "-kernel",
            str(kernel),
            "-append",
            cmdline,
        ]
        console = Console(run / "console.log")  # two guests at once must not write one file
        try:
            with (
                Servers(machine.serves, run) as servers,
                _qemu(command, far) as process,
                Errands(near["errands"], near["qmp"], servers, run),
            ):
                ends = {name: near[name] for name in watched}
                outcome = Watch(process, ends, console, slowness=machine.slowness).follow(job.timeout, job.idle)
        finally:
            console.close()
            log.parent.mkdir(parents=True, exist_ok=True)
            (run / "console.log").replace(log)
            for end in near.values():
                end.close()
        _collect(share, job, outcome, console)
        return outcome


def _collect(share: Path, job: Job, outcome: Outcome, console: Console) -> None:
    """Bring back the job's files and everything the kernel said."""
    outcome.complaints = list(console.complaints)
    leaks = share / "kmemleak"
    if leaks.exists() and leaks.stat().st_size:
        outcome.complaints += leaks.read_text(errors="replace").splitlines()
    if job.out is not None:
        try:
            shutil.copytree(share / "out", job.out, dirs_exist_ok=True)
        except OSError as error:
            say(f"cannot bring back the job's files: {error}")

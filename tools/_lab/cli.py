"""Command line of tools/lab."""

from __future__ import annotations

import argparse
import contextlib
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from .accel import accelerator
from .guest import Job, run_job
from .kernel import FLAVOURS, cached_kernel, ensure_kernel
from .machines import DEFAULT, MACHINES
from .paths import TREE, LabError, cache, place, say
from .process import signals_unwind
from .qemu import ensure_qemu
from .watch import Outcome

__all__ = ["main"]

WARM_UP_SECONDS = 60
PYTEST = ["-m", "pytest", "-p", "no:cacheprovider"]


def _address(text: str) -> str:
    """A PCI address in full, as the guest's sysfs names it."""
    if re.fullmatch(r"[0-9a-f]{4}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-7]", text) is None:
        raise argparse.ArgumentTypeError(f"{text}: not a PCI address like 0000:00:04.0")
    return text


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="tools/lab", description="A guest with a real kernel and PCI devices.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    kernel = commands.add_parser("kernel", help="build the guest's kernel, or say where it is")
    kernel.add_argument("--flavour", choices=FLAVOURS, default="lab")
    kernel.add_argument("--series", default="", help="build this series (6.1) instead of the newest")
    kernel.add_argument("--update", action="store_true", help="look for a newer source even if one is built")

    commands.add_parser("prepare", help="get everything the default machine needs")
    headers = commands.add_parser("headers", help="print the include folder with the lab kernel's exported headers")
    headers.add_argument("--cached", action="store_true", help="fail if the kernel is not built yet")
    commands.add_parser("qemu", help="print the command that starts the lab's QEMU")
    commands.add_parser("machines", help="list the machine configurations")

    for name, text in (
        ("run", "run a command in the guest"),
        ("pytest", "run pytest in the guest (default: tests/guest)"),
        ("shell", "a shell in the guest; Ctrl-] ends it"),
    ):
        command = commands.add_parser(name, help=text, allow_abbrev=False)
        command.add_argument("--machine", choices=MACHINES, default=DEFAULT.name)
        command.add_argument(
            "--kernel",
            type=Path,
            metavar="IMAGE",
            default=os.environ.get("VFIOPY_LAB_KERNEL"),
            help="boot this bzImage (default: $VFIOPY_LAB_KERNEL, else the lab's own)",
        )
        command.add_argument(
            "--bind",
            type=_address,
            action="append",
            default=[],
            metavar="BDF",
            help="give this function to vfio-pci first",
        )
        if name != "shell":
            command.add_argument("--time-limit", type=float, default=3000.0, metavar="S", help="for the command")
            command.add_argument("--silence-limit", type=float, default=300.0, metavar="S", help="for no output")
            command.add_argument(
                "--out", type=Path, metavar="DIR", help="receives what the job leaves in $VFIOPY_LAB_OUT"
            )
        if name == "pytest":
            command.add_argument("--junit-xml", "--junitxml", type=Path, metavar="FILE", help="write JUnit results")
    return parser


def _boot(job: Job, options: argparse.Namespace) -> Outcome:
    """Get everything ready, run the job, report what the command itself cannot know."""
    if platform.machine() != "x86_64":
        raise LabError(f"the lab's guest shares the host's programs and is x86-64; this host is {platform.machine()}")
    machine = MACHINES[options.machine]
    qemu = ensure_qemu()
    kernel = ensure_kernel(machine.flavour, image=options.kernel)
    accel = accelerator(qemu, kernel.image)
    job.bind = tuple(options.bind)
    if kernel.headers:
        job.environment.setdefault("VFIOPY_LAB_HEADERS", str(kernel.headers))
    say(
        f"machine {machine.name}, kernel {kernel.name}, QEMU {'.'.join(map(str, qemu.version))}, "
        f"{accel[1].partition(',')[0].upper()}"
    )
    log = cache("logs", f"console-{machine.name}.log")
    places = contextlib.nullcontext() if job.interactive else place(os.cpu_count() or 1)
    with places:
        outcome = run_job(job, machine, qemu=[*qemu.command, *accel], kernel=kernel.image, log=log)
    if outcome.problem:
        say("last lines of the guest's console:")
        print(*outcome.tail, sep="\n", file=sys.stderr)
        say(f"{outcome.problem}; the whole console is in {log}")
    if outcome.complaints:
        say(f"the guest's kernel complained ({log}):")
        print(*outcome.complaints, sep="\n", file=sys.stderr)
    say(f"booted in {outcome.boot_seconds:.1f} s, ran {outcome.seconds:.1f} s, exit status {outcome.code}")
    return outcome


def _here() -> Path:
    """The folder to start in: the current one if it is part of the tree."""
    here = Path.cwd()
    return here if here.is_relative_to(TREE) else TREE


def _warm_up(command: list[str]) -> None:
    """Collect the tests on the host: the guest then finds them compiled, with pytest's rewritten assertions.

    The guest cannot write them down for the next time, and rewriting costs it half a minute under TCG.
    What goes wrong here goes wrong in the guest too, where it is shown.
    """
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    with contextlib.suppress(subprocess.TimeoutExpired):
        subprocess.run(
            [*command, "--collect-only", "-q"],
            check=False,
            cwd=_here(),
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=WARM_UP_SECONDS,
        )


def _pytest(options: argparse.Namespace, arguments: list[str]) -> int:
    python = TREE / ".venv" / "bin" / "python"
    if not python.exists():
        raise LabError(f"no {python}: run tools/test unit (or tools/demo) first, it sets the virtual environment up")
    if not any(Path(_here(), argument.split("::")[0]).exists() for argument in arguments if argument[:1] != "-"):
        arguments = ["tests/guest", *arguments] if _here() == TREE else [str(TREE / "tests/guest"), *arguments]
    with tempfile.TemporaryDirectory(prefix="vfiopy-lab-") as folder:
        command = [str(python), *PYTEST, *arguments]
        _warm_up(command)
        command.append("--junit-xml=/run/lab/out/junit.xml")
        limits = {"timeout": options.time_limit, "idle": options.silence_limit}
        job = Job(command, folder=_here(), out=Path(folder), **limits)
        outcome = _boot(job, options)
        results = Path(folder, "junit.xml")
        if options.junit_xml and results.exists():
            options.junit_xml.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(results, options.junit_xml)
        if options.out:
            shutil.copytree(folder, options.out, dirs_exist_ok=True)
    return outcome.code


def _dispatch(options: argparse.Namespace, rest: list[str]) -> int:
    if options.command == "kernel":
        print(ensure_kernel(options.flavour, series=options.series, update=options.update).image)
    elif options.command == "prepare":
        qemu = ensure_qemu()
        accelerator(qemu, ensure_kernel().image)
    elif options.command == "headers":
        known = cached_kernel("lab")
        if known is None and options.cached:
            raise LabError("the lab's kernel is not built yet: tools/lab kernel")
        print((known or ensure_kernel()).headers)
    elif options.command == "qemu":
        print(shlex.join(ensure_qemu().command))
    elif options.command == "machines":
        for machine in MACHINES.values():
            print(f"{machine.name:10} {machine.summary}{' (nightly)' if machine.nightly else ''}")
    elif options.command == "shell":
        shell = Job(["/bin/bash" if Path("/bin/bash").exists() else "/bin/sh", "-i"], folder=_here(), interactive=True)
        return _boot(shell, options).code
    elif options.command == "pytest":
        return _pytest(options, rest)
    else:
        if not rest:
            raise LabError("what shall the guest run? tools/lab run -- COMMAND [ARGUMENT...]")
        return _boot(
            Job(rest, folder=_here(), timeout=options.time_limit, idle=options.silence_limit, out=options.out),
            options,
        ).code
    return 0


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    words = sys.argv[1:] if arguments is None else arguments
    own, rest = (words[: words.index("--")], words[words.index("--") + 1 :]) if "--" in words else (words, [])
    parser = _parser()
    options, unknown = parser.parse_known_args(own)
    if unknown and options.command == "run" and not rest and not unknown[0].startswith("-"):
        rest, unknown = unknown, []
    elif options.command == "pytest":
        rest, unknown = unknown + rest, []
    if unknown or (rest and options.command not in ("run", "pytest")):
        parser.error(f"unknown arguments: {' '.join(unknown or rest)}")
    try:
        with signals_unwind():
            return _dispatch(options, rest)
    except LabError as error:
        say(f"error: {error}")
        return 2
    except KeyboardInterrupt:
        say("interrupted; the guest is gone")
        return 130

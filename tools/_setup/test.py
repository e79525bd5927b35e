"""tools/test: everything that proves vfiopy, from a fresh clone."""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from tools._lab.kernel import cached_kernel
from tools._lab.machines import DEFAULT, MACHINES, Machine
from tools._lab.process import signals_unwind

from .beside import Beside
from .docs import build_command
from .environment import PYTHON, ensure_build, ensure_environment
from .free_threaded import VARIABLE, ensure_free_threaded, find_free_threaded, unit_tests_left_out
from .packages import BUILD, CROSS, GUEST, KERNEL, NATIVE, ensure_packages
from .report import TREE, SetupError, say, step
from .results import Results

__all__ = ["main"]

PARTS = ("lint", "docs", "native", "unit", "free-threaded", "uapi", "guest")
RESULTS = TREE / "build" / "results"
LAB = TREE / "tools" / "lab"
TOOLS = ("-p", "tools._bench", "-p", "tools._docs", "-p", "tools._lab", "-p", "tools._setup", "-p", "tools._uapi")
PURE_C = ("iova", "region", "wire")
SLOW_TEST_SECONDS = 900
NIGHTLY_SECONDS = 7200
GUESTS = 2
"""At a time: as many as the project's machines have cores."""
FUZZ_SECONDS = 20
FUZZ_SECONDS_NIGHTLY = 900

EPILOG = """
parts, in this order (default: all of them):
  lint     ruff, and mypy in strict mode
  docs     docs/ as a site, without a warning; tests/docs: the snippets that need no kernel run
  native   C tests, with sanitizers, and cross-compiled for arm64 under qemu-user; a short fuzz run
  unit     tests/unit: no privileges, no hardware; a short fuzz run of vfio-user's parsers
  free-threaded
           tests/free_threaded, and tests/unit once more, on a CPython without GIL (python3.14t on the PATH, or named by
           VFIOPY_FREE_THREADED); left out where there is none
  uapi     the generated constants against the headers of the lab's kernel
  guest    tests/qemu with the lab's QEMU, tests/guest in its machines (docs/lab.md); builds the kernel the first time
  nightly  all of the above with the long profile, and the machines with other kernels
"""


class Run:
    """One invocation."""

    def __init__(self, *, nightly: bool, guests: bool) -> None:
        """``nightly`` chooses the long profile; ``guests``: their tests are wanted."""
        self.results = Results()
        self.nightly = nightly
        self._environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
        self._kernel: Beside | None = None
        self._machines = [one for one in MACHINES.values() if guests and (nightly or not one.nightly)]
        self._booted: list[tuple[str, Beside]] = []

    def _command(self, *words: str | Path, **environment: str) -> int:
        """Run a command, its output going where ours goes."""
        command = [str(word) for word in words]
        return subprocess.run(
            command, cwd=TREE, env={**self._environment, **environment}, stdin=subprocess.DEVNULL, check=False
        ).returncode

    def _check(self, name: str, *words: str | Path) -> bool:
        self.start_first_guest()
        started = time.monotonic()
        say(f"{name}: {' '.join(str(word) for word in words)}")
        status = self._command(*words)
        note = f"exit status {status}" if status else ""
        self.results.check(name, status == 0, time.monotonic() - started, note)
        return status == 0

    def start_kernel(self) -> None:
        """Build kernel and fetch QEMU beside the other parts, unless they are there."""
        log = RESULTS / "kernel.log"
        say(f"preparing the lab in the background, log: {log.relative_to(TREE)}")
        self._kernel = Beside([sys.executable, LAB, "prepare"], log)

    def wait_for_kernel(self) -> None:
        """Wait for it, showing how far it is.

        Raises :class:`SetupError` if it failed.
        """
        if self._kernel is not None and self._kernel.follow():
            raise SetupError("the lab could not be prepared (see above)")
        self._kernel = None

    def start_first_guest(self) -> None:
        """Boot the first machine beside the other parts once the kernel is there: one core is enough for it."""
        if not self._booted and self._kernel is not None and self._kernel.succeeded:
            self._start_guest()

    def _start_guest(self) -> None:
        if self._machines:
            machine = self._machines.pop(0)
            name = f"guest {machine.name}"
            log = RESULTS / f"{name.replace(' ', '-')}.log"
            say(f"{name} tests in the background, log: {log.relative_to(TREE)}")
            command, environment = self._guest_job(machine)
            self._booted.append((name, Beside(command, log, {**self._environment, **environment})))

    def stop(self) -> None:
        """End what still runs in the background."""
        for _, background in self._booted:
            background.stop()
        if self._kernel is not None:
            self._kernel.stop()

    def lint(self) -> None:
        """Style and types."""
        self._check("ruff", PYTHON, "-m", "ruff", "check", "--no-cache", ".")
        self._check("mypy vfiopy", PYTHON, "-m", "mypy")
        self._check("mypy tools", PYTHON, "-m", "mypy", *TOOLS)

    def docs(self) -> None:
        """The site, and what it shows."""
        self._check("docs site", *build_command())
        self._pytest("docs", PYTHON, "-m", "pytest", "-p", "no:cacheprovider", "-q", "tests/docs")

    def native(self) -> None:
        """C tests as the Makefile of native/tests has them."""
        folder = TREE / "native" / "tests"
        targets = ["check", "asan", "tsan", "arm64"] if (folder / "Makefile").exists() else []
        for target in targets:
            known = subprocess.run(
                ["make", "-C", folder, "-n", target],
                capture_output=True,
                check=False,
                stdin=subprocess.DEVNULL,
            )
            if known.returncode == 0:
                self._check(f"native {target}", "make", "-C", folder, target)
        seconds = FUZZ_SECONDS_NIGHTLY if self.nightly else FUZZ_SECONDS
        self._check("native fuzz", "make", "-C", TREE / "native" / "fuzz", "run", f"SECONDS={seconds}")
        if platform.machine() == "x86_64":
            sources = sorted(path for name in PURE_C for path in (TREE / "native" / name).glob("*.c"))
            flags = ["-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror", "-fsyntax-only", "-Inative"]
            if sources:
                self._check("compiles for arm64", "aarch64-linux-gnu-gcc", *flags, *sources)

    def _pytest(self, name: str, *words: str | Path) -> None:
        """Run one suite."""
        self.start_first_guest()
        say(f"{name} tests")
        started = time.monotonic()
        status = self._command(*words, *self._profile(name, long=self.nightly), **_environment(long=self.nightly))
        self.results.suite(name, _junit(name), status, time.monotonic() - started)

    @staticmethod
    def _profile(name: str, *, long: bool) -> list[str]:
        """Pytest's arguments for the normal profile or the long one."""
        junit = _junit(name)
        junit.parent.mkdir(parents=True, exist_ok=True)
        junit.unlink(missing_ok=True)
        which = ["-o", f"timeout={SLOW_TEST_SECONDS}"] if long else ["-m", "not nightly"]
        return [f"--junit-xml={junit}", *which]

    def unit(self) -> None:
        """Tests that need nothing."""
        self._pytest("unit", PYTHON, "-m", "pytest", "-p", "no:cacheprovider", "-q", "tests/unit")
        self._fuzz_vfio_user()

    def _fuzz_vfio_user(self) -> None:
        """A short fuzz run of what parses a peer's bytes, where there is a fuzzer for this Python."""
        if self._command(PYTHON, "-c", "import importlib.util as u, sys; sys.exit(u.find_spec('atheris') is None)"):
            say("fuzzing vfio-user: left out, atheris is not for this platform")
            return
        seconds = FUZZ_SECONDS_NIGHTLY if self.nightly else FUZZ_SECONDS
        with tempfile.TemporaryDirectory(prefix="vfiopy-fuzz-") as folder:
            limits = (f"-max_total_time={seconds}", f"-artifact_prefix={RESULTS}/", "-verbosity=0")
            self._check("vfio-user fuzz", PYTHON, "tests/fuzz/vfio_user.py", *limits, folder)

    def free_threaded(self) -> None:
        """The same without GIL."""
        interpreter = find_free_threaded()
        if interpreter is None:
            say(f"free-threaded tests: left out, no python3.14t here ({VARIABLE} can name such an interpreter)")
            return
        python = ensure_free_threaded(interpreter)
        what = ("tests/free_threaded", "tests/unit", *(f"--ignore={path}" for path in unit_tests_left_out()))
        self._pytest("free-threaded", python, "-m", "pytest", "-p", "no:cacheprovider", "-q", *what)

    def uapi(self) -> None:
        """Generated constants against the real headers."""
        self.wait_for_kernel()
        kernel = cached_kernel("lab")
        if kernel and kernel.headers:
            self._environment["VFIOPY_LAB_HEADERS"] = str(kernel.headers)
        self._check("uapi", PYTHON, "tools/uapi", "--check")
        # in the unit part these are left out where the kernel was not built yet
        self._pytest("uapi headers", PYTHON, "-m", "pytest", "-p", "no:cacheprovider", "-q", "tests/unit/test_uapi.py")

    def guest(self) -> None:
        """Tests with a real QEMU, and on a real kernel, machine by machine."""
        self._pytest("qemu", PYTHON, "-m", "pytest", "-p", "no:cacheprovider", "-q", "tests/qemu")
        self.wait_for_kernel()
        while self._machines or self._booted:
            while self._machines and len(self._booted) < GUESTS:
                self._start_guest()
            name, guest = self._booted[0]
            say(f"{name} tests")
            status = guest.follow()
            self.results.suite(name, _junit(name), status, guest.seconds)
            del self._booted[0]

    def _guest_job(self, machine: Machine) -> tuple[list[str | Path], dict[str, str]]:
        """The command that tests in one machine, and what the environment says to it."""
        # the long profile once is enough; the other kernels are slow, or there for what they lack
        long = self.nightly and machine is DEFAULT
        command: list[str | Path] = [sys.executable, LAB, "pytest", "--machine", machine.name, "-q"]
        command += self._profile(f"guest {machine.name}", long=long)
        if machine.slowness > 1:
            command += ["-o", f"timeout={SLOW_TEST_SECONDS}"]
        if self.nightly:
            command.append(f"--time-limit={NIGHTLY_SECONDS}")
        return command, _environment(long=long)


def _junit(suite: str) -> Path:
    """Where a suite's results go."""
    return RESULTS / f"{suite.replace(' ', '-')}.xml"


def _environment(*, long: bool) -> dict[str, str]:
    """What says to a suite how long it should be."""
    return {"VFIOPY_PROFILE": "nightly"} if long else {}


def _prepare(parts: Sequence[str], run: Run) -> None:
    """Packages, kernel (in the background), virtual environment, extensions."""
    needs = [BUILD]
    if "native" in parts:
        needs += [NATIVE, CROSS]
    if "guest" in parts:
        needs.append(GUEST)
    lab = bool({"uapi", "guest"} & set(parts))
    if lab and (run.nightly or cached_kernel("lab") is None):
        needs.append(KERNEL)
    with step("system packages"):
        ensure_packages(*needs)
    if lab:
        run.start_kernel()
    with step("virtual environment"):
        ensure_environment("dev")
    with step("extensions"):
        ensure_build()


def main() -> int:
    """Run; the exit status is 0 if everything passed."""
    parser = argparse.ArgumentParser(
        prog="tools/test", epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join((*PARTS, "nightly")))
    options = parser.parse_args()
    if unknown := set(options.parts) - {*PARTS, "nightly"}:
        parser.error(f"unknown part: {', '.join(sorted(unknown))}")
    nightly = "nightly" in options.parts
    parts = [part for part in PARTS if part in options.parts or options.parts in ([], ["nightly"])]
    if platform.machine() != "x86_64" and {"uapi", "guest"} & set(parts):
        say(f"the lab's guest is x86-64, this machine is {platform.machine()}: leaving out uapi and guest")
        parts = [part for part in parts if part not in ("uapi", "guest")]

    started = time.monotonic()
    run = Run(nightly=nightly, guests="guest" in parts)
    try:
        with signals_unwind():
            _prepare(parts, run)
            for part in parts:
                method: Callable[[], None] = getattr(run, part.replace("-", "_"))
                method()
    except SetupError as error:
        print(f"tools/test: {error}", file=sys.stderr)
        run.results.check("set-up", ok=False, seconds=time.monotonic() - started)
    except KeyboardInterrupt:
        print("tools/test: interrupted", file=sys.stderr)
        return 130
    finally:
        run.stop()
    print(run.results.summary(time.monotonic() - started), flush=True)
    return 0 if run.results.ok else 1


if __name__ == "__main__":
    sys.exit(main())

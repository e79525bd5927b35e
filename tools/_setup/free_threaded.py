"""A free-threaded CPython, where this machine has one, with an environment and a build of vfiopy of its own."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

from .environment import COMPILER, requirements
from .report import TREE, SetupError, run, say

__all__ = ["VARIABLE", "ensure_free_threaded", "find_free_threaded", "unit_tests_left_out"]

VARIABLE = "VFIOPY_FREE_THREADED"
"""Names an interpreter that is not on the PATH."""

NAMES = ("python3.15t", "python3.14t")
"""On the PATH. There is no python3.13t: cffi does not install on it."""

VENV = TREE / "build" / "free-threaded"
QUESTION = "import sys, sysconfig; sys.exit(not sysconfig.get_config_var('Py_GIL_DISABLED'))"


def find_free_threaded() -> str | None:
    """The interpreter, or None if there is none here.

    Raises :class:`SetupError` if the variable names something else.
    """
    if named := os.environ.get(VARIABLE):
        answer = subprocess.run([named, "-c", QUESTION], check=False) if shutil.which(named) else None
        if answer is None or answer.returncode:
            raise SetupError(f"{VARIABLE}={named} is no free-threaded Python: name one, or unset it")
        return named
    return next((path for name in NAMES if (path := shutil.which(name))), None)


def ensure_free_threaded(interpreter: str) -> Path:
    """Make its environment and build the extensions for it; returns its Python.

    What the interpreter itself has installed is used: on a new version some packages have to be built by hand.
    """
    python = VENV / "bin" / "python"
    if not python.exists():
        say(f"making {VENV.relative_to(TREE)} with {interpreter}")
        run([interpreter, "-m", "venv", "--clear", "--system-site-packages", VENV], "python -m venv")
    wanted = [*requirements(), "hypothesis", "pytest", "pytest-timeout", "rich", "sortedcontainers"]
    pip: list[str | Path] = [python, "-m", "pip", "--disable-pip-version-check", "-q", "install", "--prefer-binary"]
    run([*pip, *wanted], "pip install")
    output = run([python, "setup.py", "build_ext", "--inplace", "--force"], "building the extensions")
    # cffi itself defines a macro twice for such a build
    complaints = [line for line in output.splitlines() if COMPILER.search(line) and "_CFFI_NO_LIMITED_API" not in line]
    if complaints:
        raise SetupError("the compiler warned:\n" + "\n".join(complaints))
    return python


def unit_tests_left_out() -> list[str]:
    """Unit tests of the command line and of maps: typer's and systemrdl-compiler's own packages do not build there."""
    needs = re.compile(r"^from typer\b|\bsystemrdl\b", re.MULTILINE)
    tests = sorted((TREE / "tests" / "unit").glob("test_*.py"))
    return [
        str(path.relative_to(TREE))
        for path in tests
        if path.name.startswith("test_cli") or needs.search(path.read_text())
    ]

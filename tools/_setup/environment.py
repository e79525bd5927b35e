"""The virtual environment in .venv, and the extensions built in place, without a compiler warning."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import sys
import tomllib

from .report import TREE, SetupError, run, say

__all__ = ["COMPILER", "PYTHON", "ensure_build", "ensure_environment", "requirements"]

VENV = TREE / ".venv"
PYTHON = VENV / "bin" / "python"
PIP = [str(PYTHON), "-m", "pip", "--disable-pip-version-check", "--no-input"]
STAMP = VENV / "vfiopy-setup.json"
# pip's and setuptools' own remarks on a build are not the compiler's
COMPILER = re.compile(r"\.[ch]:\d+(:\d+)?: (warning|error): |\b(cc1|ld|collect2|gcc): .*(warning|error)")


def _stamp() -> dict[str, list[str]]:
    try:
        known = json.loads(STAMP.read_text())
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def _write_stamp(**changes: list[str]) -> None:
    STAMP.write_text(json.dumps({**_stamp(), **changes}, indent=1))


def requirements(*extras: str) -> list[str]:
    """What pyproject.toml asks for: run-time, build and the named extras, references to itself resolved."""
    with (TREE / "pyproject.toml").open("rb") as file:
        project = tomllib.load(file)
    optional = project["project"]["optional-dependencies"]
    wanted = [*project["build-system"]["requires"], *project["project"]["dependencies"]]
    queue = [requirement for extra in extras for requirement in optional[extra]]
    while queue:
        requirement = queue.pop()
        if own := re.fullmatch(r"vfiopy\[([\w,]+)\]", requirement):
            queue += [inner for extra in own[1].split(",") for inner in optional[extra]]
        else:
            wanted.append(requirement)
    return sorted(set(wanted))


def ensure_environment(*extras: str) -> None:
    """Make .venv with this Python, or use the one that is there, and install what is not yet in it."""
    identity = [sys.version, str(TREE)]
    if VENV.exists() and _stamp().get("identity") not in (None, identity):
        say(".venv was made by another Python or elsewhere: making it anew")
        shutil.rmtree(VENV)
    if not PYTHON.exists():
        say(f"making .venv with Python {sys.version.split()[0]}")
        run([sys.executable, "-m", "venv", "--clear", VENV], "python -m venv")
    _write_stamp(identity=identity)
    wanted = requirements(*extras)
    installed = _stamp().get("installed", [])
    missing = [requirement for requirement in wanted if requirement not in installed]
    if missing:
        say(f"installing {len(missing)} Python packages: {' '.join(missing)}")
        run([*PIP, "-q", "install", *missing], "pip install")
        _write_stamp(installed=sorted({*installed, *wanted}))


def _sources_digest() -> str:
    """Digest of everything the extensions are made from."""
    digest = hashlib.sha256(sys.version.encode())
    files = [path for path in (TREE / "native").rglob("*") if path.is_file() and "tests" not in path.parts]
    for path in sorted([*files, TREE / "setup.py", TREE / "pyproject.toml"]):
        if path.suffix not in (".o", ".so", ".pyc"):
            digest.update(str(path.relative_to(TREE)).encode() + path.read_bytes())
    return digest.hexdigest()


def _built() -> bool:
    return all(list((TREE / "vfiopy").glob(f"{name}*.so")) for name in ("_native", "_shim"))


def ensure_build() -> None:
    """Install vfiopy in .venv, editable, its extensions built in the tree; a compiler warning is an error.

    Nothing is done if the sources are those of the last build.
    """
    digest = _sources_digest()
    if _stamp().get("built") == [digest] and _built():
        return
    say("building the extensions")
    options = ["--no-build-isolation", "--no-deps", "-e", str(TREE)]
    output = run([*PIP, "-v", "install", *options], "building the extensions")
    if complaints := [line for line in output.splitlines() if COMPILER.search(line)]:
        raise SetupError("the compiler warned:\n" + "\n".join(complaints))
    _write_stamp(built=[digest])

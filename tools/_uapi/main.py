"""The command line of ``tools/uapi``."""

from __future__ import annotations

import argparse
import difflib
import os
import subprocess
import sys
from pathlib import Path

from .choices import HEADERS, REASONS
from .compare import changes, declared_by, parse_module
from .judge import judge
from .model import Facts, UapiError
from .read import kernel_version, read_names
from .render import render_header, render_module
from .second import Disagreement, disagreements, read_with_ctypesgen

__all__ = ["main"]

_ROOT = Path(__file__).resolve().parents[2]
_MODULE = Path("vfiopy/uapi.py")
_HEADER = Path("native/uapi/vfiopy_uapi.h")

_EPILOG = """
The headers are those that `make headers_install` of a kernel made: --headers, else the folder in
VFIOPY_LAB_HEADERS, else what `tools/lab headers` prints. The C compiler states every number; pycparser
and ctypesgen read the structures; where they may differ, and what is left out, tools/_uapi/choices.py says.
"""


def _headers(given: Path | None) -> Path:
    lab = _ROOT / "tools/lab"
    if given is None and (named := os.environ.get("VFIOPY_LAB_HEADERS")):
        given = Path(named)
    if given is None and lab.exists():
        # May build the kernel first, and says so on stderr.
        run = subprocess.run([str(lab), "headers"], stdout=subprocess.PIPE, text=True, check=False)
        if run.returncode == 0 and run.stdout.strip():
            given = Path(run.stdout.strip().splitlines()[-1])
    if given is None:
        raise UapiError("which kernel's headers? name their folder with --headers, or build the lab's")
    if not (given / "linux").is_dir():
        raise UapiError(f"{given} has no folder linux: not a folder of installed kernel headers")
    return given.resolve()


def read_facts(cc: str, include: Path) -> Facts:
    """Read the headers with both readers and the compiler.

    Raises :class:`UapiError` if ctypesgen disagrees with the compiler without a reason.
    """
    names = [read_names(cc, include, header) for header in HEADERS]
    facts = judge(cc, include, kernel_version(cc, include), names)
    found = disagreements(facts, read_with_ctypesgen(cc, include, list(HEADERS)))
    if unexplained := [str(item) for item in found if item.reason is None]:
        raise UapiError("disagreements without a reason in choices.REASONS:\n  " + "\n  ".join(unexplained))
    used = {item.reason for item in found}
    facts.stale += [f"REASONS {reason}" for reason in REASONS if reason not in used]
    _report(facts, include, found)
    return facts


def _report(facts: Facts, include: Path, found: list[Disagreement]) -> None:
    constants, structs = list(facts.all_constants()), list(facts.all_structs())
    numbers = sum(item.ioctl for item in constants)
    print(f"Linux {facts.version[0]}.{facts.version[1]}, {include}")
    fields = sum(len(item.leaves) for item in structs)
    print(f"  {len(constants) - numbers} constants, {numbers} ioctl numbers")
    print(f"  {len(structs)} structures with {fields} fields")
    print(f"  {len(facts.left_out)} names left out, each with a reason (--left-out)")
    print(f"  ctypesgen disagrees with the compiler in {len(found)} points, each with a reason:")
    for reason, text in REASONS.items():
        print(f"    {sum(item.reason == reason for item in found):3} {text}")


def _check(facts: Facts) -> int:
    committed = parse_module((_ROOT / _MODULE).read_text())
    ours, theirs = ("{}.{}".format(*version) for version in (committed.version, facts.version))
    if facts.version < committed.version:
        # What an older kernel had and later ones took away is nothing vfiopy needs.
        found = changes(declared_by(facts), committed)
        print(f"  {theirs} is older than the committed {ours}, which adds {len(found.added)} things to it")
        return _complain(found.changed, theirs)
    if facts.version > committed.version:
        found = changes(committed, declared_by(facts))
        for line in [*found.added, *(f"no longer applies: {item}" for item in facts.stale)]:
            print(f"  new in {theirs}: {line}")
        return _complain(found.removed + found.changed, ours)
    _refuse_stale(facts)
    status = 0
    for path, text in ((_MODULE, render_module(facts)), (_HEADER, render_header(facts))):
        old = (_ROOT / path).read_text() if (_ROOT / path).exists() else ""
        if old != text:
            status = 1
            lines = difflib.unified_diff(
                old.splitlines(), text.splitlines(), f"{path} (committed)", f"{path} (generated)", lineterm=""
            )
            print("\n".join(lines), file=sys.stderr)
    if status:
        print("uapi: the committed files differ from the headers; remedy: run tools/uapi", file=sys.stderr)
    return status


def _complain(broken: list[str], since: str) -> int:
    for line in broken:
        print(f"  broken since {since}: {line}", file=sys.stderr)
    return 1 if broken else 0


def _refuse_stale(facts: Facts) -> None:
    if facts.stale:
        raise UapiError(f"entries of choices.py that apply to nothing: {', '.join(facts.stale)}")


def main(arguments: list[str] | None = None) -> int:
    """Run; return the exit status: 0, or 1 when something differs or is missing."""
    parser = argparse.ArgumentParser(
        prog="tools/uapi",
        description=f"Generate {_MODULE} and {_HEADER} from a kernel's installed headers.",
        epilog=_EPILOG,
    )
    parser.add_argument("--headers", type=Path, metavar="DIR", help="folder that has linux/vfio.h")
    parser.add_argument("--cc", default=os.environ.get("CC", "cc"), help="C compiler (default: CC, else cc)")
    parser.add_argument(
        "--check",
        action="store_true",
        help="write nothing; fail if the committed files differ; headers of a newer kernel may add",
    )
    parser.add_argument("--left-out", action="store_true", help="list the names left out, with the reason")
    options = parser.parse_args(arguments)
    try:
        facts = read_facts(options.cc, _headers(options.headers))
        if options.left_out:
            print("\n".join(f"  {name}: {reason}" for name, reason in facts.left_out.items()))
        if options.check:
            return _check(facts)
        _refuse_stale(facts)
    except (UapiError, FileNotFoundError) as error:
        print(f"uapi: {error}", file=sys.stderr)
        return 1
    (_ROOT / _MODULE).write_text(render_module(facts))
    (_ROOT / _HEADER).write_text(render_header(facts))
    print(f"  wrote {_MODULE} and {_HEADER}")
    return 0

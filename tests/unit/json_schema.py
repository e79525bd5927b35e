"""One mechanism for the schema of each command's ``--json``: what scripts rely on, committed, and compared.

A snapshot, ``tests/unit/snapshots/COMMAND.json``, maps each path of the answer (``groups[].functions[].address``) to
the types that it may have, and holds the number in ``"format"``. In a test of one's own command::

    from json_schema import check_schema

    def test_schema_of_json(kernel):
        plain = json.loads(runner.invoke(app, ["bind", ADDRESS, "--json"], obj=kernel).stdout)
        check_schema("bind", plain, another, keyed=("allocated",), free=("facts",))

* Give as many answers as it takes to see every key: one test for each command, since all paths of the snapshot have to
  appear. A value that is null or an empty array in one answer wants another answer in which it is not.
* A type may be one of several (``"null, string"``): an answer that has only some of them is right. A path that is new,
  missing, or of another type is a failure: scripts would notice. When it is meant, raise ``"format"`` if a script that
  reads the old answers would break, delete the snapshot and run the test: it writes a new one, fails once and says so.
  Look at it, add types that this machine does not show (a NUMA node is null here), and commit it.
* ``keyed`` names objects whose keys are data (an IRQ's number): the path below is ``allocated.*``.
  ``free`` names values that are nobody's promise: only their own type is compared.

``test_cli_json.py`` finds a command with ``--json`` that has no snapshot.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SNAPSHOTS = Path(__file__).parent / "snapshots"
_TYPES = {bool: "boolean", int: "integer", float: "number", str: "string", list: "array", dict: "object"}


def _walk(value: Any, path: str, keyed: tuple[str, ...], free: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    if path:
        yield path, "null" if value is None else _TYPES[type(value)]
    if path in free:
        return
    if isinstance(value, list):
        for one in value:
            yield from _walk(one, f"{path}[]", keyed, free)
    elif isinstance(value, dict):
        for key, one in value.items():
            name = "*" if path in keyed else key
            yield from _walk(one, f"{path}.{name}" if path else name, keyed, free)


def schema(*answers: Any, keyed: tuple[str, ...] = (), free: tuple[str, ...] = ()) -> dict[str, Any]:
    """Return path → types over all answers, and the format's number."""
    types: dict[str, set[str]] = {}
    for answer in answers:
        for path, kind in _walk(answer, "", keyed, free):
            types.setdefault(path, set()).add(kind)
    (number,) = {answer["format"] for answer in answers}
    return {"format": number, "paths": {path: ", ".join(sorted(kinds)) for path, kinds in sorted(types.items())}}


def check_schema(command: str, *answers: Any, keyed: tuple[str, ...] = (), free: tuple[str, ...] = ()) -> None:
    """Compare the answers of a command with its snapshot; see the module."""
    found = schema(*answers, keyed=keyed, free=free)
    path = SNAPSHOTS / f"{command}.json"
    if not path.exists():
        path.write_text(json.dumps(found, indent=1) + "\n")
        raise AssertionError(f"{path.name} did not exist and was written: look at it, and commit it")
    promised = json.loads(path.read_text())
    assert found["format"] == promised["format"], f"{path.name}: another format number; delete it to write a new one"
    ours, theirs = found["paths"], promised["paths"]
    wrong = [f"{one}: not in {path.name}" for one in sorted(ours.keys() - theirs.keys())]
    wrong += [f"{one}: in {path.name}, in no answer" for one in sorted(theirs.keys() - ours.keys())]
    for one in sorted(ours.keys() & theirs.keys()):
        more = set(ours[one].split(", ")) - set(theirs[one].split(", "))
        if more:
            wrong.append(f"{one}: {', '.join(sorted(more))}, in {path.name} {theirs[one]}")
    assert not wrong, "scripts would notice:\n" + "\n".join(wrong)

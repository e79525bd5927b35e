"""The commands, and what to say where the packages that they need are missing."""

from __future__ import annotations

import sys

from vfiopy.cli import bash_words

__all__ = ["main"]


def main() -> None:
    """Run the command line; exits with 0 for success, 1 when something failed, 2 for bad usage."""
    wanted = sys.argv[1] if len(sys.argv) > 1 else ""
    try:
        from vfiopy.cli.commands import COMMANDS, make_app  # noqa: PLC0415  typer and rich are an extra

        app = make_app([wanted] if wanted in COMMANDS and not bash_words.is_bash() else COMMANDS)
    except ModuleNotFoundError as error:
        if error.name not in ("typer", "rich", "click"):
            raise
        sys.stderr.write(f"the command line needs {error.name}: pip install 'vfiopy[cli]'\n")
        raise SystemExit(2) from None
    if bash_words.is_bash():
        bash_words.complete(app)
    else:
        app()

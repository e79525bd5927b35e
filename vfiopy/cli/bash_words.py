"""Bash splits words at colons before it asks what completes them, and PCI addresses are made of colons.

``complete_bash``, the protocol between bash and the program, hands over the words in ``COMP_WORDS``, a line each, and
the index of the one at the cursor in ``COMP_CWORD``; bash replaces no more than what follows the last colon. So the
words are joined again before typer looks at them, and what bash has already is cut off the answers.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Callable

__all__ = ["complete", "is_bash", "join"]

_VARIABLE = "_VFIOPY_COMPLETE"


def is_bash() -> bool:
    """Whether bash asks for completions."""
    return os.environ.get(_VARIABLE) == "complete_bash"


def join(words: list[str], index: int) -> tuple[list[str], int]:
    """Join what was split at colons; return the words and the index of the one that ``index`` became a part of."""
    joined: list[str] = []
    at = index
    glue = False
    for number, word in enumerate(words):
        colon = bool(word) and not word.strip(":")
        if joined and (glue or colon) and len(joined) > 1:  # never to the program's name
            joined[-1] += word
        else:
            joined.append(word)
        glue = colon
        if number == index:
            at = len(joined) - 1
    return joined, at


def complete(app: Callable[[], object]) -> None:
    """Answer bash: run the application with whole words, and print what follows the last colon that is typed."""
    words, index = join(os.environ.get("COMP_WORDS", "").split("\n"), int(os.environ.get("COMP_CWORD", "0")))
    os.environ["COMP_WORDS"] = "\n".join(words)
    os.environ["COMP_CWORD"] = str(index)
    typed = words[index] if index < len(words) else ""
    has = typed[: typed.rfind(":") + 1]
    answer = io.StringIO()
    try:
        with contextlib.redirect_stdout(answer):
            app()
    finally:
        lines = answer.getvalue().splitlines()
        sys.stdout.write("".join(f"{line.removeprefix(has)}\n" for line in lines))

"""Numbers as people write and read them at a register."""

from __future__ import annotations

import typer

__all__ = ["hexadecimal", "number", "required_number"]


def number(text: str) -> int | None:
    """Return what ``"0x20"``, ``"32"``, ``"0b100000"`` or ``"0x10_0000"`` is; None for what is no number."""
    try:
        return int(text, 0)
    except ValueError:
        return None


def required_number(text: str, what: str) -> int:
    """As :func:`number`, for what has to be one."""
    value = number(text)
    if value is None or value < 0:
        raise typer.BadParameter(f"{text!r} is not a number such as 0x20 or 32", param_hint=what)
    return value


def hexadecimal(value: int, width: int) -> str:
    """All digits that ``width`` bytes have."""
    return f"{value:#0{2 * width + 2}x}"

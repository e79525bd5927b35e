"""What the tests with a real QEMU on the host share: the lab's QEMU, without a guest, driven through qtest."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
for folder in (HERE.parents[1] / "tools", HERE.parent / "unit", HERE):
    sys.path.insert(0, str(folder))

from _lab.paths import LabError  # noqa: E402
from _lab.qemu import Qemu, ensure_qemu  # noqa: E402


@pytest.fixture(scope="session")
def qemu() -> Qemu:
    """The lab's QEMU; fetched if need be."""
    try:
        return ensure_qemu()
    except LabError as error:
        pytest.skip(f"no QEMU that is new enough: {error}")

"""Fixtures of more than one file."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from kernel_fake import FakeVfio

from vfiopy.kernel.ioctl._call import replaced


@pytest.fixture
def vfio() -> Iterator[FakeVfio]:
    """The calls to the kernel go to a fake one."""
    fake = FakeVfio()
    with replaced(fake):
        yield fake

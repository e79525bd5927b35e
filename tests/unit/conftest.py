"""Fixtures of more than one file."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest
from connect_tree import make_tree
from kernel_fake import FakeVfio
from pci_tree import FakeKernel

from vfiopy.kernel.ioctl._call import replaced
from vfiopy.lives import drain_finalizers


@pytest.fixture
def vfio() -> Iterator[FakeVfio]:
    """The calls to the kernel go to a fake one, which has no fd open at the end."""
    fake = FakeVfio()
    with replaced(fake):
        yield fake
        gc.collect()
        drain_finalizers()
        assert fake.left() == {}


@pytest.fixture
def tree(tmp_path: Path) -> FakeKernel:
    """The functions that connect() is tried on."""
    return make_tree(tmp_path)

"""The kernel's vfio_pci_sriov_uapi_test: a virtual function opens only with its physical function's current token."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from uuid import UUID

import pytest
from modes import IGB, MODES

import vfiopy

Lookup = Callable[..., str]
TOKEN = UUID("14d6f4a1-3b5e-4a4e-9a53-0c1f5e9a7d10")
OTHER = UUID("2b8f4f4e-58f4-4c6c-8e24-6f1e53a2b90d")
WRONG = {"different": OTHER, "none": None}


@pytest.fixture(params=MODES)
def mode(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def pair(bdf: Lookup) -> Iterator[tuple[str, str]]:
    """Addresses of igb's physical function and one virtual function, both on vfio-pci."""
    physical = bdf(IGB)
    sysfs = Path("/sys/bus/pci/devices") / physical
    switch = Path("/sys/module/vfio_pci/parameters/enable_sriov")
    before = switch.read_text()
    switch.write_text("Y")
    try:
        with vfiopy.bind(physical):
            (sysfs / "sriov_numvfs").write_text("1")
            try:
                virtual = (sysfs / "virtfn0").resolve().name
                with vfiopy.bind(virtual):
                    yield physical, virtual
            finally:
                (sysfs / "sriov_numvfs").write_text("0")
    finally:
        switch.write_text(before)


def set_token(device: vfiopy.Device, token: UUID) -> None:
    device.io.feature(0, 1 << 17, token.bytes)


def test_init_token_match(pair: tuple[str, str], mode: str) -> None:
    physical, virtual = pair
    with vfiopy.open(physical, backend=mode) as pf:
        set_token(pf, TOKEN)
        with vfiopy.open(virtual, backend=mode, vf_token=TOKEN) as vf:
            assert vf.config.device in (0xFFFF, 0x10CA)
        for token in WRONG.values():
            with pytest.raises(vfiopy.PermissionDeniedError, match="token"):
                vfiopy.open(virtual, backend=mode, vf_token=token)


def test_pf_early_close(pair: tuple[str, str], mode: str) -> None:
    """A VF that is open stays open when the PF closes; the token stays too."""
    physical, virtual = pair
    with vfiopy.open(physical, backend=mode) as pf:
        set_token(pf, TOKEN)
        vf = vfiopy.open(virtual, backend=mode, vf_token=TOKEN)
    assert vf.bars.info(0).size
    vf.close()
    with pytest.raises(vfiopy.PermissionDeniedError, match="token"):
        vfiopy.open(virtual, backend=mode, vf_token=OTHER)


def test_override_token(pair: tuple[str, str], mode: str) -> None:
    physical, virtual = pair
    with vfiopy.open(physical, backend=mode) as pf:
        set_token(pf, TOKEN)
        set_token(pf, OTHER)
        with pytest.raises(vfiopy.PermissionDeniedError, match="token"):
            vfiopy.open(virtual, backend=mode, vf_token=TOKEN)
        with vfiopy.open(virtual, backend=mode, vf_token=OTHER) as vf:
            assert vf.bars.info(0).size

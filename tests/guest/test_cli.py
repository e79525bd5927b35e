"""``vfiopy list``, ``info`` and ``doctor`` over real devices."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from modes import IGB, NVME
from typer.testing import CliRunner

import vfiopy
from vfiopy.cli.app import app

runner = CliRunner()


def said(*words: str) -> Any:
    return json.loads(runner.invoke(app, [*words, "--json"]).stdout)


def causes(address: str) -> list[str]:
    """Checks that found something that blocks, the first one first."""
    return [each["check"] for each in said("doctor", address)["findings"] if each["severity"] == "blocks"]


def state(address: str) -> str:
    return str(said("list", address)["groups"][0]["functions"][0]["vfio"]["state"])


def test_a_device_on_its_way_to_vfio(bdf: Callable[..., str]) -> None:
    nvme = bdf(NVME)
    assert (state(nvme), causes(nvme)) == ("bindable", ["not bound"])
    with vfiopy.bind(nvme):
        assert (state(nvme), causes(nvme)) == ("ready", [])
        with vfiopy.open(nvme):
            assert (state(nvme), causes(nvme)) == ("busy", ["held"])
    report = said("info", nvme)
    assert {"MSI-X", "PCI Express"} <= {each["name"] for each in report["capabilities"]}
    assert report["iommu"]["page_sizes"][0] == 4096


def test_a_physical_function_with_virtual_ones(bdf: Callable[..., str]) -> None:
    igb = bdf(IGB)
    switch = Path("/sys/bus/pci/devices") / igb / "sriov_numvfs"
    switch.write_text("1")
    try:
        assert "virtual functions on" in causes(igb)[:2]
    finally:
        switch.write_text("0")
    assert "virtual functions on" not in causes(igb)

"""The doctor on real devices: each symptom that the lab can create, the right cause first; and what binding leaves."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from modes import NVME
from typer.testing import CliRunner

from vfiopy.cli.app import app
from vfiopy.pci import Function, restore

Bdf = Callable[..., str]
runner = CliRunner()
NOBODY = 65534


@pytest.fixture(autouse=True)
def own_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("VFIOPY_STATE_DIR", str(tmp_path / "state"))
    yield
    assert restore() == []


def say(*words: str) -> Any:
    answer = runner.invoke(app, [*words, "--json"])
    assert answer.stdout, answer.output
    return json.loads(answer.stdout)


# --- binding ---


def test_nodes_for_a_user_and_back(bdf: Bdf) -> None:
    nvme, shared = bdf(NVME), Path("/dev/iommu")
    before = shared.stat()
    (entry,) = say("bind", nvme, "--user", "nobody")["functions"]
    nodes = [Path(node) for node in (entry["group_node"], entry["cdev_node"])]
    assert [node.stat().st_uid for node in nodes] == [NOBODY, NOBODY]
    assert entry["granted"][:2] == [str(node) for node in nodes]
    assert (entry["driver"], entry["was"]) == ("vfio-pci", "nvme")
    (entry,) = say("unbind", nvme)["functions"]
    assert (entry["driver"], entry["group_node"]) == ("nvme", None)
    after = shared.stat()
    assert (after.st_uid, after.st_gid, after.st_mode) == (before.st_uid, before.st_gid, before.st_mode)
    assert not any(node.exists() for node in nodes)


def test_unbinding_what_nobody_wrote_down(bdf: Bdf) -> None:
    nvme = Function(bdf(NVME))
    (nvme.sysfs / "driver_override").write_text("vfio-pci\n")
    Path("/sys/bus/pci/drivers/nvme/unbind").write_text(str(nvme))
    Path("/sys/bus/pci/drivers_probe").write_text(str(nvme))
    assert nvme.driver == "vfio-pci"
    (entry,) = say("unbind", str(nvme))["functions"]
    assert (entry["driver"], nvme.driver_override) == ("nvme", None)


def test_unbinding_leaves_who_has_it_open(bdf: Bdf) -> None:
    nvme = bdf(NVME)
    (entry,) = say("bind", nvme)["functions"]
    fd = os.open(entry["cdev_node"], os.O_RDWR | os.O_CLOEXEC)
    try:
        refused = runner.invoke(app, ["unbind", nvme])
        assert refused.exit_code == 1
        assert "this process" in refused.output
    finally:
        os.close(fd)
    assert say("unbind", nvme)["functions"][0]["driver"] == "nvme"

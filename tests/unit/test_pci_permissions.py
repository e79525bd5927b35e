from __future__ import annotations

import grp
import os
import pwd
import resource
import socket
from pathlib import Path

import pytest
from pci_tree import FakeKernel

from vfiopy.errors import NotBoundError, NotSupportedError, PermissionDeniedError
from vfiopy.pci import grant, memlock_limit, monitor, udev_rule
from vfiopy.pci.events import _udev_runs

EDU = "0000:00:06.0"


@pytest.fixture
def kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeKernel:
    monkeypatch.setenv("VFIOPY_STATE_DIR", str(tmp_path / "state"))
    fake = FakeKernel.make(tmp_path)
    fake.add_driver("vfio-pci")
    fake.add(EDU, group=6, driver="vfio-pci")
    fake.add("0000:00:07.0", group=7)
    (fake.dev / "iommu").write_text("")
    (fake.dev / "iommu").chmod(0o600)
    return fake


@pytest.fixture
def owners(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, int]]:
    """chown() takes root, which unit tests do not have: what would be asked of it."""
    seen: list[tuple[str, int, int]] = []
    monkeypatch.setattr(os, "chown", lambda path, uid, gid: seen.append((Path(path).name, uid, gid)))
    return seen


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


def test_to_a_user(kernel: FakeKernel, owners: list[tuple[str, int, int]]) -> None:
    changed = grant(EDU, pwd.getpwuid(0).pw_name, system=kernel)
    assert [path.name for path in changed][:2] == ["6", "vfio6"]
    assert owners == [("6", 0, -1), ("vfio6", 0, -1)]
    assert mode(kernel.dev / "vfio/6") == mode(kernel.dev / "vfio/devices/vfio6") == 0o600


def test_to_a_group(kernel: FakeKernel, owners: list[tuple[str, int, int]]) -> None:
    gid = 12345
    grant(EDU, group=gid, system=kernel)
    assert owners[:2] == [("6", -1, gid), ("vfio6", -1, gid)]
    assert mode(kernel.dev / "vfio/6") == 0o660
    shared = kernel.dev / "iommu"
    if shared.stat().st_gid == 0:
        assert owners[2:] == [("iommu", -1, gid)]
        assert mode(shared) == 0o660
    else:
        assert mode(shared) == 0o606


def test_what_all_devices_share_is_opened_once(kernel: FakeKernel, owners: list[tuple[str, int, int]]) -> None:
    shared = kernel.dev / "iommu"
    assert shared in grant(EDU, 12345, system=kernel)
    assert mode(shared) == 0o606
    assert shared not in grant(EDU, 12345, system=kernel)


def test_without_cdev_iommufd_is_left_alone(kernel: FakeKernel, owners: list[tuple[str, int, int]]) -> None:
    (kernel.dev / "vfio/devices/vfio6").unlink()
    assert [path.name for path in grant(EDU, 12345, system=kernel)] == ["6"]
    assert mode(kernel.dev / "iommu") == 0o600


def test_refusals(kernel: FakeKernel, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(NotBoundError, match="not bound to vfio-pci") as caught:
        grant("00:07.0", 0, system=kernel)
    assert "vfiopy bind 0000:00:07.0" in caught.value.hint
    with pytest.raises(ValueError, match="user or a group"):
        grant(EDU, system=kernel)
    with pytest.raises(KeyError):
        grant(EDU, "nobody-has-this-name", system=kernel)
    with pytest.raises(KeyError):
        grant(EDU, group="nobody-has-this-name", system=kernel)

    def refuse(path: Path, uid: int, gid: int) -> None:
        raise PermissionError(1, "Operation not permitted", str(path))

    monkeypatch.setattr(os, "chown", refuse)
    with pytest.raises(PermissionDeniedError, match="cannot be given away") as denied:
        grant(EDU, 0, system=kernel)
    assert "udev_rule()" in denied.value.hint


def test_names_and_numbers_mean_the_same(kernel: FakeKernel, owners: list[tuple[str, int, int]]) -> None:
    group = grp.getgrgid(0).gr_name
    grant(EDU, group=group, system=kernel)
    assert owners[0] == ("6", -1, 0)


def test_udev_rule() -> None:
    text = udev_rule("00:05.0", "vfio")
    comment, cdev, node, shared = text.splitlines()
    assert comment.startswith("# 0000:00:05.0")
    run = "RUN+=\"/bin/sh -c 'chgrp vfio $devnode'\""
    assert cdev == f'SUBSYSTEM=="vfio-dev", KERNELS=="0000:00:05.0", MODE="0660", {run}'
    assert 'KERNEL=="0000:00:05.0", DRIVER=="*vfio?pci"' in node
    assert "chgrp vfio $$n; chmod 0660 $$n" in node
    assert shared == f'SUBSYSTEM=="misc", KERNEL=="iommu", MODE="0660", {run}'
    assert 'MODE="0600"' in udev_rule("00:05.0", "vfio", mode=0o600)
    owner = udev_rule("00:05.0", user="alice").splitlines()
    assert owner[1].endswith("MODE=\"0600\", RUN+=\"/bin/sh -c 'chown alice $devnode'\"")
    # systemd 258 leaves out a rule with OWNER= or GROUP= of somebody who is not a part of the system
    assert "OWNER=" not in "".join(owner)
    assert "chown alice $$n; chmod 0600 $$n" in owner[2]
    assert owner[3].endswith('MODE="0666"')
    assert "chown alice:vfio $$n" in udev_rule("00:05.0", "vfio", user="alice")
    with pytest.raises(ValueError, match="a user or a group"):
        udev_rule("00:05.0")
    with pytest.raises(ValueError, match="not the name of a user"):
        udev_rule("00:05.0", user="$(reboot)")
    for wrong in ("", 'a"b', "a b", "$(reboot)", "a'b"):
        with pytest.raises(ValueError, match="not the name of a group"):
            udev_rule("00:05.0", wrong)


STATUS = "Name:\tpython\nVmLck:\t     128 kB\nVmPin:\t      64 kB\nCapEff:\t{caps:016x}\n"


def test_memlock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = FakeKernel.make(tmp_path)
    status = kernel.proc / "self/status"
    status.write_text(STATUS.format(caps=0))
    monkeypatch.setattr(resource, "getrlimit", lambda which: (8 << 20, resource.RLIM_INFINITY))
    limit = memlock_limit(system=kernel)
    assert (limit.soft, limit.hard, limit.locked, limit.pinned) == (8 << 20, None, 128 << 10, 64 << 10)
    assert not limit.exempt
    assert limit.available == (8 << 20) - (128 << 10)
    assert limit.allows(limit.available)
    assert not limit.allows(limit.available + 1)
    status.write_text(STATUS.format(caps=1 << 14))
    assert memlock_limit(system=kernel).allows(1 << 50)
    status.write_text(STATUS.format(caps=0))
    monkeypatch.setattr(resource, "getrlimit", lambda which: (resource.RLIM_INFINITY,) * 2)
    assert memlock_limit(system=kernel).available is None


def test_memlock_of_this_process() -> None:
    limit = memlock_limit()
    soft = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    assert limit.soft == (None if soft == resource.RLIM_INFINITY else soft)


def test_monitor_lives_and_ends() -> None:
    watch = monitor(udev=False)
    assert watch
    assert watch.fileno() >= 0
    assert watch.wait(0) is None
    watch.close()
    watch.close()
    assert not watch
    with pytest.raises(ValueError, match="is closed"):
        watch.wait(0)


def test_a_udev_that_has_ended_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    control = tmp_path / "control"
    monkeypatch.setattr("vfiopy.pci.events._CONTROL", str(control))
    assert not _udev_runs()
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as udevd:
        udevd.bind(str(control))
        udevd.listen()
        assert _udev_runs()
    assert control.exists()
    assert not _udev_runs()


def test_monitor_of_udev_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vfiopy.pci.events._pyudev", lambda: None)
    with pytest.raises(NotSupportedError, match="not installed"):
        monitor(udev=True)

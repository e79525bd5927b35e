"""``vfiopy bind``, ``unbind`` and ``restore``: owners of nodes and files for each boot, and the way back from both."""

from __future__ import annotations

import errno
import grp
import json
import os
import pwd
from pathlib import Path
from typing import Any

import pytest
from json_schema import check_schema
from pci_tree import FakeKernel
from typer.testing import CliRunner, Result

from vfiopy import pci
from vfiopy.cli.app import app
from vfiopy.errors import BusyError, DeviceInUseError, NotBoundError, PermissionDeniedError
from vfiopy.pci import Function, PciAddress, forget, persist, persisted, unbind
from vfiopy.pci.records import Records, State

runner = CliRunner()
NVME, NIC, SECOND = "0000:00:05.0", "0000:01:00.0", "0000:01:00.1"
ME = pwd.getpwuid(os.getuid()).pw_name
MY_GROUP = grp.getgrgid(os.getgid()).gr_name


@pytest.fixture
def kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeKernel:
    monkeypatch.setenv("VFIOPY_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.setattr("vfiopy.pci.rebind._PAUSE", 0.0)
    kernel = FakeKernel.make(tmp_path)
    for name in ("nvme", "igb", "vfio-pci", "pcieport"):
        kernel.add_driver(name)
    kernel.add(NVME, ids=(0x1B36, 0x0010), class_code=0x010802, driver="nvme", group=5)
    kernel.add("0000:00:07.0", class_code=0x060400, driver="pcieport", group=7, header_type=1)
    kernel.add(NIC, ids=(0x8086, 0x10C9), class_code=0x020000, driver="igb", group=7, totalvfs=7)
    kernel.add(SECOND, ids=(0x8086, 0x10C9), class_code=0x020000, driver="igb", group=7)
    (kernel.dev / "iommu").write_text("")
    (kernel.dev / "iommu").chmod(0o600)
    return kernel


def say(kernel: FakeKernel, *words: str) -> Result:
    return runner.invoke(app, [*words], obj=kernel)


def answer(kernel: FakeKernel, *words: str) -> Any:
    result = say(kernel, *words, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def driver(kernel: FakeKernel, address: str) -> str | None:
    return Function(address, kernel).driver


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


def records(kernel: FakeKernel) -> list[str]:
    return [str(one) for one in Records(None, kernel).addresses()]


# --- there and back ---


def test_bind_says_nodes_and_unbind_brings_the_driver_back(kernel: FakeKernel) -> None:
    (entry,) = answer(kernel, "bind", NVME)["functions"]
    assert (entry["driver"], entry["was"], entry["iommu_group"]) == ("vfio-pci", "nvme", 5)
    assert entry["group_node"] == str(kernel.dev / "vfio/5")
    assert entry["cdev_node"] == str(kernel.dev / "vfio/devices/vfio5")
    (entry,) = answer(kernel, "unbind", NVME)["functions"]
    assert (entry["driver"], entry["was"], entry["group_node"]) == ("nvme", "vfio-pci", None)
    assert records(kernel) == []
    assert Function(NVME, kernel).driver_override is None


def test_for_people(kernel: FakeKernel) -> None:
    lines = say(kernel, "bind", NVME).stdout.splitlines()
    nodes = f"{kernel.dev}/vfio/5, {kernel.dev}/vfio/devices/vfio5"
    assert lines == [f"{NVME}: vfio-pci (was nvme), {nodes}"]
    assert say(kernel, "bind", NVME).stdout == f"{NVME}: vfio-pci, {nodes}\n"  # it is there already
    assert say(kernel, "unbind", NVME).stdout == f"{NVME}: nvme (was vfio-pci)\n"


def test_a_whole_group_and_several(kernel: FakeKernel) -> None:
    refused = say(kernel, "bind", NIC)
    assert refused.exit_code == 1
    assert f"{SECOND} (igb: Ethernet controller)" in refused.output
    assert [each["address"] for each in answer(kernel, "bind", "--group", NIC)["functions"]] == [NIC, SECOND]
    assert driver(kernel, "0000:00:07.0") == "pcieport"
    assert [each["driver"] for each in answer(kernel, "unbind", "--group", SECOND)["functions"]] == ["igb", "igb"]
    assert len(answer(kernel, "bind", NIC, SECOND)["functions"]) == 2


def test_what_a_variant_driver_has_stays_with_it(kernel: FakeKernel) -> None:
    kernel.add_driver("igb_vfio_pci")
    answer(kernel, "bind", "--force", "--driver", "igb_vfio_pci", SECOND)
    assert [each["driver"] for each in answer(kernel, "bind", "--group", NIC)["functions"]] == [
        "vfio-pci",
        "igb_vfio_pci",
    ]
    assert answer(kernel, "bind", NIC, SECOND)["functions"][1]["driver"] == "vfio-pci"  # said by name


def test_what_somebody_else_bound_gets_the_driver_that_the_kernel_chooses(kernel: FakeKernel) -> None:
    kernel.write(kernel.pci_devices / NVME / "driver_override", "vfio-pci")
    kernel.write(kernel.driver("nvme") / "unbind", NVME)
    kernel.write(kernel.pci / "drivers_probe", NVME)
    assert driver(kernel, NVME) == "vfio-pci"
    assert [str(one) for one in unbind(NVME, system=kernel)] == [NVME]
    assert (driver(kernel, NVME), Function(NVME, kernel).driver_override) == ("nvme", None)


def test_also_where_only_its_nodes_were_given_away(kernel: FakeKernel) -> None:
    kernel.write(kernel.pci_devices / NVME / "driver_override", "vfio-pci")
    kernel.write(kernel.driver("nvme") / "unbind", NVME)
    kernel.write(kernel.pci / "drivers_probe", NVME)
    answer(kernel, "bind", NVME, "--user", ME)  # a record, and VFIO has it already
    answer(kernel, "unbind", NVME)
    assert (driver(kernel, NVME), Function(NVME, kernel).driver_override) == ("nvme", None)
    assert records(kernel) == []


def test_an_override_to_vfio_from_before_does_not_hand_it_back(kernel: FakeKernel) -> None:
    kernel.write(kernel.pci_devices / NVME / "driver_override", "vfio-pci")  # as a rule for each boot does
    answer(kernel, "bind", NVME)
    answer(kernel, "unbind", NVME)
    assert (driver(kernel, NVME), Function(NVME, kernel).driver_override) == ("nvme", None)


def test_unbind_refuses(kernel: FakeKernel) -> None:
    with pytest.raises(NotBoundError, match="it is bound to nvme"):
        unbind(NVME, system=kernel)
    assert "vfiopy bind" in say(kernel, "unbind", NVME).output
    answer(kernel, "bind", NVME)
    (kernel.proc / "42/fd").mkdir(parents=True)
    (kernel.proc / "42/comm").write_text("qemu\n")
    (kernel.proc / "42/fd/9").symlink_to(kernel.dev / "vfio/5")
    with pytest.raises(BusyError, match=r"process 42 \(qemu\)"):
        unbind(NVME, system=kernel)
    assert driver(kernel, NVME) == "vfio-pci"
    assert records(kernel) == [NVME]


def test_unbind_refuses_a_function_with_virtual_ones(kernel: FakeKernel) -> None:
    answer(kernel, "bind", "--group", NIC)
    (kernel.pci_devices / NIC / "sriov_numvfs").write_text("2\n")
    with pytest.raises(DeviceInUseError, match="virtual functions"):
        unbind(NIC, system=kernel)
    assert driver(kernel, NIC) == "vfio-pci"
    answer(kernel, "unbind", "--force", NIC)
    assert driver(kernel, NIC) == "igb"


def test_virtual_functions_that_somebody_uses_are_not_taken_away(kernel: FakeKernel) -> None:
    """The kernel would wait for that process without end."""
    kernel.add_driver("igbvf")
    kernel.write(kernel.pci_devices / NIC / "sriov_numvfs", "1")
    (virtual,) = Function(NIC, kernel).virtual_functions()
    answer(kernel, "bind", str(virtual))
    (kernel.proc / "42/fd").mkdir(parents=True)
    (kernel.proc / "42/comm").write_text("qemu\n")
    (kernel.proc / "42/fd/9").symlink_to(kernel.dev / "vfio/100")
    for words in (["bind", "--force", NIC, SECOND], ["bind", "--force", "--driver", "nvme", NIC]):
        assert f"{virtual}: unbind: it is used through VFIO: process 42 (qemu)" in say(kernel, *words).output
        assert (driver(kernel, NIC), Function(NIC, kernel).sriov_numvfs) == ("igb", 1)
    assert records(kernel) == [str(virtual)]


def test_restore_leaves_virtual_functions_that_came_later(kernel: FakeKernel) -> None:
    kernel.write(kernel.pci_devices / NIC / "driver_override", "igb_uio")
    pci.clear_override(NIC, system=kernel)  # a record, and igb keeps the device
    kernel.write(kernel.pci_devices / NIC / "sriov_numvfs", "2")
    answer(kernel, "bind", "--force", NIC, SECOND)
    assert Function(NIC, kernel).sriov_numvfs == 0
    answer(kernel, "restore")
    nic = Function(NIC, kernel)
    assert (nic.driver, nic.driver_override, nic.sriov_numvfs) == ("igb", "igb_uio", 2)
    pci.clear_override(NIC, system=kernel)
    kernel.write(kernel.pci_devices / NIC / "sriov_numvfs", "0")
    kernel.write(kernel.pci_devices / NIC / "sriov_numvfs", "1")
    answer(kernel, "restore")
    assert (nic.driver_override, nic.sriov_numvfs) == ("igb_uio", 1)


def test_one_that_fails_does_not_keep_the_others(kernel: FakeKernel) -> None:
    answer(kernel, "bind", NIC, SECOND, NVME)
    (kernel.proc / "42/fd").mkdir(parents=True)
    (kernel.proc / "42/comm").write_text("qemu\n")
    (kernel.proc / "42/fd/9").symlink_to(kernel.dev / "vfio/devices/vfio5")
    with pytest.raises(BusyError) as caught:
        unbind([NVME, NIC, SECOND], system=kernel)
    assert caught.value.__notes__ == [f"taken off VFIO: {NIC}, {SECOND}"]


# --- owners ---


def test_nodes_for_a_user_come_back(kernel: FakeKernel) -> None:
    shared = kernel.dev / "iommu"
    (entry,) = answer(kernel, "bind", NVME, "--user", ME)["functions"]
    assert entry["granted"][:2] == [entry["group_node"], entry["cdev_node"]]
    answer(kernel, "restore")
    assert mode(shared) == 0o600
    assert records(kernel) == []


def test_what_two_functions_share_is_given_back_with_the_second(
    kernel: FakeKernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "chown", lambda *_: None)
    shared = kernel.dev / "iommu"
    pci.bind([NVME, NIC, SECOND], system=kernel).keep()
    for one in (NVME, NIC):
        pci.grant(one, 12345, system=kernel)
    assert mode(shared) == 0o606
    pci.restore(NVME, system=kernel)
    assert mode(shared) == 0o606
    pci.restore(NIC, system=kernel)
    assert mode(shared) == 0o600


def test_nodes_of_a_function_that_was_bound_before_come_back(kernel: FakeKernel) -> None:
    kernel.write(kernel.driver("nvme") / "unbind", NVME)
    kernel._attach(NVME, "vfio-pci")
    node = kernel.dev / "vfio/5"
    node.chmod(0o640)
    pci.grant(NVME, group=os.getgid(), system=kernel)
    assert mode(node) == 0o660
    assert pci.restore(system=kernel) != []
    assert (mode(node), driver(kernel, NVME)) == (0o640, "vfio-pci")


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("number", [1, errno.EINVAL])  # not root; a uid that this user namespace does not have
def test_giving_away_is_all_or_nothing(
    kernel: FakeKernel, monkeypatch: pytest.MonkeyPatch, number: int, known: bool
) -> None:
    """The device was bound before, so that leaving the with block undoes nothing."""
    if known:
        pci.bind(NVME, system=kernel).keep()
    else:
        kernel.write(kernel.driver("nvme") / "unbind", NVME)
        kernel._attach(NVME, "vfio-pci")
    first, second = kernel.dev / "vfio/5", kernel.dev / "vfio/devices/vfio5"
    first.chmod(0o640)
    before = Records(None, kernel).read(PciAddress.parse(NVME)) if known else None

    def chown(path: Path, uid: int, gid: int) -> None:
        if path == second:
            raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(os, "chown", chown)
    result = say(kernel, "bind", NVME, "--user", ME)
    assert result.exit_code == 1
    assert f"{second} cannot be given away: {os.strerror(number)}" in result.output
    assert mode(first) == 0o640
    assert Records(None, kernel).read(PciAddress.parse(NVME)) == before


def test_nodes_of_a_crash_come_back_when_binding_again_fails(kernel: FakeKernel) -> None:
    answer(kernel, "bind", NVME, "--user", ME)
    shared = kernel.dev / "iommu"
    shared.chmod(0o606)
    kernel.write(kernel.driver("vfio-pci") / "unbind", NVME)  # as a crash leaves it: without a driver
    kernel.probe_errors["vfio-pci", NVME] = errno.EINVAL
    assert "everything was put back" in say(kernel, "bind", NVME).output
    assert (mode(shared), records(kernel), driver(kernel, NVME)) == (0o600, [], "nvme")


def test_leaving_the_with_block_takes_nodes_back_too(kernel: FakeKernel) -> None:
    with pci.bind(NVME, system=kernel):
        pci.grant(NVME, ME, system=kernel)
        assert records(kernel) == [NVME]
    assert mode(kernel.dev / "iommu") == 0o600
    assert records(kernel) == []


def test_a_new_node_of_the_same_name_is_left_alone(kernel: FakeKernel, monkeypatch: pytest.MonkeyPatch) -> None:
    answer(kernel, "bind", NVME, "--user", ME)
    shared = kernel.dev / "iommu"
    shared.unlink()
    shared.symlink_to("/dev/null")
    changed: list[object] = []
    monkeypatch.setattr(os, "chmod", lambda path, mode: changed.append(path))
    answer(kernel, "restore")
    assert changed == []


def test_refused_while_taking_back(kernel: FakeKernel, monkeypatch: pytest.MonkeyPatch) -> None:
    answer(kernel, "bind", NVME, "--user", ME)

    def refuse(path: str, *_: int) -> None:
        raise PermissionError(1, "Operation not permitted", path)

    with monkeypatch.context() as patch:
        patch.setattr(os, "chown", refuse)
        with pytest.raises(PermissionDeniedError, match="cannot be taken back"):
            pci.restore(system=kernel)
    assert records(kernel) == [NVME]  # and restore() can be called again
    pci.restore(system=kernel)


def test_names_are_looked_at_before_anything_is_changed(kernel: FakeKernel) -> None:
    for option in ("--user", "--group-name"):
        result = say(kernel, "bind", NVME, option, "nobody-has-this-name")
        assert result.exit_code == 2
        assert "there is no" in result.output
    assert driver(kernel, NVME) == "nvme"


# --- each boot ---


def rule(kernel: FakeKernel, address: str = NVME) -> Path:
    return kernel.etc / f"udev/rules.d/70-vfiopy-{address}.rules"


def test_a_rule_for_each_boot(kernel: FakeKernel) -> None:
    (entry,) = answer(kernel, "bind", NVME, "--persist", "--user", ME, "--group-name", MY_GROUP)["functions"]
    assert entry["persisted"] == [str(rule(kernel))]
    first, binding, *rights = rule(kernel).read_text().splitlines()
    assert first.startswith(f"# vfiopy: {NVME} to vfio-pci at each boot")
    assert f'KERNEL=="{NVME}", ATTR{{driver_override}}="vfio-pci"' in binding
    assert f'-m vfiopy bind --driver vfio-pci {NVME}"' in binding
    assert f"chown {ME}:{MY_GROUP} $devnode" in rights[1]
    assert mode(rule(kernel)) == 0o644
    (one,) = persisted(NVME, system=kernel)
    assert (one.driver, one.own) == ("vfio-pci", True)
    # Taken off VFIO without a word about boots, it says that it comes back.
    left = answer(kernel, "unbind", NVME)
    assert (left["left"], left["removed"]) == ([str(rule(kernel))], [])
    again = answer(kernel, "unbind", "--persist", NVME)
    assert (again["removed"], again["functions"]) == ([str(rule(kernel))], [])
    assert list(rule(kernel).parent.iterdir()) == []


def test_files_stay_when_the_device_cannot_be_taken(kernel: FakeKernel) -> None:
    answer(kernel, "bind", NVME, "--persist")
    (kernel.proc / "42/fd").mkdir(parents=True)
    (kernel.proc / "42/comm").write_text("qemu\n")
    (kernel.proc / "42/fd/9").symlink_to(kernel.dev / "vfio/5")
    for words in (["unbind", "--persist", NVME], ["restore"]):
        assert "process 42 (qemu)" in say(kernel, *words).output
        assert rule(kernel).exists()


def test_the_file_of_a_card_that_is_not_there_any_more(kernel: FakeKernel) -> None:
    answer(kernel, "bind", NVME, "--persist")
    kernel.remove(NVME)
    assert say(kernel, "unbind", NVME).exit_code == 1
    left = answer(kernel, "unbind", "--persist", NVME)
    assert (left["functions"], left["removed"]) == ([], [str(rule(kernel))])
    assert say(kernel, "unbind", "--persist", NVME).exit_code == 1


def test_restore_removes_it(kernel: FakeKernel) -> None:
    answer(kernel, "bind", NVME, "--persist")
    answer(kernel, "bind", "--group", NIC, "--persist")
    assert say(kernel, "restore", NIC).stdout == f"{NIC}: igb\nremoved: {rule(kernel, NIC)}\n"
    assert answer(kernel, "restore")["removed"] == [str(rule(kernel, one)) for one in (NVME, SECOND)]
    assert driver(kernel, NVME) == "nvme"


def test_restore_says_where_it_looked(kernel: FakeKernel, tmp_path: Path) -> None:
    result = say(kernel, "restore")
    assert (result.exit_code, result.stdout) == (0, f"nothing to undo is written down in {tmp_path / 'state'}\n")


def test_the_format_of_driverctl_where_that_is(kernel: FakeKernel) -> None:
    folder = kernel.etc / "driverctl.d"
    folder.mkdir(parents=True)
    (entry,) = answer(kernel, "bind", NVME, "--persist")["functions"]
    saved = folder / f"pci-{NVME}"
    assert entry["persisted"] == [str(saved)]
    assert saved.read_text() == "vfio-pci\n"
    assert not rule(kernel).exists()
    assert answer(kernel, "bind", NVME, "--persist", "--user", ME)["functions"][0]["persisted"] == [
        str(saved),
        str(rule(kernel)),
    ]
    assert "driver_override" not in rule(kernel).read_text()
    assert answer(kernel, "unbind", "--persist", NVME)["removed"] == [str(rule(kernel)), str(saved)]
    assert list(folder.iterdir()) == []


def test_another_driver_for_each_boot_replaces_the_first(kernel: FakeKernel) -> None:
    rule_of_before = persist(NVME, user=ME, system=kernel)
    folder = kernel.etc / "driverctl.d"
    folder.mkdir(parents=True)
    persist(NVME, system=kernel)
    assert not rule_of_before[0].exists()  # it would bind, too, and for somebody
    assert persist(NVME, "igb", system=kernel) == (folder / f"pci-{NVME}",)
    assert [(one.driver, one.own) for one in persisted(NVME, system=kernel)] == [("igb", True)]
    assert forget(NVME, system=kernel) == (folder / f"pci-{NVME}",)
    assert list(folder.iterdir()) == []


def test_a_file_that_driverctl_wrote_after_ours_is_not_ours(kernel: FakeKernel) -> None:
    folder = kernel.etc / "driverctl.d"
    folder.mkdir(parents=True)
    (saved,) = persist(NVME, system=kernel)
    saved.unlink()  # driverctl unset-override
    saved.write_text("vfio-pci\n")  # driverctl set-override
    assert [one.own for one in persisted(NVME, system=kernel)] == [False]
    assert forget(system=kernel) == ()
    assert [path.name for path in folder.iterdir()] == [saved.name]


@pytest.mark.parametrize("wrong", ['x", RUN+="/bin/sh', "a\nACTION", "a b", "$(reboot)", "%k", "a'b", "a\\b", "", "-h"])
def test_what_a_rule_cannot_hold(kernel: FakeKernel, wrong: str) -> None:
    for arguments in ({"user": wrong}, {"group": wrong}, *([] if wrong == "-h" else [{"driver": wrong}])):
        with pytest.raises(ValueError, match="is not the name of a"):
            persist(NVME, **arguments, system=kernel)
    assert not rule(kernel).parent.exists()


def test_a_name_that_a_rule_cannot_hold_is_told_first(kernel: FakeKernel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pwd, "getpwnam", lambda _: pwd.getpwuid(os.getuid()))
    result = say(kernel, "bind", NVME, "--persist", "--user", "OFFICE\\alice")
    assert result.exit_code == 2
    assert "that a udev rule can hold" in " ".join(result.output.replace("│", " ").split())
    assert kernel.log == []
    assert "chown alice@office.example $devnode" in pci.udev_rule(NVME, user="alice@office.example")


def test_others_files_stay(kernel: FakeKernel) -> None:
    folder = kernel.etc / "driverctl.d"
    folder.mkdir(parents=True)
    saved = folder / f"pci-{NVME}"
    saved.write_text("uio_pci_generic\n")
    result = say(kernel, "bind", NVME, "--persist")
    assert result.exit_code == 1
    assert f"somebody else's file is there: {saved}, for uio_pci_generic" in result.output
    assert f"driverctl unset-override {NVME}" in result.output
    assert driver(kernel, NVME) == "nvme"
    assert kernel.log == []  # it was not even taken from its driver
    saved.write_text("vfio-pci\n")  # what is wanted is there already
    persist(NVME, system=kernel)
    assert forget(NVME, system=kernel) == ()
    assert saved.read_text() == "vfio-pci\n"
    saved.unlink()
    folder.rmdir()
    rule(kernel).parent.mkdir(parents=True)
    rule(kernel).write_text("# of an administrator\n")
    assert say(kernel, "bind", NVME, "--persist").exit_code == 1
    assert forget(system=kernel) == ()
    assert rule(kernel).read_text() == "# of an administrator\n"


def test_for_a_group_all_files_or_none(kernel: FakeKernel) -> None:
    rule(kernel, SECOND).parent.mkdir(parents=True)
    rule(kernel, SECOND).write_text("# of an administrator\n")
    assert say(kernel, "bind", "--group", NIC, "--persist").exit_code == 1
    assert [path.name for path in rule(kernel).parent.iterdir()] == [rule(kernel, SECOND).name]
    assert driver(kernel, NIC) == "igb"


def test_a_group_goes_together_at_boot_too(kernel: FakeKernel) -> None:
    """One by one, each of them would be refused: another driver still has the other."""
    for words in (["--group", NIC], [NIC, SECOND]):
        answer(kernel, "bind", "--persist", *words)
        for one in (NIC, SECOND):
            assert f'-m vfiopy bind --group --driver vfio-pci {one}"' in rule(kernel, one).read_text()
        answer(kernel, "restore")
    answer(kernel, "bind", "--persist", NVME, *(NIC, SECOND))
    assert "--group" not in rule(kernel).read_text()


def test_where_nothing_can_be_written(kernel: FakeKernel, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, *_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(PermissionDeniedError, match="cannot be written"):
        persist(NVME, system=kernel)


def test_schemas(kernel: FakeKernel) -> None:
    before = State.of(Function(NVME, kernel))
    bound = answer(kernel, "bind", NVME, "--persist", "--user", ME)
    kernel.add("0000:00:09.0", group=9)
    bare = answer(kernel, "bind", "0000:00:09.0")
    check_schema("bind", bound, bare)
    left = answer(kernel, "unbind", NVME)
    check_schema("unbind", left, answer(kernel, "unbind", "--persist", NVME), answer(kernel, "unbind", "0000:00:09.0"))
    answer(kernel, "bind", NVME, "--persist")
    answer(kernel, "bind", "0000:00:09.0")
    check_schema("restore", answer(kernel, "restore"))
    assert State.of(Function(NVME, kernel)) == before

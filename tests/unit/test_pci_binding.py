"""Binding, against a tree that behaves as the driver core does; the guest tests use a real kernel."""

from __future__ import annotations

import errno
import json
import os
import threading
from pathlib import Path

import pytest
from pci_tree import FakeKernel

from vfiopy.errors import (
    BindingError,
    BusyError,
    DeviceInUseError,
    DeviceNotFoundError,
    ForkedError,
    NotViableError,
    PermissionDeniedError,
    VfioError,
)
from vfiopy.pci import Binding, Function, PciAddress, bind, function, restore
from vfiopy.pci.records import Record, Records, State

NVME, EDU, IGB = "0000:00:05.0", "0000:00:06.0", "0000:01:00.0"


class Bench:
    """A fake machine, its records, and shorthands."""

    def __init__(self, root: Path) -> None:
        self.kernel = FakeKernel.make(root)
        self.state = root / "state"
        for name in ("nvme", "igb", "igbvf", "vfio-pci", "pci-stub", "pcieport", "lpc_ich"):
            self.kernel.add_driver(name)
        self.kernel.add(NVME, ids=(0x1B36, 0x0010), class_code=0x010802, driver="nvme", group=5)
        self.kernel.add(EDU, group=6)
        self.kernel.add("0000:00:07.0", class_code=0x060400, driver="pcieport", group=7, header_type=1)
        self.kernel.add(IGB, ids=(0x8086, 0x10C9), class_code=0x020000, driver="igb", group=7, totalvfs=7)
        self.kernel.add("0000:01:00.1", ids=(0x8086, 0x10C9), class_code=0x020000, driver="igb", group=7)
        self.kernel.add("0000:01:00.2", group=7)

    def function(self, address: str) -> Function:
        return function(address, system=self.kernel)

    def bind(self, target: object, driver: str = "vfio-pci", **options: object) -> Binding:
        options = {"timeout": 0.05, "state_dir": self.state, "system": self.kernel, **options}
        return bind(target, driver, **options)  # type: ignore[arg-type]

    def restore(self, address: str | None = None) -> list[str]:
        return [str(one) for one in restore(address, state_dir=self.state, system=self.kernel)]

    def enable_vfs(self, count: int) -> None:
        self.kernel.write((self.kernel.pci_devices / IGB).resolve() / "sriov_numvfs", str(count))
        self.kernel.log.clear()

    def snapshot(self) -> dict[str, State]:
        return {name: State.of(Function(name, self.kernel)) for name in self.kernel.names(self.kernel.pci_devices)}

    def records(self) -> list[str]:
        return sorted(path.name for path in self.state.glob("*") if path.name != "lock")


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vfiopy.pci.rebind._PAUSE", 0.0)


# --- there and back ---


@pytest.mark.parametrize("address", [NVME, EDU])
def test_bind_and_undo(bench: Bench, address: str) -> None:
    before = bench.snapshot()
    binding = bench.bind(address)
    one = bench.function(address)
    assert (one.driver, one.driver_override) == ("vfio-pci", "vfio-pci")
    assert one.cdev_node is not None
    assert binding.functions == binding.changed == (one,)
    assert binding
    assert bench.records() == [f"{address}.json"]
    assert repr(binding) == f"<Binding {address} to vfio-pci>"
    binding.undo()
    assert not binding
    assert bench.snapshot() == before
    assert bench.records() == []
    writes = len(bench.kernel.log)
    binding.undo()
    binding.close()
    assert len(bench.kernel.log) == writes
    assert "nothing to undo" in repr(binding)


def test_with_block_puts_back_after_an_exception(bench: Bench) -> None:
    before = bench.snapshot()
    with pytest.raises(ZeroDivisionError), bench.bind(NVME):
        _ = 1 / 0
    assert [text for name, text in bench.kernel.log if name == "unbind"] == [NVME, NVME]
    assert bench.snapshot() == before


def test_an_override_of_somebody_else_comes_back(bench: Bench) -> None:
    bench.kernel.write(bench.function(NVME).sysfs / "driver_override", "nvme\n")
    with bench.bind(NVME):
        assert bench.function(NVME).driver == "vfio-pci"
    assert (bench.function(NVME).driver, bench.function(NVME).driver_override) == ("nvme", "nvme")


def test_record_is_written_before_the_first_change(bench: Bench) -> None:
    seen: list[list[str]] = []
    real = bench.kernel.write

    def spy(path: Path, text: str) -> None:
        seen.append(bench.records())
        real(path, text)

    object.__setattr__(bench.kernel, "write", spy)
    bench.bind(NVME)
    assert seen
    assert all(names == [f"{NVME}.json"] for names in seen)
    data = json.loads((bench.state / f"{NVME}.json").read_text())
    assert data["before"] == {"driver": "nvme", "override": None, "numvfs": None, "vfs": {}}
    assert (data["wanted"], data["pid"]) == ("vfio-pci", os.getpid())


def test_bound_already_is_left_alone(bench: Bench) -> None:
    outer = bench.bind(NVME)
    writes = len(bench.kernel.log)
    with bench.bind(NVME) as inner:
        assert inner.changed == ()
        assert not inner
    assert len(bench.kernel.log) == writes
    assert bench.function(NVME).driver == "vfio-pci"
    outer.undo()
    assert bench.function(NVME).driver == "nvme"


def test_keep_leaves_it_for_restore(bench: Bench) -> None:
    with bench.bind(NVME) as binding:
        binding.keep()
    assert bench.function(NVME).driver == "vfio-pci"
    assert bench.restore(NVME) == [NVME]
    assert bench.function(NVME).driver == "nvme"
    assert bench.restore(NVME) == []


def test_second_binding_goes_back_to_the_first(bench: Bench) -> None:
    first = bench.bind(NVME, "pci-stub")
    second = bench.bind(NVME)
    assert bench.function(NVME).driver == "vfio-pci"
    second.undo()
    assert bench.function(NVME).driver == "pci-stub"
    first.undo()
    assert bench.function(NVME).driver == "nvme"
    assert bench.records() == []


def test_restore_after_two_bindings_goes_all_the_way(bench: Bench) -> None:
    before = bench.snapshot()
    first = bench.bind(NVME, "pci-stub")
    second = bench.bind(NVME)
    assert bench.restore() == [NVME]
    assert bench.snapshot() == before
    second.undo()
    first.undo()
    assert bench.snapshot() == before


def test_undo_after_somebody_restored_and_bound_again(bench: Bench) -> None:
    old = bench.bind(NVME)
    bench.restore()
    old.undo()
    assert bench.function(NVME).driver == "nvme"


def rebind_by_hand(bench: Bench, address: str, driver: str) -> None:
    one = bench.function(address)
    bench.kernel.write(one.sysfs / "driver_override", driver)
    bench.kernel.write(bench.kernel.driver(one.driver or "") / "unbind", address)
    bench.kernel.write(bench.kernel.pci / "drivers_probe", address)


def test_what_somebody_did_meanwhile_is_what_to_go_back_to(bench: Bench) -> None:
    bench.bind(NVME)
    rebind_by_hand(bench, NVME, "pci-stub")
    bench.bind(NVME)
    assert bench.restore() == [NVME]
    assert bench.function(NVME).driver == "pci-stub"


def test_undo_after_a_restore_touches_nothing(bench: Bench) -> None:
    binding = bench.bind(NVME)
    bench.restore()
    rebind_by_hand(bench, NVME, "pci-stub")
    binding.undo()
    assert bench.function(NVME).driver == "pci-stub"


def test_driver_that_takes_its_time(bench: Bench) -> None:
    bench.kernel.lazy_probes["vfio-pci"] = 2
    bench.kernel.lazy_probes["nvme"] = 3
    with bench.bind(NVME):
        assert bench.function(NVME).driver == "vfio-pci"
    assert bench.function(NVME).driver == "nvme"


def test_several_at_once(bench: Bench) -> None:
    with bench.bind([NVME, EDU, NVME]) as binding:
        assert [str(one) for one in binding.functions] == [NVME, EDU]
        assert bench.function(EDU).is_vfio
        assert bench.function(NVME).is_vfio
    assert bench.function(NVME).driver == "nvme"
    assert bench.function(EDU).driver is None


def test_function_removed_while_bound(bench: Bench) -> None:
    binding = bench.bind(NVME)
    bench.kernel.remove(NVME)
    binding.undo()
    assert bench.records() == []


# --- groups ---


def test_group_that_would_not_be_viable_names_who(bench: Bench) -> None:
    before = bench.snapshot()
    with pytest.raises(NotViableError) as caught:
        bench.bind(IGB)
    assert "IOMMU group 7" in str(caught.value)
    assert "0000:01:00.1 (igb: Ethernet controller)" in str(caught.value)
    assert "0000:00:07.0" not in str(caught.value)
    assert "whole_group=True" in str(caught.value)
    assert bench.snapshot() == before
    assert bench.kernel.log == []


def test_whole_group_minus_bridges(bench: Bench) -> None:
    before = bench.snapshot()
    with bench.bind(IGB, whole_group=True) as binding:
        assert [str(one) for one in binding.functions] == [IGB, "0000:01:00.1", "0000:01:00.2"]
        assert {one.driver for one in binding.functions} == {"vfio-pci"}
        assert bench.function("0000:00:07.0").driver == "pcieport"
        assert bench.function(IGB).group_blockers() == ()
    assert bench.snapshot() == before


def test_members_named_one_by_one_will_do(bench: Bench) -> None:
    with bench.bind([IGB, "01:00.1"]):
        assert bench.function("01:00.2").driver is None


def test_bridge_with_a_driver_of_its_own(bench: Bench) -> None:
    bench.kernel.add("0000:00:1f.0", class_code=0x060100, driver="lpc_ich", group=31)
    bench.kernel.add("0000:00:1f.2", class_code=0x010601, group=31)
    with pytest.raises(NotViableError, match=r"0000:00:1f.0 \(lpc_ich: ISA bridge\)") as caught:
        bench.bind("00:1f.2", whole_group=True)
    assert "by hand" in caught.value.hint
    with bench.bind("00:1f.2", force=True):
        assert bench.function("00:1f.2").is_vfio


def test_viability_does_not_matter_to_other_drivers(bench: Bench) -> None:
    with bench.bind(IGB, "pci-stub"):
        assert bench.function(IGB).driver == "pci-stub"


# --- refusals before the first change ---


def test_no_such_driver(bench: Bench) -> None:
    with pytest.raises(BindingError, match="modprobe uio_pci_generic"):
        bench.bind(NVME, "uio_pci_generic")


def test_no_such_function(bench: Bench) -> None:
    with pytest.raises(DeviceNotFoundError):
        bench.bind("0000:00:1e.0")


def test_a_bridge_is_refused(bench: Bench) -> None:
    with pytest.raises(BindingError, match="is a bridge"):
        bench.bind("00:07.0")


def test_no_iommu(bench: Bench) -> None:
    bench.kernel.add("0000:02:00.0")
    with pytest.raises(BindingError, match="no IOMMU group") as caught:
        bench.bind("02:00.0")
    assert "intel_iommu=on" in caught.value.hint
    parameters = bench.kernel.sys / "module/vfio/parameters"
    parameters.mkdir(parents=True)
    (parameters / "enable_unsafe_noiommu_mode").write_text("Y\n")
    with pytest.raises(BindingError, match="no group and no character device"):
        bench.bind("02:00.0")  # the fake makes no noiommu group: what a kernel without the group interface would do
    assert bench.function("02:00.0").driver is None


def test_virtual_functions_are_named_and_come_back(bench: Bench) -> None:
    bench.enable_vfs(2)
    bench.bind("0000:01:10.1").keep()
    before = bench.snapshot()
    assert before[IGB].numvfs == 2
    with pytest.raises(DeviceInUseError, match=r"2 virtual functions of it are enabled \(0000:01:10.0"):
        bench.bind([IGB, "01:00.1"])
    with bench.bind([IGB, "01:00.1"], force=True):
        assert bench.function(IGB).sriov_numvfs == 0
        assert not Function("0000:01:10.0", bench.kernel).exists
    after = bench.snapshot()
    assert after == before
    assert after["0000:01:10.1"].driver == "vfio-pci"
    assert after["0000:01:10.0"].driver == "igbvf"


def test_permission(bench: Bench) -> None:
    def refuse(path: Path, text: str) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    object.__setattr__(bench.kernel, "write", refuse)
    with pytest.raises(PermissionDeniedError, match="takes root") as caught:
        bench.bind(NVME)
    assert "everything was put back" in str(caught.value)
    assert bench.records() == []


def test_records_that_cannot_be_written(bench: Bench) -> None:
    before = bench.snapshot()
    bench.state.write_text("a file where the folder should be")
    with pytest.raises(PermissionDeniedError, match="VFIOPY_STATE_DIR"):
        bench.bind(NVME)
    bench.state.unlink()
    (bench.state / f"{NVME}.new").mkdir(parents=True)
    with pytest.raises(BindingError, match="way back cannot be written"):
        bench.bind(NVME)
    assert bench.snapshot() == before
    assert bench.kernel.log == []


# --- a driver that refuses ---


@pytest.mark.parametrize(
    ("number", "hint"), [(errno.EINVAL, "denylist"), (errno.EBUSY, "sriov_numvfs"), (errno.EIO, "dmesg")]
)
def test_probe_that_fails_says_why(bench: Bench, number: int, hint: str) -> None:
    before = bench.snapshot()
    bench.kernel.probe_errors["vfio-pci", NVME] = number
    with pytest.raises(BindingError, match="its probe failed; everything was put back") as caught:
        bench.bind(NVME)
    assert caught.value.errno == number
    assert hint in caught.value.hint
    assert bench.snapshot() == before
    assert bench.records() == []


def test_old_driver_that_does_not_come_back(bench: Bench) -> None:
    binding = bench.bind(NVME)
    bench.kernel.probe_errors["nvme", NVME] = errno.ENODEV
    with pytest.raises(BindingError, match="nvme does not take it"):
        binding.undo()
    assert bench.records() == [f"{NVME}.json"]
    bench.kernel.probe_errors.clear()
    binding.undo()
    assert bench.function(NVME).driver == "nvme"
    assert bench.records() == []


def test_node_that_does_not_appear(bench: Bench) -> None:
    before = bench.snapshot()
    real = bench.kernel.write

    def hide_nodes(path: Path, text: str) -> None:
        real(path, text)
        for node in bench.kernel.dev.glob("vfio/**/*[0-9]"):
            node.rename(bench.kernel.dev / node.name)

    object.__setattr__(bench.kernel, "write", hide_nodes)
    with pytest.raises(BindingError, match="did not appear; ") as caught:
        bench.bind(EDU)
    assert "stale copy" in caught.value.hint
    assert State.of(bench.function(EDU)) == before[EDU] == State(None, None)


def test_kernel_without_cdev_is_fine(tmp_path: Path) -> None:
    kernel = FakeKernel.make(tmp_path, cdev=False)
    kernel.add_driver("vfio-pci")
    kernel.add(EDU, group=6)
    with bind(EDU, system=kernel, state_dir=tmp_path / "state", timeout=0.05):
        assert function(EDU, system=kernel).group_node is not None
        assert function(EDU, system=kernel).cdev_node is None


# --- a device that is open ---


def hold(bench: Bench, node: Path) -> None:
    folder = bench.kernel.proc / "4711"
    (folder / "fd").mkdir(parents=True)
    (folder / "comm").write_text("spdk_tgt\n")
    (folder / "fd/7").symlink_to(node)


def test_undo_while_a_process_has_it_open(bench: Bench) -> None:
    binding = bench.bind(NVME)
    node = bench.function(NVME).cdev_node
    assert node is not None
    hold(bench, node)
    writes = len(bench.kernel.log)
    with pytest.raises(BusyError, match=r"process 4711 \(spdk_tgt\) has .*/vfio5 open") as caught:
        binding.undo()
    assert "without end" in caught.value.hint
    assert [name for name, _ in bench.kernel.log[writes:]] == ["driver_override"]
    (bench.kernel.proc / "4711/fd/7").unlink()
    binding.undo()
    assert bench.function(NVME).driver == "nvme"


def test_device_file_tells_its_function(bench: Bench) -> None:
    binding = bench.bind(NVME)
    hold(bench, Path("anon_inode:[vfio-device]"))
    info = bench.kernel.proc / "4711/fdinfo"
    info.mkdir()
    (info / "7").write_text("pos:\t0\nvfio-device-syspath: /sys/devices/other\n")
    binding.undo()
    binding = bench.bind(NVME)
    (info / "7").write_text(f"pos:\t0\nvfio-device-syspath: {bench.function(NVME).sysfs.resolve()}\n")
    with pytest.raises(BusyError, match="4711"):
        binding.undo()


# --- sweeps: the n-th write fails ---


def writes_of(bench: Bench, action: str) -> int:
    bench.kernel.log.clear()
    run(bench, action)
    return len(bench.kernel.log)


def run(bench: Bench, action: str) -> None:
    if action == "one":
        bench.bind(NVME)
    elif action == "group":
        bench.bind(IGB, whole_group=True)
    else:
        bench.bind([IGB, "01:00.1"], force=True)


@pytest.mark.parametrize("action", ["one", "group", "vfs"])
def test_every_write_of_bind_may_fail(tmp_path: Path, action: str) -> None:
    def fresh(name: str) -> Bench:
        bench = Bench(tmp_path / name)
        if action == "vfs":
            bench.enable_vfs(2)
        return bench

    total = writes_of(fresh("count"), action)
    assert total >= 3
    raised = 0
    for number in range(1, total + 1):
        bench = fresh(f"at{number}")
        before = bench.snapshot()
        bench.kernel.fail_at.append(number)
        failure = None
        try:
            run(bench, action)
        except BindingError as error:
            failure = str(error)
        if failure is None:  # a probe is tried again
            assert bench.kernel.log[number - 1][0] == "drivers_probe"
            bench.restore()
        else:
            raised += 1
            assert "everything was put back" in failure
        assert bench.snapshot() == before
        assert bench.records() == []
    assert raised >= 2


@pytest.mark.parametrize("action", ["one", "group", "vfs"])
def test_no_write_works_any_more_then_restore(tmp_path: Path, action: str) -> None:
    """As a crash at each write: whatever was done stays, and restore() finds the way back from there."""
    bench = Bench(tmp_path / "count")
    if action == "vfs":
        bench.enable_vfs(2)
    total = writes_of(bench, action)
    for number in range(1, total + 1):
        bench = Bench(tmp_path / f"from{number}")
        if action == "vfs":
            bench.enable_vfs(2)
        before = bench.snapshot()
        bench.kernel.fail_from.append(number)
        with pytest.raises(BindingError):
            run(bench, action)
        bench.kernel.fail_from.clear()
        bench.restore()
        assert bench.snapshot() == before
        assert bench.records() == []


@pytest.mark.parametrize("action", ["one", "group", "vfs"])
def test_every_write_of_undo_may_fail(tmp_path: Path, action: str) -> None:
    for number in range(1, 40):
        bench = Bench(tmp_path / f"at{number}")
        if action == "vfs":
            bench.enable_vfs(2)
        before = bench.snapshot()
        run(bench, action)
        start = len(bench.kernel.log)
        bench.kernel.fail_at.append(start + number)
        try:
            bench.restore()
        except VfioError:
            assert bench.records()
            bench.restore()
        assert bench.snapshot() == before
        assert bench.records() == []
        if len(bench.kernel.log) < start + number:
            break
    else:
        pytest.fail("undo never ended")


class Crash(BaseException):
    """Stands for an exception at any bytecode, such as KeyboardInterrupt."""


def test_interrupt_at_every_write(tmp_path: Path) -> None:
    for number in range(1, 4):
        bench = Bench(tmp_path / str(number))
        before = bench.snapshot()
        real = bench.kernel.write

        def interrupted(path: Path, text: str, real: object = real, number: int = number, bench: Bench = bench) -> None:
            real(path, text)  # type: ignore[operator]
            if len(bench.kernel.log) == number:
                raise Crash

        object.__setattr__(bench.kernel, "write", interrupted)
        with pytest.raises(Crash) as caught:
            bench.bind(NVME)
        assert "everything was put back" in caught.value.__notes__[0]
        assert bench.snapshot() == before
        assert bench.records() == []


def test_interrupted_while_rolling_back(bench: Bench) -> None:
    bench.kernel.fail_from.append(2)
    with pytest.raises(BindingError, match=r"putting it back failed too .*restore\(\)"):
        bench.bind(NVME)
    assert bench.records() == [f"{NVME}.json"]
    bench.kernel.fail_from.clear()
    assert bench.restore() == [NVME]
    assert bench.function(NVME).driver_override is None


# --- records ---


def test_bind_after_a_crash_in_the_middle_remembers_the_first_driver(bench: Bench) -> None:
    Records(bench.state, bench.kernel)
    one = bench.function(NVME)
    records = Records(bench.state, bench.kernel)
    with records.lock():
        records.write(Record(one.address, State.of(one), "vfio-pci", 1))
    bench.kernel.write(one.sysfs / "driver_override", "vfio-pci")
    bench.kernel.write(bench.kernel.driver("nvme") / "unbind", NVME)
    with bench.bind(NVME):
        assert one.driver == "vfio-pci"
    assert (one.driver, one.driver_override) == ("nvme", None)


def test_record_of_an_earlier_boot_does_not_count(bench: Bench) -> None:
    boot = bench.kernel.proc / "sys/kernel/random/boot_id"
    boot.parent.mkdir(parents=True)
    boot.write_text("one\n")
    bench.bind(NVME)
    boot.write_text("two\n")
    assert bench.restore() == []
    assert bench.function(NVME).driver == "vfio-pci"
    assert bench.records() == []


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": 2}', '{"format": 1, "before": 3}'])
def test_record_that_cannot_be_read(bench: Bench, text: str) -> None:
    bench.bind(EDU)
    bench.bind(NVME)
    (bench.state / f"{EDU}.json").write_text(text)
    with pytest.raises(BindingError, match=f"{EDU}.json") as caught:
        bench.restore()
    assert "by hand" in caught.value.hint
    assert caught.value.__notes__ == [f"put back: {NVME}"]
    assert bench.function(NVME).driver == "nvme"


def test_restore_tries_all(bench: Bench) -> None:
    bench.bind(NVME)
    bench.bind([IGB, "01:00.1"])
    bench.kernel.probe_errors["nvme", NVME] = errno.EIO
    with pytest.raises(BindingError, match="nvme does not take it"):
        bench.restore()
    assert bench.function(IGB).driver == "igb"
    assert bench.records() == [f"{NVME}.json"]


def test_state_survives_json(bench: Bench) -> None:
    bench.enable_vfs(3)
    state = State.of(bench.function(IGB))
    assert State.from_json(json.loads(json.dumps(state.to_json()))) == state
    assert len(state.vfs) == 3


def test_folder_of_records(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from vfiopy.pci.records import state_folder  # noqa: PLC0415

    monkeypatch.setenv("VFIOPY_STATE_DIR", str(tmp_path / "here"))
    assert state_folder() == tmp_path / "here"
    monkeypatch.delenv("VFIOPY_STATE_DIR")
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/run/user/1000")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert state_folder() == Path("/run/user/1000/vfiopy")
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert state_folder() == Path("/run/vfiopy")


def test_two_threads_bind_the_same(bench: Bench) -> None:
    bindings: list[Binding] = []
    threads = [threading.Thread(target=lambda: bindings.append(bench.bind(NVME))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(bindings) == 4
    assert [name for name, _ in bench.kernel.log].count("unbind") == 1
    assert sum(bool(one) for one in bindings) == 1
    for one in bindings:
        one.undo()
    assert bench.function(NVME).driver == "nvme"


def test_forked_child_leaves_it_alone(bench: Bench) -> None:
    binding = bench.bind(NVME)
    child = os.fork()
    if not child:
        status = 1
        try:
            binding.close()
            binding.undo()
        except ForkedError:
            status = 0
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert bench.function(NVME).driver == "vfio-pci"
    binding.undo()


def test_restore_takes_addresses(bench: Bench) -> None:
    bench.bind(NVME)
    assert restore(PciAddress.parse(NVME), state_dir=bench.state, system=bench.kernel) == [PciAddress.parse(NVME)]

"""Looking at the address spaces of another process."""

from __future__ import annotations

import json
import os
import resource
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from json_schema import check_schema
from typer.testing import CliRunner

import vfiopy
from vfiopy.backend import Prot
from vfiopy.cli.app import app
from vfiopy.errors import NotSupportedError, PermissionDeniedError, VfioError
from vfiopy.inspection import allow_inspection
from vfiopy.inspection.client import ask
from vfiopy.inspection.page_tables import Translation, functions_of, page_table_snapshot, parse_translations
from vfiopy.inspection.server import socket_name
from vfiopy.pci import PciAddress, System

ROOT = Path(__file__).parents[2]
runner = CliRunner()


@pytest.fixture(autouse=True)
def ended() -> Iterator[None]:
    """No test leaves a thread that answers."""
    yield
    allow_inspection().close()


@pytest.fixture
def device() -> Iterator[vfiopy.Device]:
    with vfiopy.open("emulated:edu") as device:
        yield device


def test_a_process_answers(device: vfiopy.Device) -> None:
    allow_inspection()
    buffer = device.dma.allocate(8192, prot=Prot.READ)
    device.space.book.pin(buffer.iova, 4096, Prot.READ)
    (space,) = [one for one in ask(os.getpid())["spaces"] if one["devices"] == ["emulated:edu"]]
    (mapping,) = space["mappings"]
    assert mapping == {
        "iova": buffer.iova,
        "size": 8192,
        "kind": "host",
        "prot": "r",
        "state": "live",
        "pins": 1,
        "pinned": [[buffer.iova, buffer.iova + 4095]],
    }
    assert space["picture"] == device.space.text_map()
    assert space["free"] == [list(one) for one in device.space.book.free_ranges()]
    assert [owner["pins"] for owner in space["owners"]] == [1]
    device.space.book.unpin(buffer.iova, 4096)


def test_twice_is_once_and_it_can_begin_again() -> None:
    first = allow_inspection()
    assert allow_inspection() is first
    first.close()
    with pytest.raises(VfioError, match="does not let itself be looked at"):
        ask(os.getpid())
    with allow_inspection():
        assert ask(os.getpid())["pid"] == os.getpid()


def test_nobody_there() -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        pass
    with pytest.raises(VfioError, match="there is no such process"):
        ask(process.pid)


def test_somebody_else_in_its_name() -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as thief:
        thief.bind(socket_name(1))
        thief.listen()
        with pytest.raises(PermissionDeniedError, match="another process answers in its name"):
            ask(1)


def test_other_users_are_not_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    allow_inspection()
    monkeypatch.setattr("vfiopy.inspection.server.peer", lambda connection: (5, 4711))
    with pytest.raises(PermissionDeniedError, match="only its own user and root"):
        ask(os.getpid())


def test_a_client_that_goes_away_or_hangs_does_not_matter(device: vfiopy.Device) -> None:
    allow_inspection()
    for _ in range(3):
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as gone:
            gone.connect(socket_name(os.getpid()))
    assert ask(os.getpid())["spaces"]


def test_an_answer_that_ends_early() -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as dying:
        dying.bind(socket_name(os.getpid()))
        dying.listen()

        def answer() -> None:
            connection, _ = dying.accept()
            with connection:
                connection.sendall(b'{"format": 1, "spa')

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(VfioError, match="in the middle of its answer"):
            ask(os.getpid())
        thread.join()


def test_it_answers_again_after_all_files_were_open() -> None:
    allow_inspection()
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        resource.setrlimit(resource.RLIMIT_NOFILE, (client.fileno(), before[1]))
        try:
            client.connect(socket_name(os.getpid()))
            time.sleep(0.05)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, before)
        client.settimeout(10)
        assert client.recv(10)
    assert ask(os.getpid())["pid"] == os.getpid()


def test_the_book_goes_on_meanwhile(device: vfiopy.Device) -> None:
    allow_inspection()
    stop = threading.Event()
    rounds = 0

    def look() -> None:
        while not stop.is_set():
            ask(os.getpid())

    threads = [threading.Thread(target=look) for _ in range(2)]
    for thread in threads:
        thread.start()
    end = time.monotonic() + 0.3
    while time.monotonic() < end:
        device.dma.allocate(4096).free()
        rounds += 1
    stop.set()
    for thread in threads:
        thread.join()
    assert rounds > 20


def test_a_forked_child_does_not_answer_and_can_have_its_own() -> None:
    allow_inspection()
    ready, go = os.pipe(), os.pipe()
    pid = os.fork()
    if not pid:
        allow_inspection()
        os.write(ready[1], b"x")
        os.read(go[0], 1)
        os._exit(0)
    os.read(ready[0], 1)
    try:
        assert ask(pid)["pid"] == pid
        assert ask(os.getpid())["pid"] == os.getpid()
    finally:
        os.write(go[1], b"x")
        os.waitpid(pid, 0)
        for fd in (*ready, *go):
            os.close(fd)


@pytest.fixture
def other(tmp_path: Path) -> Iterator[int]:
    """Another process with a device and three buffers."""
    program = tmp_path / "program.py"
    program.write_text(
        "import vfiopy\n"
        "device = vfiopy.open('emulated:edu')\n"
        "buffers = [device.dma.allocate(4096) for _ in range(3)]\n"
        "device.space.book.pin(buffers[0].iova, 4096, 1)\n"
        "print('ready', flush=True)\n"
        "input()\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "VFIOPY_INSPECT": "1"}
    with subprocess.Popen(
        [sys.executable, program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield process.pid
        process.kill()


def test_command(other: int) -> None:
    answer = runner.invoke(app, ["iova", str(other)])
    assert answer.exit_code == 0, answer.output
    assert "devices: emulated:edu" in answer.output
    assert "3 mappings, 12 KiB mapped, 4 KiB pinned" in answer.output
    assert "0x1fff" in answer.output
    assert "holds 1 pins in" in answer.output


def test_schema_of_json(other: int, tmp_path: Path) -> None:
    plain = json.loads(runner.invoke(app, ["iova", str(other), "--json"]).stdout)
    tree = fake_tree(tmp_path)
    tables = json.loads(runner.invoke(app, ["iova", "42", "--page-tables", "--json"], obj=tree).stdout)
    allow_inspection()
    with vfiopy.AddressSpace("odd") as odd, vfiopy.open("emulated:edu", space=odd):
        odd.book.exclude(0x10000, 0x1FFFF)
        odd.book.set_transient(0x100000, 0x1FFFFF)
        mine = ask(os.getpid())
    check_schema("iova", plain, tables, mine)


def test_command_without_a_process() -> None:
    answer = runner.invoke(app, ["iova", "4194305"])
    assert answer.exit_code == 1
    assert runner.invoke(app, ["iova", "me"]).exit_code == 2


@pytest.mark.parametrize("user", [0, 4711])
def test_command_on_a_process_that_allows_nothing(user: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.geteuid", lambda: user)
    answer = runner.invoke(app, ["iova", str(os.getpid())])
    assert answer.exit_code == 1
    assert "it does not let itself be looked at" in answer.output
    assert ("it uses no PCI function through VFIO" in answer.output) == (user == 0)
    assert "vfiopy.allow_inspection()" in answer.output


# --- page tables ---

TABLES = """\
Device 0000:00:04.0 @0x1014c2000
IOVA_PFN                PML5E                   PML4E                   PDPE                    PDE                     PTE
0x000000001     |       0x0000000000000000      0x0000000106b0a003      0x0000000106b0b003      0x0000000106b0c003      0x0000000106e01003
0x000000002     |       0x0000000000000000      0x0000000106b0a003      0x0000000106b0b003      0x0000000106b0c003      0x0000000106e02003
0x000000004     |       0x0000000000000000      0x0000000106b0a003      0x0000000106b0b003      0x0000000106b0c003      0x0000000106e03001
0x000000200     |       0x0000000000000000      0x0000000106b0a003      0x0000000106b0b003      0x0000000140000083      0x0000000000000000
0x000040000     |       0x0000000000000000      0x0000000106b0a003      0x0000000180000082      0x0000000000000000      0x0000000000000000
"""  # noqa: E501


def fake_tree(folder: Path) -> System:
    proc, sys_ = folder / "proc", folder / "sys"
    (proc / "42/fd").mkdir(parents=True)
    (proc / "42/fdinfo").mkdir()
    (proc / "42/cmdline").write_text("driver\0--fast\0")
    files = ("/dev/null", "anon_inode:[vfio-device]", "/dev/vfio/devices/vfio1", "/dev/vfio/7")
    for number, target in enumerate(files):
        (proc / f"42/fd/{number}").symlink_to(target)
        (proc / f"42/fdinfo/{number}").write_text("pos:\t0\nflags:\t02\n")
    (proc / "42/fdinfo/1").write_text("pos:\t0\nvfio-device-syspath: /sys/devices/pci0000:00/0000:00:04.0\n")
    (sys_ / "class/vfio-dev/vfio1").mkdir(parents=True)
    (sys_ / "class/vfio-dev/vfio1/device").symlink_to("../../../devices/pci0000:00/0000:00:05.0")
    (sys_ / "kernel/iommu_groups/7/devices/0000:00:06.0").mkdir(parents=True)
    for address in ("0000:00:04.0", "0000:00:05.0", "0000:00:06.0"):
        tables = sys_ / "kernel/debug/iommu/intel" / address
        tables.mkdir(parents=True)
        (tables / "domain_translation_struct").write_text(TABLES)
    return System(sys=sys_, proc=proc)


def test_translations() -> None:
    assert parse_translations(TABLES.splitlines()) == [
        Translation(0x1000, 0x2000, 4096, "rw"),
        Translation(0x4000, 0x1000, 4096, "r"),
        Translation(0x200000, 1 << 21, 1 << 21, "rw"),
        Translation(0x40000000, 1 << 30, 1 << 30, "w"),
    ]
    assert parse_translations([]) == []


def test_functions_of_a_process(tmp_path: Path) -> None:
    system = fake_tree(tmp_path)
    assert functions_of(42, system) == [PciAddress.parse(f"00:0{number}.0") for number in (4, 5, 6)]
    answer = page_table_snapshot(42, system)
    assert answer["program"] == ["driver", "--fast"]
    assert [space["mapped_bytes"] for space in answer["spaces"]] == [0x3000 + (1 << 21) + (1 << 30)] * 3
    shown = runner.invoke(app, ["iova", "42", "--page-tables"], obj=system).output
    assert "0x40000000" in shown
    assert "1 GiB" in shown


def test_processes_without_devices_and_without_tables(tmp_path: Path) -> None:
    system = fake_tree(tmp_path)
    with pytest.raises(VfioError, match="no such process"):
        page_table_snapshot(43, system)
    (system.sys / "kernel/debug/iommu/intel/0000:00:05.0/domain_translation_struct").unlink()
    with pytest.raises(NotSupportedError, match="shows no tables of this function"):
        page_table_snapshot(42, system)
    (system.proc / "44/fd").mkdir(parents=True)
    with pytest.raises(NotSupportedError, match="uses no PCI function"):
        page_table_snapshot(44, system)

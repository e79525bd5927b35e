"""What a guest asks the host for: real processes, and a QEMU that is played."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from threading import Thread
from typing import Any

import lab_import  # noqa: F401
import pytest

from tools._lab.errands import Errands
from tools._lab.paths import LabError
from tools._lab.served import Served, Servers

# Stands for "vfiopy": listens at the path behind --socket, tells its arguments in a file beside it, and stays.
SCRIPT = """
import signal, socket, sys
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
path = sys.argv[sys.argv.index("--socket") + 1]
if sys.argv[2] == "broken":
    sys.exit(1)
with open(path + ".told", "a") as file:
    print(*sys.argv[1:], file=file)
listener = socket.socket(socket.AF_UNIX)
listener.bind(path)
signal.pause()
"""


class Host:
    """Servers, and an errand boy with both of his sockets."""

    def __init__(self, run: Path, stack: ExitStack) -> None:
        self.run = run
        devices = (Served("plain"), Served("disk", image=1 << 20))
        command = ["python3", "-c", SCRIPT]
        self.servers = stack.enter_context(Servers(devices, run, command=command))
        self.asked: list[dict[str, Any]] = []
        self.answer: dict[str, Any] = {"return": {}}
        (guest, theirs), (qmp, monitor) = socket.socketpair(), socket.socketpair()
        for end in (guest, theirs, qmp, monitor):
            stack.enter_context(end)
        self.guest = stack.enter_context(guest.makefile("rw"))
        player = Thread(target=self._play_qemu, args=(monitor,))
        player.start()
        stack.callback(player.join)
        stack.enter_context(Errands(theirs, qmp, self.servers, run))

    def _play_qemu(self, monitor: socket.socket) -> None:
        with monitor.makefile("rw") as stream:
            stream.write('{"QMP": {}}\n')
            stream.flush()
            for line in stream:
                self.asked.append(json.loads(line))
                answer = {"return": {}} if self.asked[-1]["execute"] == "qmp_capabilities" else self.answer
                stream.write('{"event": "RESUME"}\n' + json.dumps(answer) + "\n")
                stream.flush()

    def ask(self, line: str) -> str:
        self.guest.write(line + "\n")
        self.guest.flush()
        return self.guest.readline().strip()


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    with ExitStack() as stack:
        yield Host(tmp_path, stack)


def test_killing_a_server_and_starting_it_again(host: Host) -> None:
    (host.run / "disk-served.img").write_bytes(b"kept" + bytes((1 << 20) - 4))
    assert host.ask("kill disk") == "ok"
    assert "disk" not in host.servers._running
    assert host.ask("kill disk").startswith("LabError")
    assert host.ask("serve disk") == "ok"
    assert host.ask("serve disk").startswith("LabError")
    told = (host.run / "disk.sock.told").read_text().splitlines()
    image = host.run / "disk-served.img"
    assert told == [f"serve disk --socket {host.run / 'disk.sock'} --image {image}"] * 2
    assert image.read_bytes()[:4] == b"kept"
    assert image.stat().st_size == 1 << 20
    assert (host.run / "plain.sock.told").read_text() == f"serve plain --socket {host.run / 'plain.sock'}\n"


def test_plugging(host: Host) -> None:
    assert host.ask("plug disk") == "ok"
    assert [asked["execute"] for asked in host.asked] == ["qmp_capabilities", "device_add"]
    assert host.asked[1]["arguments"] == {
        "driver": "vfio-user-pci",
        "socket": {"path": str(host.run / "disk.sock"), "type": "unix"},
        "bus": "spare",
        "id": "spare-disk",
    }
    host.answer = {"error": {"desc": "Bus 'spare' not found"}}
    assert host.ask("plug disk") == "LabError: Bus 'spare' not found"


@pytest.mark.parametrize("line", ["dance disk", "kill", "kill a b", "", "serve nothing"])
def test_errands_that_make_no_sense(host: Host, line: str) -> None:
    assert host.ask(line).split(":")[0] in ("LabError", "TypeError")
    assert host.ask("kill plain") == "ok"


def test_the_end_takes_the_servers_along(tmp_path: Path) -> None:
    with ExitStack() as stack:
        processes = list(Host(tmp_path, stack).servers._running.values())
        assert all(process.poll() is None for process in processes)
    assert [process.returncode for process in processes] == [0, 0]


@pytest.mark.parametrize("devices", [(Served("broken"),), (Served("plain"), Served("broken"))])
def test_a_server_that_does_not_come_up(tmp_path: Path, devices: tuple[Served, ...]) -> None:
    servers = Servers(devices, tmp_path, command=["python3", "-c", SCRIPT])
    with pytest.raises(LabError, match="vfiopy serve broken"), servers:
        pass
    assert not servers._running

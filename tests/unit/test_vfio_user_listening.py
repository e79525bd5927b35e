"""The server's socket in the file system: who may reach it, what it replaces and what it leaves."""

from __future__ import annotations

import os
import resource
import socket
from pathlib import Path

import pytest

import vfiopy
from vfiopy import emulated
from vfiopy.emulated import Edu
from vfiopy.vfio_user.listening import Listener
from vfiopy.vfio_user.server import Server


def test_modes_and_removal(tmp_path: Path) -> None:
    path = tmp_path / "private" / "x.sock"
    listener = Listener(path)
    assert path.parent.stat().st_mode & 0o777 == 0o700
    assert path.stat().st_mode & 0o777 == 0o600
    assert listener.accept() is None
    listener.close()
    listener.close()
    assert not path.exists()


@pytest.mark.parametrize("length", [0, 107])
def test_who_sees_the_path_can_connect(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, length: int) -> None:
    path = tmp_path / "x"
    seen = []
    listen = socket.socket.listen

    def look(self: socket.socket, backlog: int) -> None:
        seen.append(path.exists())
        listen(self, backlog)

    if length:  # no room for another name: as well as it goes
        folder = tmp_path / ("d" * (length - len(os.fsencode(tmp_path)) - 3))
        path = folder / "x"
    monkeypatch.setattr(socket.socket, "listen", look)
    listener = Listener(path)
    assert seen == [bool(length)]
    assert list(path.parent.iterdir()) == [path]
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(os.fspath(path))
    listener.close()
    assert not list(path.parent.iterdir())


def test_a_faster_server_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.sock"
    listen = socket.socket.listen

    def late(self: socket.socket, backlog: int) -> None:
        path.write_text("another's")
        listen(self, backlog)

    monkeypatch.setattr(socket.socket, "listen", late)
    with pytest.raises(vfiopy.BusyError, match="faster"):
        Listener(path)
    assert path.read_text() == "another's"
    assert list(tmp_path.iterdir()) == [path]


def test_a_dead_socket_is_replaced_and_a_live_one_is_not(tmp_path: Path) -> None:
    path = tmp_path / "x.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(os.fspath(path))
    first = Listener(path)
    with pytest.raises(vfiopy.BusyError, match="listens there already"):
        Listener(path)
    first.close()


def test_what_another_put_there_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "x.sock"
    first = Listener(path)
    path.unlink()
    second = Listener(path)
    first.close()
    assert path.exists()
    second.close()


@pytest.mark.parametrize("kind", ["file", "link", "folder"])
def test_nothing_but_sockets_is_replaced(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "x.sock"
    if kind == "file":
        path.write_text("precious")
    elif kind == "link":
        (tmp_path / "target").write_text("precious")
        path.symlink_to(tmp_path / "target")
    else:
        path.mkdir()
    with pytest.raises(vfiopy.VfioError, match="something else than a socket"):
        Listener(path)
    assert path.is_symlink() or path.exists()


def test_folders_that_others_may_write(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    with pytest.raises(vfiopy.PermissionDeniedError, match="others may put a socket"):
        Listener(tmp_path / "x.sock")
    tmp_path.chmod(0o1777)  # as /tmp: nobody can replace what is ours
    Listener(tmp_path / "x.sock").close()


def test_paths_that_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(vfiopy.VfioError, match="107 at most"):
        Listener(tmp_path / ("x" * 108))
    with pytest.raises(vfiopy.VfioError, match="folder of the socket cannot be made"):
        Listener(tmp_path / "a" / "b" / "x.sock")


def test_a_process_without_room_for_another_file(tmp_path: Path) -> None:
    """Who connects then is turned away; the server, and who is served by others in this process, go on."""
    io, mapper = emulated.connect(Edu())
    with Server(io, mapper, tmp_path / "x.sock") as server, socket.socket(socket.AF_UNIX) as client:
        client.connect(os.fspath(tmp_path / "x.sock"))
        client.settimeout(5)
        usual = resource.getrlimit(resource.RLIMIT_NOFILE)
        first_free = os.dup(client.fileno())
        os.close(first_free)
        resource.setrlimit(resource.RLIMIT_NOFILE, (first_free, usual[1]))
        try:
            for _ in range(3):
                server.step()
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, usual)
        assert client.recv(1) == b""
        assert not server.connected
        with socket.socket(socket.AF_UNIX) as other:
            other.connect(os.fspath(tmp_path / "x.sock"))
            server.step()
            assert server.connected

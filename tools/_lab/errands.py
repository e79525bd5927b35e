"""What a guest's test asks the host to do: one line each way on the guest's port ``errands``.

``kill NAME`` ends the server of a device as a crash would, ``serve NAME`` starts it again, ``plug NAME`` puts what is
served under that name into the guest's spare port. The answer is ``ok``, or why not.
"""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from pathlib import Path
from typing import Any, Self

from .paths import LabError
from .served import Servers, qemu_device

__all__ = ["Errands"]

PATIENCE = 20.0  # seconds for QEMU to answer


class Errands:
    """Runs the errands of one guest, in a thread, until the block ends.

    Args:
        guest: our end of the guest's port.
        qmp: our end of QEMU's monitor of that kind.
        servers: the devices that the host serves.
        run: the folder of their sockets.
    """

    def __init__(self, guest: socket.socket, qmp: socket.socket, servers: Servers, run: Path) -> None:
        self._guest = guest
        self._qmp = qmp
        self._servers = servers
        self._run = run
        self._stream: Any = None
        self._thread = threading.Thread(target=self._serve, name="errands", daemon=True)

    def _serve(self) -> None:
        with contextlib.suppress(OSError, ValueError), self._guest.makefile("r") as lines:
            for line in lines:
                try:
                    self._do(*line.split())
                    answer = "ok"
                except (LabError, OSError, ValueError, TypeError, KeyError) as error:
                    answer = f"{type(error).__name__}: {error}".replace("\n", " ")
                self._guest.sendall(f"{answer}\n".encode())

    def _do(self, word: str, name: str) -> None:
        if word == "kill":
            self._servers.kill(name)
        elif word == "serve":
            self._servers.start(name)
        elif word == "plug":
            self._execute("device_add", **qemu_device(self._run, name, bus="spare", id=f"spare-{name}"))
        else:
            raise LabError(f"nobody knows how to {word}")

    def _execute(self, command: str, **arguments: object) -> None:
        """Have QEMU do something."""
        if self._stream is None:
            self._qmp.settimeout(PATIENCE)
            self._stream = self._qmp.makefile("rw")
            self._answer("QMP")
            self._execute("qmp_capabilities")
        self._stream.write(json.dumps({"execute": command, "arguments": arguments}) + "\n")
        self._stream.flush()
        self._answer("return")

    def _answer(self, wanted: str) -> None:
        while True:
            answer = json.loads(self._stream.readline() or '{"error": {"desc": "QEMU is gone"}}')
            if "error" in answer:
                raise LabError(answer["error"]["desc"])
            if wanted in answer:
                return

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        for end in (self._guest, self._qmp):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        if self._stream is not None:
            self._stream.close()

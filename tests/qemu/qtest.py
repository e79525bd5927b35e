"""A QEMU without a guest: memory, ports and PCI configuration space are read and written from here (qtest)."""

from __future__ import annotations

import json
import os
import socket
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

from _lab.process import dies_with_us
from _lab.qemu import Qemu

MEMORY = "128M"
PLAIN = ("-M", "q35")
SHARED = ("-object", f"memory-backend-memfd,id=ram,size={MEMORY},share=on", "-M", "q35,memory-backend=ram")


class Machine:
    """A q35 that only does what it is told. The socket names are short: they live in ``folder``."""

    def __init__(self, qemu: Qemu, folder: Path, arguments: Sequence[str]) -> None:
        self._sockets = [self._listen(folder / name) for name in ("qtest", "qmp")]
        command = [
            *qemu.command,
            *arguments,
            *("-accel", "qtest", "-qtest", f"unix:{folder / 'qtest'}", "-qtest-log", "none"),
            *("-qmp", f"unix:{folder / 'qmp'}", "-nodefaults", "-display", "none", "-m", MEMORY),
        ]
        environment = dict(os.environ)
        if "/usr/lib64/" in qemu.command[0]:  # unpacked by the lab: it does not know where its modules are
            root = qemu.command[0].partition("/usr/lib64/")[0]
            environment["QEMU_MODULE_DIR"] = f"{root}/usr/lib/x86_64-linux-gnu/qemu"
        self.log = (folder / "log").open("w+b")
        self.process = subprocess.Popen(
            dies_with_us(command), env=environment, stdin=subprocess.DEVNULL, stdout=self.log, stderr=self.log
        )
        try:
            self._qtest, self._qmp = (self._accept(listener) for listener in self._sockets)
            self._read_qmp()  # the greeting
            self.qmp("qmp_capabilities")
        except (OSError, ValueError) as error:
            said = self.said()
            self.close()
            raise AssertionError(f"QEMU does not start: {said}") from error

    @staticmethod
    def _listen(path: Path) -> socket.socket:
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(os.fspath(path))
        listener.listen(1)
        listener.settimeout(0.2)
        return listener

    def _accept(self, listener: socket.socket) -> Any:
        for _ in range(100):
            try:
                connection, _ = listener.accept()
            except TimeoutError:
                assert self.process.poll() is None, self.said()
                continue
            connection.settimeout(20)
            stream = connection.makefile("rw")
            connection.close()
            return stream
        raise AssertionError("QEMU does not connect")

    def said(self) -> str:
        """What QEMU wrote to its standard error."""
        self.log.seek(0)
        return self.log.read().decode(errors="replace")

    # --- qtest and QMP -----------------------------------------------------------------------------------------------

    def tell(self, command: str) -> str:
        self._qtest.write(command + "\n")
        self._qtest.flush()
        while True:
            words = self._qtest.readline().split()
            assert words, f"QEMU is gone: {self.said()}"
            if words[0] != "IRQ":
                assert words[0] == "OK", words
                return words[-1]

    def qmp(self, command: str, **arguments: Any) -> Any:
        self._qmp.write(json.dumps({"execute": command, "arguments": arguments}) + "\n")
        self._qmp.flush()
        while True:
            answer = self._read_qmp()
            assert "error" not in answer, answer
            if "return" in answer:
                return answer["return"]

    def _read_qmp(self) -> dict[str, Any]:
        answer: dict[str, Any] = json.loads(self._qmp.readline())
        return answer

    def read(self, address: int, width: int = 4) -> int:
        return int(self.tell(f"read{_LETTERS[width]} {address:#x}"), 16)

    def write(self, address: int, value: int, width: int = 4) -> None:
        self.tell(f"write{_LETTERS[width]} {address:#x} {value:#x}")

    def memory(self, address: int, size: int) -> bytes:
        return bytes.fromhex(self.tell(f"read {address:#x} {size:#x}")[2:])

    def set_memory(self, address: int, data: bytes) -> None:
        self.tell(f"write {address:#x} {len(data):#x} 0x{data.hex()}")

    def config(self, where: tuple[int, int], offset: int, width: int = 4) -> int:
        self._select(where, offset)
        return int(self.tell(f"in{_LETTERS[width]} {0xCFC + (offset & 3):#x}"), 16)

    def set_config(self, where: tuple[int, int], offset: int, value: int, width: int = 4) -> None:
        self._select(where, offset)
        self.tell(f"out{_LETTERS[width]} {0xCFC + (offset & 3):#x} {value:#x}")

    def _select(self, where: tuple[int, int], offset: int) -> None:
        bus, slot = where
        self.tell(f"outl 0xcf8 {1 << 31 | bus << 16 | slot << 11 | offset & 0xFC:#x}")

    # --- end ---------------------------------------------------------------------------------------------------------

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        for stream in (getattr(self, "_qtest", None), getattr(self, "_qmp", None)):
            if stream is not None:
                stream.close()
        for listener in self._sockets:
            listener.close()
        self.log.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


_LETTERS = {1: "b", 2: "w", 4: "l", 8: "q"}

"""``vfiopy serve``."""

from __future__ import annotations

import re
import shlex
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from hashlib import blake2b
from pathlib import Path
from types import FrameType
from typing import Annotated

import typer

import vfiopy
from vfiopy import vfio_user
from vfiopy.cli.common import print_json, refusals_told
from vfiopy.cli.complete import complete_target
from vfiopy.emulated import PciDevice
from vfiopy.emulated.nvme import Namespace, Nvme

__all__ = ["run_serve"]

_UNITS = {"": 0, "K": 10, "M": 20, "G": 30, "T": 40}
_NVME = "emulated:nvme"
_MOST_IMAGES = 1024


def _bytes(text: str) -> int:
    found = re.fullmatch(r"(\d+)([KMGT]?)(?:i?B)?", text, re.IGNORECASE)
    if found is None or not int(found[1]):
        raise typer.BadParameter(f"'{text}' is no size; write 512M or 4G")
    return int(found[1]) << _UNITS[found[2].upper()]


def run_serve(
    target: Annotated[
        str,
        typer.Argument(
            help="An emulated device (edu, nvme), or a PCI address bound to vfio-pci.", autocompletion=complete_target
        ),
    ],
    socket: Annotated[Path, typer.Option(help="Where to listen; its folder is made with mode 0700.")],
    image: Annotated[
        list[Path] | None, typer.Option(help="nvme: the file or disk of a namespace. Can be given several times.")
    ] = None,
    size: Annotated[
        int | None,
        typer.Option(parser=_bytes, metavar="SIZE", help="nvme: make images that do not exist, of this size (1G)."),
    ] = None,
    block_size: Annotated[int, typer.Option(help="nvme: bytes of a logical block, 512 or 4096.")] = 512,
    read_only: Annotated[bool, typer.Option(help="nvme: never write the images.")] = False,
    trust_files: Annotated[
        bool, typer.Option(help="Map memory files that the client could make shorter: it can then end the server.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON and nothing else, when it listens.")] = False,
) -> None:
    """Offer a device on a vfio-user socket, for QEMU or vfiopy, until Ctrl-C or SIGTERM."""
    name = target if ":" in target else f"emulated:{target}"
    if name != _NVME and (image or size is not None or read_only or block_size != 512):
        raise typer.BadParameter(f"--image, --size, --block-size and --read-only are for nvme, not for {name}")
    if read_only and not image:
        raise typer.BadParameter("--read-only is about images; give --image")
    if len(image or []) > _MOST_IMAGES:
        raise typer.BadParameter(f"a controller has at most {_MOST_IMAGES} namespaces, not {len(image or [])}")
    if block_size not in (512, 4096):
        raise typer.BadParameter(f"a logical block has 512 or 4096 bytes, not {block_size}")
    leaving = _Leaving()
    before = signal.signal(signal.SIGTERM, leaving)
    try:
        with (
            refusals_told(),
            _device(name, image or [], size, block_size, read_only) as device,
            vfiopy.serve(device, socket, limits=vfio_user.Limits(trust_files=trust_files), guarded=True) as server,
        ):
            leaving.now_or_later()
            _tell(name, socket, server.qemu_option, as_json)
            with suppress(KeyboardInterrupt):
                server.run()
    finally:
        signal.signal(signal.SIGTERM, before)


class _Leaving:
    """What SIGTERM does: end the program once everything is made, so that all of it is closed.

    What was written goes to the disk first, and a second SIGTERM does not end that.
    """

    def __init__(self) -> None:
        self._made = self._asked = False

    def __call__(self, number: int, _frame: FrameType | None) -> None:
        signal.signal(number, signal.SIG_IGN)
        self._asked = True
        if self._made:
            sys.exit(0)

    def now_or_later(self) -> None:
        """Everything is made: leave at once from here on, and now where that was asked for already."""
        self._made = True
        if self._asked:
            sys.exit(0)


def _tell(name: str, socket: Path, qemu_option: str, as_json: bool) -> None:
    """Say that it listens, and how to use it."""
    here = f"vfio-user:{socket.absolute()}"
    if as_json:
        answer = {"target": name, "socket": str(socket.absolute()), "vfiopy": here, "qemu_device": qemu_option}
        print_json({"format": 1, **answer})
    else:
        # the option and the paths must stay in one piece, whatever the width of the terminal
        typer.echo(f"serving {name} at {socket}")
        typer.echo(f"QEMU:   -device {shlex.quote(qemu_option)}")
        typer.echo("        share its memory, or every DMA is a message: -m SIZE -machine memory-backend=ram \\")
        typer.echo("        -object memory-backend-memfd,id=ram,size=SIZE,share=on")
        typer.echo(f"vfiopy: vfiopy.open('{here}')")
    sys.stdout.flush()


@contextmanager
def _device(
    name: str, images: list[Path], size: int | None, block_size: int, read_only: bool
) -> Iterator[PciDevice | str]:
    """Make what is served; an NVMe controller's images are closed at the end."""
    if name != _NVME:
        yield name
        return
    namespaces: list[Namespace] = []
    try:
        for path in images:
            namespaces.append(Namespace.image(path, size=size, block_size=block_size, read_only=read_only))
        if not images:
            namespaces.append(Namespace.memory(64 << 20 if size is None else size, block_size=block_size))
        device = Nvme(namespaces, serial=_serial(images), most_namespaces=max(32, len(namespaces)))
    except BaseException:
        for namespace in namespaces:
            namespace.close()
        raise
    try:
        yield device
    finally:
        device.close()


def _serial(images: list[Path]) -> str | None:
    """Return a serial number that the same images have each time; memory has a new one, as its content is new."""
    if not images:
        return None
    names = "\0".join(str(path.resolve()) for path in images)
    return blake2b(names.encode(), digest_size=8).hexdigest().upper()

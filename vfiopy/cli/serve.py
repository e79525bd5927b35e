"""``vfiopy serve``."""

from __future__ import annotations

import shlex
import signal
import sys
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

import vfiopy
from vfiopy import vfio_user
from vfiopy.cli.common import refusals_told

__all__ = ["run_serve"]


def run_serve(
    target: Annotated[str, typer.Argument(help="An emulated device (edu), or a PCI address bound to vfio-pci.")],
    socket: Annotated[Path, typer.Option(help="Where to listen; its folder is made with mode 0700.")],
    trust_files: Annotated[
        bool, typer.Option(help="Map memory files that the client could make shorter: it can then end the server.")
    ] = False,
) -> None:
    """Offer a device on a vfio-user socket, for QEMU or vfiopy, until Ctrl-C or SIGTERM."""
    name = target if ":" in target else f"emulated:{target}"
    with refusals_told(), vfiopy.serve(name, socket, limits=vfio_user.Limits(trust_files=trust_files)) as server:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
        # JSON and paths must stay in one piece, whatever the width of the terminal
        typer.echo(f"serving {name} at {socket}")
        typer.echo(f"QEMU:   -device {shlex.quote(server.qemu_option)}")
        typer.echo("        share its memory, or every DMA is a message: -m SIZE -machine memory-backend=ram \\")
        typer.echo("        -object memory-backend-memfd,id=ram,size=SIZE,share=on")
        typer.echo(f"vfiopy: vfiopy.open('vfio-user:{socket.absolute()}')")
        sys.stdout.flush()
        with suppress(KeyboardInterrupt):
            server.run()

"""``vfiopy shell``: an interactive Python with the device open."""

from __future__ import annotations

import code
import gc
import sys
from contextlib import suppress
from typing import Annotated, Any

import typer

import vfiopy
from vfiopy import registers
from vfiopy.backend import RegionFlag, RegionIndex
from vfiopy.cli.common import refusals_told
from vfiopy.cli.place import BackendOption, MapOption, TargetArgument
from vfiopy.device import Device
from vfiopy.pci.words import size_words

__all__ = ["run_shell"]


def run_shell(
    target: TargetArgument,
    plain: Annotated[
        bool, typer.Option("--plain", help="Python's own console, even where IPython is installed.")
    ] = False,
    map_file: MapOption = None,
    backend: BackendOption = None,
) -> None:
    """Open a device and give you Python: device, bars, bar0 ..., config, dma, irqs, np, vfiopy; regs with --map.

    Reads nothing of the device by itself. Uses IPython where it is installed (pip install 'vfiopy[shell]'). However it
    ends, bus mastering is switched off and the device is closed.
    """
    with refusals_told(), vfiopy.open(target, backend=backend) as device:
        names = _names(device)
        if map_file is not None:
            names["regs"] = registers.load(map_file).on(device.bars[_first_bar(device)])
        banner = _banner(device, names)
        try:
            _console(names, banner, plain)
        finally:
            _forget(names)


def _first_bar(device: Device) -> int:
    return next((index for index in range(len(device.bars)) if index in device.bars), 0)


def _names(device: Device) -> dict[str, Any]:
    import numpy as np  # noqa: PLC0415  takes 0.1 s that the other commands need not

    names: dict[str, Any] = {
        "vfiopy": vfiopy,
        "np": np,
        "device": device,
        "bars": device.bars,
        "config": device.config,
        "dma": device.dma,
        "irqs": device.irqs,
    }
    for index in range(RegionIndex.BAR5 + 1):
        if index in device.bars:
            names[f"bar{index}"] = device.bars[index]
    return names


def _banner(device: Device, names: dict[str, Any]) -> str:
    lines = [
        f"vfiopy {vfiopy.__version__}: {device.name}, open by {device.backend}; nothing was read of it",
        "  device   reset(), bus_master (off until you set it), memory_enabled, region(6)",
        "  config   config.command, config.read16(0x6), config.capabilities()",
    ]
    for index in range(RegionIndex.BAR5 + 1):
        if f"bar{index}" in names:
            info = device.bars.info(index)
            mapped = "mapped" if RegionFlag.MMAP in info.flags else "not mapped"
            size = size_words(info.size)
            lines.append(f"  bar{index}     {size}, {mapped}: bar{index}.read32(0x0); also bars[{index}]")
    lines += [
        "  dma      dma.allocate(4096, dtype='u4'): a buffer that knows its .iova",
        "  irqs     irqs.msix.enable(1)[0].wait(timeout=1.0)",
    ]
    if "regs" in names:
        lines.append(f"  regs     registers by name: {', '.join(list(names['regs'].spec.members)[:4])}, ...")
    lines.append("  np, vfiopy. The device is closed when you leave (Ctrl-D).")
    return "\n".join(lines)


def _console(names: dict[str, Any], banner: str, plain: bool) -> None:
    if not plain:
        try:
            import IPython  # noqa: PLC0415  an extra
            from traitlets.config import Config  # noqa: PLC0415
        except ModuleNotFoundError:
            banner += "\n(IPython is not installed: pip install 'vfiopy[shell]')"
        else:
            settings = Config()
            settings.TerminalInteractiveShell.banner1 = f"{banner}\n"
            settings.TerminalInteractiveShell.banner2 = ""
            settings.TerminalInteractiveShell.enable_tip = False
            settings.Completer.evaluation = "limited"  # completing a name must not run a property that reads registers
            settings.Completer.use_jedi = False
            IPython.start_ipython(argv=[], user_ns=names, config=settings)
            return
    with suppress(SystemExit):  # exit() is how people leave
        code.interact(banner=banner, local=names, exitmsg="")


def _forget(names: dict[str, Any]) -> None:
    """Let go of what was made in the shell: a numpy view of a BAR would keep the device from being closed."""
    names.clear()
    for last in ("last_value", "last_traceback", "last_exc"):
        if hasattr(sys, last):
            delattr(sys, last)
    gc.collect()

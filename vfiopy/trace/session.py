"""``vfiopy.tracing()``: from devices and a sink to a trace."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from vfiopy.device import Device
from vfiopy.trace.perfetto import Perfetto
from vfiopy.trace.places import Place, Selection
from vfiopy.trace.recorder import Recorder, Sink
from vfiopy.trace.sinks import JsonLines
from vfiopy.trace.watch import DeviceWatch

__all__ = ["tracing"]


@contextmanager
def tracing(
    devices: Device | Iterable[Device],
    sink: Sink | str | Path,
    *,
    only: Iterable[str | Place] = (),
    contents: bool = False,
    keep: int | None = None,
    sync: bool = False,
) -> Iterator[Recorder]:
    """Trace devices for the length of a ``with`` block: register accesses, interrupts, maps, unmaps, resets, errors.

    Reads nothing that the program does not read, changes no access, and keeps no device open. What is not selected
    stays as fast as without a trace. Accesses through numpy views and addresses are not seen: a ``"hold"`` event and an
    :class:`UntracedWarning` say where that is so.

    Args:
        devices: one, or several.
        sink: where to: a sink of :mod:`vfiopy.trace`, or a path, which becomes a trace for Perfetto when it ends in
            ``.json`` or ``.perfetto``, and JSON lines otherwise.
        only: what to trace: ``"bar0"``, ``"bar0:0x20-0x3f"``, ``"config"``, ``"irq"``, ``"dma"``; all by default.
        contents: record what DMA memory holds, too, before each register write and unmap, as far as it changed. Slow.
        keep: keep this many events at most, the last ones.
        sync: hand each event to the sink before the program goes on.

    Raises:
        BusyError: a device is being traced already.
        ValueError: ``only`` has something that is no place.
        VfioError: at the end: the sink failed, and events were lost.
    """
    selection = Selection(only)
    if isinstance(sink, str | Path):
        sink = Perfetto(sink) if str(sink).endswith((".json", ".perfetto")) else JsonLines(sink)
    recorder = Recorder(sink, keep=keep, sync=sync)
    watches: list[DeviceWatch] = []
    try:
        for device in (devices,) if isinstance(devices, Device) else devices:
            watches.append(DeviceWatch(device, recorder, selection, contents=contents))
        del device, devices  # a trace keeps no device
        yield recorder
    finally:
        for watch in watches:
            watch.stop()
        recorder.close()

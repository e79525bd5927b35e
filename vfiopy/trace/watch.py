"""What makes events of a device's doings: an observer of the device, its regions, interrupts and address space."""

from __future__ import annotations

import os
import sys
import warnings
import weakref
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any, cast

from vfiopy.backend import MemoryKind, Prot
from vfiopy.device import Device
from vfiopy.iova import STATE_LIVE, IovaMapping
from vfiopy.mmio import Region
from vfiopy.trace.event import region_word
from vfiopy.trace.places import Place, Selection
from vfiopy.trace.recorder import Recorder

__all__ = ["DeviceWatch", "UntracedWarning"]

_PACKAGE = str(Path(__file__).resolve().parents[1]) + os.sep
_PROGRAMS = tuple(_PACKAGE + name + os.sep for name in ("drivers", "selftest", "cli"))
_PAGE = 4096
_is_ours: dict[str, bool] = {}


class UntracedWarning(UserWarning):
    """A part of a traced region is reached by its address (a numpy view, a hold): these accesses are not seen."""


def _caller(frame: FrameType | None) -> str:
    """``file:line`` of the first frame that is not this package's, but for its drivers and programs."""
    while frame is not None:
        name = frame.f_code.co_filename
        ours = _is_ours.get(name)
        if ours is None:
            inside = name.startswith(_PACKAGE) and not name.startswith(_PROGRAMS)
            ours = _is_ours[name] = inside or name.endswith(os.sep + "contextlib.py")
        if not ours:
            return f"{name}:{frame.f_lineno}"
        frame = frame.f_back
    return ""


class DeviceWatch:
    """Reports one device to a recorder, from now until :meth:`stop` or the device's end.

    Keeps neither the device nor its memory.

    Args:
        device: the device.
        recorder: where events go.
        selection: which of them.
        contents: record what memory holds, before each register write and each unmap, as far as it changed.

    Raises:
        BusyError: the device is being traced already.
    """

    def __init__(self, device: Device, recorder: Recorder, selection: Selection, *, contents: bool = False) -> None:
        self.name = device.name
        self._recorder = recorder
        self._selection = selection
        self._contents: dict[int, bytes] | None = {} if contents else None
        self._device: Callable[[], Device | None] = weakref.ref(device)
        self._space = weakref.ref(device.space)
        device.observe(self)
        try:
            self._add("open", facts=_description(device))
            for index, region in device.open_regions():
                self.region_opened(index, region)
            if selection.has("dma"):
                device.space.observe(self)
                for mapping in device.space.book.mappings():
                    self._add("map", facts={**_mapped(mapping), "existing": True})
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """End it: every access is fast again. Idempotent."""
        space = self._space()
        if space is not None:
            space.ignore(self)
        device = self._device()
        if device is None:
            return
        for _, region in device.open_regions():
            if getattr(region.trace, "watch", None) is self:
                region.set_trace(None)
        device.observe(None)
        self._device = _nobody

    def _add(self, kind: str, *, facts: Mapping[str, Any]) -> None:
        self._recorder.add(kind, self.name, _caller(sys._getframe(1)), facts=facts)

    # --- registers -----------------------------------------------------------------------------------------------

    def region_opened(self, index: int, region: Region) -> None:
        """Have a region report, if it is selected."""
        word = region_word(index)
        if not self._selection.has(word):
            return
        region.set_trace(RegionReport(self, self._recorder, word, self._selection.part(word)))
        for label in region.holds:
            self.bypassed(word, 0, region.size, label)

    def bypassed(self, word: str, offset: int, size: int, label: str) -> None:
        """Tell the trace, and the program, of accesses that will not be seen."""
        caller = _caller(sys._getframe(1))
        facts = {"region": word, "offset": offset, "size": size, "label": label}
        self._recorder.add("hold", self.name, caller, facts=facts)
        file, _, line = caller.rpartition(":")
        warnings.warn_explicit(
            f"{self.name} {word}: '{label}' reaches {size:#x} bytes at {offset:#x} by their address; such accesses "
            "are not in the trace",
            UntracedWarning,
            file or "?",
            int(line or 0),
        )

    def _config(self, facts: Mapping[str, Any]) -> None:
        if not self._selection.has("config"):
            return
        part = self._selection.part("config")
        offset, size, data = facts["offset"], facts["size"], facts.get("data")
        if part is not None and not any(place.meets(offset, size) for place in part):
            return
        value = None if data is None else int.from_bytes(data, "little")
        self._recorder.add(
            facts["operation"], self.name, _caller(sys._getframe(2)), "config", offset, size, value, {}
        )

    # --- the rest ------------------------------------------------------------------------------------------------

    def tell(self, kind: str, facts: Mapping[str, Any], error: BaseException | None = None) -> None:
        """Hear of what is not a register: see :class:`vfiopy.observing.Observer`."""
        if kind == "unmapping":
            self.save_memory("unmap")
        elif error is not None:
            self._failed(kind, facts, error)
        elif kind == "config":
            self._config(facts)
        elif kind == "map":
            kind_of_memory = MemoryKind(facts["memory"].kind).name.lower()
            rest = {"prot": _rights(facts["prot"]), "memory": kind_of_memory, "limit": facts["limit"]}
            self._add("map", facts={"iova": facts["iova"], "size": facts["size"], **rest})
        elif kind == "unmap":
            self._add("unmap", facts={"iova": facts["iova"], "size": facts["size"], "bytes": facts["count"]})
            self._forget_memory(facts["iova"], facts["size"] or facts["count"])
        elif kind != "irq" or self._selection.has("irq"):
            self._add(kind, facts=facts)
        if kind == "close":
            self._device = _nobody
            space = self._space()
            if space is not None:  # others may go on in it
                space.ignore(self)

    def _failed(self, kind: str, facts: Mapping[str, Any], error: BaseException) -> None:
        if kind in ("irq", "config") and not self._selection.has(kind):
            return
        names = ("operation", "iova", "size", "offset", "interrupt", "vector")
        plain = {name: facts[name] for name in names if name in facts}
        operation = f"{kind} {plain.pop('operation')}" if "operation" in plain else kind
        self._add("error", facts={"operation": operation, **plain, **describe_error(error)})

    def vector_made(self, kind: str, number: int) -> Callable[[int], object] | None:
        """Have a vector report what is taken from it."""
        if not self._selection.has("irq"):
            return None

        def taken(count: int) -> None:
            operation = "taken" if count > 0 else "returned"
            facts = {"operation": operation, "interrupt": kind, "vector": number, "count": abs(count)}
            self._recorder.add("irq", self.name, _caller(sys._getframe(1)), facts=facts)

        return taken

    # --- memory --------------------------------------------------------------------------------------------------

    def _forget_memory(self, iova: int, size: int) -> None:
        """What comes to these IOVAs next is other memory."""
        if self._contents:
            for page in [page for page in self._contents if iova <= page < iova + size]:
                del self._contents[page]

    def save_memory(self, when: str) -> None:
        """Record the pages of mapped memory that changed since the last time."""
        space = self._space()
        if self._contents is None or space is None:
            return
        # Not by address: another thread may unmap and free the memory meanwhile.
        memory = os.open("/proc/self/mem", os.O_RDONLY | os.O_CLOEXEC)
        try:
            for found in space.book.mappings():
                if found.kind in (MemoryKind.HOST, MemoryKind.FILE) and found.address and found.state == STATE_LIVE:
                    with suppress(OSError):
                        self._save_changed(found.iova, os.pread(memory, found.size, found.address), when)
        finally:
            os.close(memory)

    def _save_changed(self, iova: int, data: bytes, when: str) -> None:
        if self._contents is None:
            return
        for at in range(0, len(data), _PAGE):
            page, before = data[at : at + _PAGE], self._contents.get(iova + at)
            if page != (bytes(len(page)) if before is None else before):
                self._contents[iova + at] = page
                self._add("memory", facts={"iova": iova + at, "when": when, "data": page.hex()})


class RegionReport:
    """What a traced region calls for each access."""

    def __init__(self, watch: DeviceWatch, recorder: Recorder, word: str, part: tuple[Place, ...] | None) -> None:
        self.watch = watch
        self._add = recorder.add
        self._missed = recorder.missed
        self._device = watch.name
        self._word = word
        self._part = part

    def __call__(self, operation: str, offset: int, width: int, value: Any) -> None:
        """Make an event of it: see ``Region.set_trace``."""
        if operation == "hold":
            self.watch.bypassed(self._word, offset, width, value)
            return
        if self._part is not None and not any(place.meets(offset, width) for place in self._part):
            return
        try:
            caller = _caller(sys._getframe(1))
            if isinstance(value, int):
                if operation == "write":
                    self.watch.save_memory("write")
                self._add(operation, self._device, caller, self._word, offset, width, value)
            elif operation == "poll":
                mask, wanted = cast("tuple[int, int]", value)
                self._add("poll", self._device, caller, self._word, offset, width, wanted, {"mask": mask})
            else:
                facts = {"operation": operation, **describe_error(value)}
                self._add("error", self._device, caller, self._word, offset, width, None, facts)
        except BaseException:  # a KeyboardInterrupt on the way
            self._missed()
            raise


def describe_error(error: BaseException) -> dict[str, str]:
    """Return an exception's class and first line."""
    return {"error": type(error).__name__, "text": (str(error).splitlines() or [""])[0]}


def _description(device: Device) -> dict[str, Any]:
    infos = [device.io.region_info(index) for index in range(device.info.num_regions)]
    return {
        "backend": device.backend,
        "space": device.space.name,
        "regions": {region_word(info.index): info.size for info in infos if info.size},
    }


def _rights(prot: int) -> str:
    return ("r" if prot & Prot.READ else "") + ("w" if prot & Prot.WRITE else "")


def _mapped(found: IovaMapping) -> dict[str, Any]:
    memory = MemoryKind(found.kind).name.lower()
    return {"iova": found.iova, "size": found.size, "prot": _rights(found.prot), "memory": memory}


def _nobody() -> None:
    """Stand in for a reference to a device that is not watched any more."""

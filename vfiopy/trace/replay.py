"""Playing a trace against a device, and comparing what it answers."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from vfiopy.backend import Prot
from vfiopy.device import Device, Interrupt
from vfiopy.dma import DmaArray
from vfiopy.errors import VfioError, VfiopyError, VfioTimeoutError
from vfiopy.mmio import Region
from vfiopy.trace.event import Event
from vfiopy.trace.places import Place
from vfiopy.trace.plan import Step, plan

__all__ = ["Difference", "Outcome", "Replay"]

# What the system sets, and no two machines alike (PCIe 6.0, 7.5.1): I/O decoding, parity and SERR# of the command
# register, base addresses, ROM address, interrupt line.
_ASSIGNED = (
    Place("config", 0x04, 0x04, 0x0141),
    Place("config", 0x10, 0x27),
    Place("config", 0x30, 0x33),
    Place("config", 0x3C, 0x3C),
)
_INDEXES = {**{f"bar{number}": number for number in range(6)}, "rom": 6, "vga": 8}


@dataclass(frozen=True, slots=True)
class Difference:
    """Where the device did something else than in the trace.

    Attributes:
        number: of the event in the trace, from 1.
        event: what was recorded.
        found: the value that was read now, or None where it is not about a value.
        text: in words.
    """

    number: int
    event: Event
    found: int | None
    text: str


@dataclass(slots=True)
class Outcome:
    """What came of a replay.

    Attributes:
        played: steps that were done.
        compared: values that were compared.
        relocated: DMA buffers that could not be had at the IOVA of the trace.
        skipped: what could not be played, by reason.
        differences: in order.
    """

    played: int = 0
    compared: int = 0
    relocated: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    differences: list[Difference] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether there is no difference."""
        return not self.differences


@dataclass(frozen=True, slots=True)
class _Buffer:
    """A recorded mapping and what stands for it."""

    iova: int
    size: int
    array: DmaArray

    def translate(self, address: int) -> int | None:
        if self.iova <= address < self.iova + self.size:
            return self.array.iova + (address - self.iova)
        return None


class Replay:
    """Plays the events of one device, one after the other, in this thread.

    Values that lie in a recorded mapping are taken for IOVAs: where a buffer could not be had at the same IOVA, they
    become those of the buffer that stands for it.

    Args:
        device: to play them against.
        events: of one device.
        check: compare each value that is read.
        ignore: registers, or bits of them, that may differ.
        timeout: seconds to wait for an interrupt, and for a register that is polled.
        pace: leave at least the time between events that was recorded.
        exact: see :func:`vfiopy.trace.plan.plan`.
    """

    def __init__(
        self,
        device: Device,
        events: Sequence[Event],
        *,
        check: bool = False,
        ignore: Sequence[Place] = (),
        timeout: float = 1.0,
        pace: bool = False,
        exact: bool = False,
    ) -> None:
        self.device = device
        self.outcome = Outcome()
        self.steps = plan(events, exact=exact)
        self._check = check
        self._ignore = (*ignore, *_ASSIGNED)
        self._timeout = timeout
        self._pace = pace
        self._buffers: list[_Buffer] = []
        self._pages: dict[int, bytes] = {}  # recorded IOVA of a page → what it held last
        # the strictest that was asked for holds for what was there before
        self._limit = min((one.facts["limit"] for one in events if "limit" in one.facts), default=(1 << 64) - 1)
        self._pending: Counter[tuple[str, int]] = Counter()

    def run(self, progress: Callable[[int], object] = lambda _: None) -> Outcome:
        """Play all of it; calls ``progress`` with the number of steps that are done. Buffers are freed at the end."""
        begin = time.monotonic_ns()
        first = self.steps[0].event.time if self.steps else 0
        try:
            for done, step in enumerate(self.steps, 1):
                if self._pace:
                    ahead = (step.event.time - first) - (time.monotonic_ns() - begin)
                    time.sleep(max(ahead, 0) / 1e9)
                self._play(step)
                progress(done)
        finally:
            for buffer in self._buffers:
                buffer.array.free()
        return self.outcome

    def _play(self, step: Step) -> None:
        play = getattr(self, f"_play_{step.event.kind}", None)
        if play is None:
            self.outcome.skipped[f"{step.event.kind} events"] += 1
            return
        try:
            play(step)
        except VfiopyError as error:
            self._differs(step, None, f"{type(error).__name__}: {str(error).splitlines()[0]}")
        else:
            self.outcome.played += 1

    def _differs(self, step: Step, found: int | None, text: str) -> None:
        self.outcome.differences.append(Difference(step.number, step.event, found, text))

    # --- registers -----------------------------------------------------------------------------------------------

    def _region(self, word: str) -> Region:
        return self.device.region(_INDEXES[word] if word in _INDEXES else int(word.removeprefix("region")))

    def _read(self, event: Event) -> int:
        offset, width = event.offset or 0, event.width or 0
        if event.region == "config":
            return int.from_bytes(self.device.config.read(offset, width), "little")
        value: int = getattr(self._region(event.region or ""), f"read{8 * width}")(offset)
        return value

    def _play_read(self, step: Step) -> None:
        event = step.event
        recorded = event.value or 0
        relevant = self._relevant_bits(event)
        if step.mask is None or not step.mask & relevant:
            self._compare(step, self._read(event), recorded, relevant)
            return
        mask = step.mask & relevant
        found = self._poll(event, mask, recorded)
        if (found ^ recorded) & mask:
            self._differs(step, found, f"read {found:#x}, and not {recorded:#x} within {self._timeout} s")
        else:
            self._compare(step, found, recorded, relevant)

    def _poll(self, event: Event, mask: int, value: int) -> int:
        """Read until the value is there, or the time is over; return what was read last."""
        deadline = time.monotonic() + self._timeout
        while True:
            late = time.monotonic() >= deadline
            now = self._read(event)
            if late or not (now ^ value) & mask:
                return now
            time.sleep(0.0001)

    def _relevant_bits(self, event: Event) -> int:
        width = event.width or 0
        bits = (1 << 8 * width) - 1
        for place in self._ignore:
            if place.word != event.region or not place.meets(event.offset or 0, width):
                continue
            if place.mask is None:
                return 0
            shift = 8 * (place.first - (event.offset or 0))
            bits &= ~(place.mask << shift if shift >= 0 else place.mask >> -shift)
        return bits

    def _compare(self, step: Step, found: int, recorded: int, relevant: int) -> None:
        if not self._check or not relevant:
            return
        self.outcome.compared += 1
        if (found ^ recorded) & relevant and (found ^ self._relocate(recorded)) & relevant:
            ignored = "" if relevant == (1 << 8 * (step.event.width or 0)) - 1 else f", compared bits {relevant:#x}"
            self._differs(step, found, f"read {found:#x} instead of {recorded:#x}{ignored}")

    def _play_write(self, step: Step) -> None:
        event = step.event
        offset, width, value = event.offset or 0, event.width or 0, event.value or 0
        if event.region == "config":
            self.device.config.write(offset, value.to_bytes(width, "little"))
            return
        moved = self._relocate(value)
        if moved >> 8 * width:
            raise VfioError(
                f"the buffer that stands for {value:#x} is at {moved:#x}, which the register cannot hold",
                object=self.device.name,
            )
        getattr(self._region(event.region or ""), f"write{8 * width}")(offset, moved)

    def _play_error(self, step: Step) -> None:
        event = step.event
        operation, name = event.facts["operation"], event.facts["error"]
        if event.region is None or operation not in ("read", "write"):
            self.outcome.skipped[f"failed {operation} events"] += 1
            return
        if operation == "write":
            return  # its write event was played; what was refused before it has none, and no value either
        try:
            found = self._read(event)
        except VfiopyError as error:
            if type(error).__name__ != name:
                self._differs(step, None, f"raised {type(error).__name__} instead of {name}")
        else:
            self._differs(step, found, f"read {found:#x} where {name} was raised")

    # --- interrupts ----------------------------------------------------------------------------------------------

    def _play_irq(self, step: Step) -> None:
        facts = step.event.facts
        interrupt: Interrupt = getattr(self.device.irqs, facts["interrupt"])
        operation, vector = facts["operation"], facts.get("vector", 0)
        if operation == "enable":
            interrupt.enable(facts["count"])
        elif operation == "disable":
            interrupt.disable()
        elif operation == "taken":
            self._await(step, interrupt, vector)
        elif operation == "returned":
            self._pending[interrupt.name, vector] += facts["count"]
        elif operation == "trigger":
            interrupt[vector].trigger()
        else:
            getattr(interrupt, operation)(vector)  # mask, unmask, replace

    def _await(self, step: Step, interrupt: Interrupt, vector: int) -> None:
        key = (interrupt.name, vector)
        wanted = step.event.facts["count"]
        try:
            while self._pending[key] < wanted:
                self._pending[key] += interrupt[vector].wait(self._timeout)
        except VfioTimeoutError:
            seen = self._pending.pop(key, 0)
            of = f"{seen} of {wanted}, no more" if seen else "none"
            self._differs(step, None, f"interrupts of {interrupt.name} vector {vector} within {self._timeout} s: {of}")
        else:
            self._pending[key] -= wanted

    # --- DMA -----------------------------------------------------------------------------------------------------

    def _relocate(self, value: int) -> int:
        for buffer in self._buffers:
            moved = buffer.translate(value)
            if moved is not None:
                return moved
        return value

    def _play_map(self, step: Step) -> None:
        facts = step.event.facts
        iova, size = facts["iova"], facts["size"]
        prot = (Prot.READ if "r" in facts["prot"] else Prot(0)) | (Prot.WRITE if "w" in facts["prot"] else Prot(0))
        limit = facts.get("limit", self._limit)
        allocate: Callable[..., DmaArray] = self.device.space.allocate
        try:
            array = allocate(size, prot=prot, iova=iova, limit=limit)
        except VfioError:
            array = allocate(size, prot=prot, limit=limit)
            self.outcome.relocated += 1
        self._buffers.append(_Buffer(iova, size, array))
        if facts["memory"] not in ("host", "file"):
            self.outcome.skipped[f"mappings of {facts['memory']} memory, replaced by plain memory"] += 1

    def _play_unmap(self, step: Step) -> None:
        facts = step.event.facts
        last = facts["iova"] if facts["size"] is None else facts["iova"] + facts["size"] - 1
        for buffer in [one for one in self._buffers if facts["iova"] <= one.iova <= last]:
            self._buffers.remove(buffer)
            buffer.array.free()
            for page in [page for page in self._pages if buffer.iova <= page < buffer.iova + buffer.size]:
                del self._pages[page]

    def _play_memory(self, step: Step) -> None:
        facts = step.event.facts
        data = bytes.fromhex(facts["data"])
        for buffer in self._buffers:
            at = facts["iova"] - buffer.iova
            if 0 <= at < buffer.size:
                found = buffer.array[at : at + len(data)]
                before = self._pages.get(facts["iova"], bytes(len(data)))
                if self._check:
                    # what the program wrote is still to come, but not at the end
                    self._compare_memory(step, bytes(found), data, before if facts["when"] == "write" else data)
                found[:] = memoryview(data)
                self._pages[facts["iova"]] = data

    def _compare_memory(self, step: Step, found: bytes, recorded: bytes, before: bytes) -> None:
        self.outcome.compared += 1
        for at, (now, wanted, earlier) in enumerate(zip(found, recorded, before, strict=True)):
            if now not in (wanted, earlier):
                place = f"IOVA {step.event.facts['iova'] + at:#x}"
                self._differs(step, now, f"memory at {place} holds {now:#x} instead of {wanted:#x}")
                return

    # --- life ----------------------------------------------------------------------------------------------------

    def _play_reset(self, _: Step) -> None:
        self.device.reset()

    def _play_open(self, step: Step) -> None:
        wanted: dict[str, Any] = step.event.facts["regions"]
        for word, size in wanted.items():
            index = 7 if word == "config" else _INDEXES.get(word)
            if index is None or not self._check or word in ("rom", "vga"):
                continue
            found = self.device.io.region_info(index).size
            if found != size and word != "config":
                self._differs(step, found, f"{word} has {found:#x} bytes instead of {size:#x}")

    def _play_close(self, _: Step) -> None:
        """Nothing: whoever opened the device closes it."""

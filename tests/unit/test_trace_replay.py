"""Playing a trace again: on the same device, on one behind a socket, on one that changed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from json_schema import check_schema
from typer.testing import CliRunner
from ways import WAYS, opened, served

import vfiopy
from vfiopy.cli.app import app
from vfiopy.device.irqs import _WORDS
from vfiopy.drivers.edu import EduDriver
from vfiopy.emulated import Edu, PciDevice
from vfiopy.errors import VfioError
from vfiopy.trace import Collect, Event, JsonLines, Place, tracing
from vfiopy.trace.plan import plan
from vfiopy.trace.reader import read_trace
from vfiopy.trace.replay import Outcome, Replay

runner = CliRunner()


def record(use: Callable[[vfiopy.Device], object], **options: Any) -> list[Event]:
    sink = Collect()
    with vfiopy.open(Edu()) as device, tracing(device, sink, **options):
        use(device)
    return sink.events


def replay(events: list[Event], model: PciDevice, way: str = "emulated", **options: Any) -> Outcome:
    with opened(model, way) as device:
        return Replay(device, events, check=True, **options).run()


def use_all(device: vfiopy.Device) -> None:
    """What the example does: everything that the device has."""
    edu = EduDriver(device)
    device.bus_master = True
    edu.invert(0x12345678)
    assert edu.factorial(12) == 479001600
    for kind in ("msi", "intx"):
        edu.enable_interrupts(kind)  # type: ignore[arg-type]
        edu.factorial(10)
        edu.raise_interrupt(0x42)
        edu.wait_interrupt()
        with device.dma.allocate(4096) as source, device.dma.allocate(8192) as target:
            source[:64] = range(64)
            edu.load(source.iova, 64)
            edu.store(target.iova + 0x100, 64)
            assert list(target[0x100:0x140]) == list(range(64))
        edu.disable_interrupts()


@pytest.fixture(scope="module")
def everything() -> list[Event]:
    return record(use_all, contents=True)


@pytest.mark.parametrize("way", WAYS)
def test_the_same_device_does_the_same(everything: list[Event], way: str) -> None:
    outcome = replay(everything, Edu(), way)
    assert outcome.differences == []
    assert outcome.compared > 20
    assert not outcome.skipped


def test_the_accesses_are_those_of_the_trace(everything: list[Event]) -> None:
    sink = Collect()
    with vfiopy.open(Edu()) as device, tracing(device, sink):
        Replay(device, everything).run()

    def writes(events: list[Event]) -> list[tuple[object, ...]]:
        return [(one.region, one.offset, one.width, one.value) for one in events if one.kind == "write"]

    assert writes(sink.events) == writes(everything)


class Wrong(Edu):
    """Says another version, and inverts one bit less."""

    def read(self, bar: int, offset: int, width: int) -> int:
        value = super().read(bar, offset, width)
        return value ^ 0x0100_0000 if offset == 0 else value ^ 1 if offset == 4 else value


def test_a_changed_device_is_told(everything: list[Event]) -> None:
    outcome = replay(everything, Wrong())
    first, second = outcome.differences
    assert (first.event.offset, first.found) == (0, 0x000000ED)
    assert first.text == "read 0xed instead of 0x10000ed"
    assert (second.event.offset, second.event.value, second.found) == (4, 0xEDCBA987, 0xEDCBA986)
    assert not replay(everything, Wrong(), ignore=[Place.parse("bar0:4")]).ok
    ignored = [Place.parse("bar0:4&1"), Place.parse("bar0:0x3&0x1")]
    assert replay(everything, Wrong(), ignore=ignored).differences == []
    with vfiopy.open(Wrong()) as device:
        assert Replay(device, everything).run().ok  # nobody asked


class Silent(Edu):
    """Never interrupts."""

    def interrupt(self, *_: Any, **__: Any) -> None:
        pass


def test_an_interrupt_that_does_not_come(everything: list[Event]) -> None:
    outcome = replay(everything, Silent(), timeout=0.05)
    texts = [one.text for one in outcome.differences if one.event.kind == "irq"]
    assert texts[0] == "interrupts of emulated:edu MSI vector 0 within 0.05 s: none"
    assert len(texts) == 8


class Stuck(Edu):
    """Its DMA moves other bytes."""

    def read(self, bar: int, offset: int, width: int) -> int:
        self._buffer[0] = 0xEE
        return super().read(bar, offset, width)


def test_memory_that_the_device_wrote_differently(everything: list[Event]) -> None:
    outcome = replay(everything, Stuck())
    assert "memory at IOVA 0x2100 holds 0xee instead of 0x0" in [one.text for one in outcome.differences]


def test_buffers_that_have_to_be_elsewhere(everything: list[Event]) -> None:
    with vfiopy.AddressSpace() as space, vfiopy.open(Edu(), space=space) as device:
        held = space.allocate(4 << 20, iova=0x1000)
        outcome = Replay(device, everything, check=True).run()
        held.free()
    assert outcome.differences == []
    assert outcome.relocated == 4


def test_a_register_too_narrow_for_where_the_buffer_is() -> None:
    def use(device: vfiopy.Device) -> None:
        with device.dma.allocate(4096, iova=0x8000) as buffer:
            device.bars[0].write16(0x4, buffer.iova)

    events = record(use)
    with vfiopy.AddressSpace() as space, vfiopy.open(Edu(), space=space) as device:
        held = space.allocate(0xF000, iova=0x1000)
        outcome = Replay(device, events).run()
        held.free()
    (one,) = outcome.differences
    assert one.text.endswith("the buffer that stands for 0x8000 is at 0x10000, which the register cannot hold")


def test_a_space_without_room_names_the_map(everything: list[Event]) -> None:
    with vfiopy.AddressSpace() as space, vfiopy.open(Edu(), space=space) as device:
        held = space.map(vfiopy.file_memory(_memfd(0xF000_0000), 0xF000_0000), iova=0x1000)
        outcome = Replay(device, [one for one in everything if one.kind in ("map", "unmap")]).run()
        held.unmap()
    assert {one.event.kind for one in outcome.differences} == {"map"}
    assert "NoSpaceError" in outcome.differences[0].text or "IovaRangeError" in outcome.differences[0].text


def _memfd(size: int) -> int:
    import os  # noqa: PLC0415

    fd = os.memfd_create("big")
    os.ftruncate(fd, size)
    return fd


def test_errors_are_expected() -> None:
    def use(device: vfiopy.Device) -> None:
        bar = device.bars[0]
        for _ in range(2):
            with pytest.raises(vfiopy.AddressRangeError):
                bar.read32(bar.size)

    events = record(use)
    assert replay(events, Edu()).ok
    other = [one._replace(offset=0) if one.kind == "error" else one for one in events]
    assert replay(other, Edu()).differences[0].text == "read 0x10000ed where AddressRangeError was raised"


def test_a_target_without_the_region() -> None:
    event = Event(0, "read", "x", 1, "", "bar2", 0, 4, 5)
    outcome = replay([event], Edu())
    assert "NotSupportedError" in outcome.differences[0].text


def test_pace() -> None:
    import time  # noqa: PLC0415

    events = [Event(at, "read", "x", 1, "", "bar0", 0, 4, 0x010000ED) for at in (0, 50_000_000)]
    begin = time.monotonic()
    assert replay(events, Edu(), pace=True, exact=True).ok
    assert time.monotonic() - begin >= 0.05


# --- the plan ---


def reads(*values: int, offset: int = 0, thread: int = 1, caller: str = "a:1") -> list[Event]:
    return [Event(0, "read", "x", thread, caller, "bar0", offset, 4, value) for value in values]


def poll(mask: int, value: int) -> Event:
    return Event(0, "poll", "x", 1, "a:1", "bar0", 0, 4, value, {"mask": mask})


@pytest.mark.parametrize(
    ("events", "steps"),
    [
        (reads(5), [(1, None, 1)]),
        (reads(1, 1, 1, 0), [(4, 0xFFFFFFFF, 4)]),
        (reads(1, 0), [(2, 0xFFFFFFFF, 2)]),
        (reads(1, 1, 1), [(1, None, 1), (2, None, 1), (3, None, 1)]),  # nothing came of it: a FIFO, perhaps
        (reads(1, 2, 3), [(1, None, 1), (2, None, 1), (3, None, 1)]),  # a FIFO
        (reads(1) + reads(0, caller="b:2"), [(1, None, 1), (2, None, 1)]),
        (reads(1) + reads(0, offset=4), [(1, None, 1), (2, None, 1)]),
        ([poll(1, 0), *reads(1, 1, 0)], [(4, 1, 3)]),
        ([poll(1, 0), *reads(0)], [(2, 1, 1)]),
        ([poll(1, 0), *reads(0, 7)], [(2, 1, 1), (3, None, 1)]),
        ([poll(1, 0), *reads(1, 1)], [(2, None, 1), (3, None, 1)]),  # it timed out
        ([poll(1, 0)], []),
    ],
)
def test_plan(events: list[Event], steps: list[tuple[int, int | None, int]]) -> None:
    assert [(step.number, step.mask, step.reads) for step in plan(events)] == steps


def test_a_poll_that_another_thread_ends_comes_after_what_ended_it() -> None:
    write = Event(0, "write", "x", 2, "b:1", "bar0", 4, 4, 1)
    steps = plan([*reads(1, 1), write, *reads(1, 0)])
    assert [(step.event.kind, step.number) for step in steps] == [("write", 3), ("read", 5)]


def test_an_exact_plan() -> None:
    assert len(plan(reads(1, 1, 1, 0), exact=True)) == 4
    assert len(plan([poll(1, 0), *reads(1, 0)], exact=True)) == 1


# --- the command ---


@pytest.fixture
def trace(tmp_path: Path, everything: list[Event]) -> Path:
    path = tmp_path / "trace.jsonl"
    write(path, everything)
    return path


def write(path: Path, events: list[Event], lost: int = 0) -> None:
    sink = JsonLines(path)
    sink.begin({"kind": "begin", "format": 1, "time": 0})
    sink.write(events)
    sink.end(len(events), lost)


def test_command_on_a_served_device(trace: Path) -> None:
    with served(Edu()) as socket:
        answer = runner.invoke(app, ["replay", str(trace), f"vfio-user:{socket}", "--check"])
    assert answer.exit_code == 0, answer.output
    assert "values compared: no difference" in answer.output


def test_command_on_a_changed_device(trace: Path) -> None:
    with served(Wrong()) as socket:
        answer = runner.invoke(app, ["replay", str(trace), f"vfio-user:{socket}", "--check"])
        assert answer.exit_code == 1
        assert "read 0xed instead of 0x10000ed" in answer.output
        assert "2 differences" in answer.output
        assert "edu.py:" in answer.output
        answer = runner.invoke(
            app,
            ["replay", str(trace), f"vfio-user:{socket}", "--check", "--ignore", "bar0:0", "--ignore", "bar0:4"],
        )
        assert answer.exit_code == 0, answer.output


def test_schema_of_json(trace: Path, tmp_path: Path, everything: list[Event]) -> None:
    odd = tmp_path / "odd.jsonl"
    hold = Event(0, "hold", "emulated:edu", 1, "", facts={"region": "bar2", "offset": 0, "size": 1, "label": "x"})
    silent = Event(0, "irq", "emulated:edu", 1, "", facts={"operation": "mask", "interrupt": "intx", "vector": 0})
    write(odd, [hold, silent], lost=3)
    answers = []
    with served(Wrong()) as socket:
        for path in (trace, odd):
            answer = runner.invoke(app, ["replay", str(path), f"vfio-user:{socket}", "--check", "--json"])
            assert answer.exit_code == 1
            answers.append(json.loads(answer.stdout))
    assert answers[1]["complete"] is False
    assert answers[1]["skipped"] == {"hold events": 1}
    check_schema("replay", *answers, keyed=("skipped",))


def test_a_trace_of_several_devices(tmp_path: Path) -> None:
    path = tmp_path / "two.jsonl"
    one = Event(0, "read", "a", 1, "", "bar0", 0, 4, 0x010000ED)
    write(path, [one, one._replace(device="b", value=0)])
    answer = runner.invoke(app, ["replay", str(path), "emulated:edu", "--check"])
    assert answer.exit_code == 2
    assert runner.invoke(app, ["replay", str(path), "emulated:edu", "--check", "--device", "a"]).exit_code == 0
    assert runner.invoke(app, ["replay", str(path), "emulated:edu", "--check", "--device", "b"]).exit_code == 1
    assert runner.invoke(app, ["replay", str(path), "emulated:edu", "--device", "c"]).exit_code == 2


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "there are no events"),
        ("hello\n", "line 1 is no line of a trace"),
        ('{"kind":"begin","format":99}\n', "line 1 is no line of a trace in format 1"),
        ('{"kind":"begin","format":1}\n{"kind":"read"}\n', "line 2 is no line"),
        ('{"kind":"begin","format":1}\n[]\n', "line 2 is no line"),
        ('{"kind":"begin","format":1}\n', "there are no events"),
    ],
)
def test_what_is_no_trace(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text(text)
    with pytest.raises(VfioError, match=words):
        read_trace(path)
    assert runner.invoke(app, ["replay", str(path), "emulated:edu"]).exit_code == 1


ACCESS = {"time": 1, "kind": "read", "device": "d", "region": "bar0", "offset": 0, "width": 4, "value": 1}
INTERRUPT = {"time": 1, "kind": "irq", "device": "d", "interrupt": "msi", "operation": "enable", "count": 1}
MAP = {"time": 1, "kind": "map", "device": "d", "iova": 0, "size": 4096, "prot": "rw", "memory": "host"}


@pytest.mark.parametrize(
    ("record", "change"),
    [
        (ACCESS, {"region": "barn"}),
        (ACCESS, {"region": None}),
        (ACCESS, {"region": "irq"}),
        (ACCESS, {"offset": "0x4"}),
        (ACCESS, {"offset": -4}),
        (ACCESS, {"width": 3}),
        (ACCESS, {"value": 1 << 32}),
        (ACCESS, {"kind": "write", "value": None}),
        (INTERRUPT, {"interrupt": "abandon"}),
        (INTERRUPT, {"operation": "__init__"}),
        (MAP, {"prot": None}),
        (MAP, {"iova": "0"}),
        (MAP, {"kind": "memory", "when": "write"}),
    ],
)
def test_events_that_nobody_recorded(tmp_path: Path, record: dict[str, Any], change: dict[str, Any]) -> None:
    path = tmp_path / "trace.jsonl"

    def written(event: dict[str, Any]) -> Path:
        path.write_text('{"kind":"begin","format":1}\n' + json.dumps({**event, "thread": 1, "caller": ""}) + "\n")
        return path

    assert len(read_trace(written(record)).events) == 1
    with pytest.raises(VfioError, match="line 2 is no line of a trace"):
        read_trace(written({**record, **change}))


def test_each_kind_of_interrupt_can_be_played(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    events = [{**INTERRUPT, "interrupt": word, "thread": 1, "caller": ""} for word in _WORDS.values()]
    path.write_text("\n".join(map(json.dumps, [{"kind": "begin", "format": 1}, *events])))
    assert len(read_trace(path).events) == len(_WORDS)
    with vfiopy.open("emulated:edu") as device:
        assert all(hasattr(device.irqs, word) for word in _WORDS.values())


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(VfioError, match=r"the trace cannot be read .ENOENT: No such file"):
        read_trace(tmp_path / "none")
    answer = runner.invoke(app, ["replay", "x", "emulated:edu", "--ignore", "bar7"])
    assert answer.exit_code == 2

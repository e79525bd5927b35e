"""Traces: what is in them, what is not lost, and what they must never do."""

from __future__ import annotations

import asyncio
import gc
import json
import mmap
import os
import threading
import warnings
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from emulated_support import Everything
from ways import WAYS, opened

import vfiopy
from vfiopy.device.vector import Vector
from vfiopy.drivers.edu import EduDriver
from vfiopy.emulated import Edu
from vfiopy.errors import AddressRangeError, AlignmentError, BusyError, NotMappedError, VfioError
from vfiopy.lives import drain_finalizers
from vfiopy.mmio import Region, numpy_view
from vfiopy.trace import Collect, Event, JsonLines, Perfetto, Place, Selection, Text, UntracedWarning, tracing
from vfiopy.trace.event import from_json, to_json
from vfiopy.trace.recorder import Recorder

HERE = Path(__file__).name


@pytest.fixture(params=WAYS)
def device(request: pytest.FixtureRequest) -> Iterator[vfiopy.Device]:
    with opened(Edu(), request.param) as device:
        yield device


@pytest.fixture
def local() -> Iterator[vfiopy.Device]:
    with vfiopy.open("emulated:edu") as device:
        yield device


def registers(sink: Collect) -> list[tuple[object, ...]]:
    return [
        (event.kind, event.region, event.offset, event.width, event.value)
        for event in sink.events
        if event.region is not None
    ]


def of_kind(sink: Collect, *kinds: str) -> list[Event]:
    return [event for event in sink.events if event.kind in kinds]


# --- what is in it ---


def test_register_accesses(device: vfiopy.Device) -> None:
    sink = Collect()
    bar = device.bars[0]
    with tracing(device, sink):
        bar.write32(0x04, 0x12345678)
        bar.read32(0x04)
        bar.read32_relaxed(0x04)
        bar.read_block(0x00, 2)
    bar.read32(0x04)
    assert registers(sink) == [
        ("write", "bar0", 0x04, 4, 0x12345678),
        ("read", "bar0", 0x04, 4, 0xEDCBA987),
        ("read", "bar0", 0x04, 4, 0xEDCBA987),
        ("read", "bar0", 0x00, 4, 0x010000ED),
        ("read", "bar0", 0x04, 4, 0xEDCBA987),
    ]
    event = of_kind(sink, "read")[0]
    assert event.thread == threading.get_native_id()
    name, _, line = event.caller.rpartition(":")
    assert name == __file__
    assert "bar.read32(0x04)" in Path(__file__).read_text().splitlines()[int(line) - 1]
    times = [event.time for event in sink.events]
    assert times == sorted(times)


def test_a_region_that_is_opened_later(device: vfiopy.Device) -> None:
    sink = Collect()
    with tracing(device, sink):
        device.bars[0].read32(0)
    assert registers(sink) == [("read", "bar0", 0, 4, 0x010000ED)]


def test_config_space_and_the_callers_of_properties(device: vfiopy.Device) -> None:
    sink = Collect()
    with tracing(device, sink):
        device.bus_master = True
        with pytest.raises(AddressRangeError):
            device.config.read8(-1)  # no access was made
    (read, write) = of_kind(sink, "read", "write")
    assert (read.region, read.offset, read.width) == ("config", 4, 2)
    assert write.value == (read.value or 0) | 4
    assert Path(write.caller.rpartition(":")[0]).name == HERE


def test_interrupts(device: vfiopy.Device) -> None:
    sink = Collect()
    edu = EduDriver(device)
    device.bus_master = True
    with tracing(device, sink, only=["irq"]):
        vector = edu.enable_interrupts("msi")
        edu.raise_interrupt(1)
        edu.wait_interrupt()
        vector.trigger()
        assert vector.wait(1.0) == 1
        edu.disable_interrupts()
    facts = [dict(event.facts) for event in of_kind(sink, "irq")]
    assert facts == [
        {"operation": "enable", "interrupt": "msi", "count": 1},
        {"operation": "taken", "interrupt": "msi", "vector": 0, "count": 1},
        {"operation": "trigger", "interrupt": "msi", "vector": 0},
        {"operation": "taken", "interrupt": "msi", "vector": 0, "count": 1},
        {"operation": "disable", "interrupt": "msi"},
    ]
    assert registers(sink) == []


def test_a_vector_that_was_enabled_before(device: vfiopy.Device) -> None:
    sink = Collect()
    vector = device.irqs.intx.enable()[0]
    with tracing(device, sink):
        vector.trigger()
        vector.wait(1.0)
    vector.trigger()
    vector.wait(1.0)
    assert [event.facts["operation"] for event in of_kind(sink, "irq")] == ["trigger", "taken"]


def test_maps_and_unmaps(device: vfiopy.Device) -> None:
    sink = Collect()
    before = device.dma.allocate(4096)
    there = before.iova
    with tracing(device, sink):
        with device.dma.allocate(8192, prot=vfiopy.Prot.READ) as one:
            iova = one.iova
        several = [device.dma.allocate(4096) for _ in range(2)]
        mappings = [buffer.mapping for buffer in several]
        first, second = (mapping.iova for mapping in mappings)
        device.space.unmap_many(mappings)
        device.space.unmap(there, 4096)
        assert device.space.unmap(there, 4096) == 0
        for buffer in several:
            buffer.free()
    facts = [(event.kind, event.facts["iova"], event.facts["size"]) for event in of_kind(sink, "map", "unmap")]
    assert facts == [
        ("map", there, 4096),
        ("map", iova, 8192),
        ("unmap", iova, None),
        ("map", first, 4096),
        ("map", second, 4096),
        ("unmap", first, None),
        ("unmap", second, None),
        ("unmap", there, 4096),
        ("unmap", there, 4096),
    ]
    maps = of_kind(sink, "map")
    assert [event.facts.get("existing", False) for event in maps] == [True, False, False, False]
    assert maps[1].facts["prot"] == "r"
    assert [event.facts["bytes"] for event in of_kind(sink, "unmap")] == [8192, 4096, 4096, 4096, 0]


def test_unmapping_from_a_loop(device: vfiopy.Device) -> None:
    sink = Collect()
    buffer = device.dma.allocate(4096)
    with tracing(device, sink):
        asyncio.run(device.space.unmap_async(buffer.iova))
    assert [event.facts["bytes"] for event in of_kind(sink, "unmap")] == [4096]


def test_the_end_of_a_device() -> None:
    sink = Collect()
    device = vfiopy.open(Everything())
    device.space.map(mmap.mmap(-1, 4096))
    with tracing(device, sink):
        device.reset()
        device.close()
    kinds = [event.kind for event in sink.events if event.region is None]
    assert kinds == ["open", "map", "reset", "unmap", "close"]


def test_errors(device: vfiopy.Device) -> None:
    sink = Collect()
    bar = device.bars[0]
    with tracing(device, sink):
        with pytest.raises(AddressRangeError):
            bar.read32(bar.size)
        with pytest.raises(NotMappedError):
            device.space.unmap(0x7000)
        with pytest.raises(AlignmentError):
            device.space.map(mmap.mmap(-1, 4096), iova=0x1001)
    found = [(event.facts["operation"], event.facts["error"]) for event in of_kind(sink, "error")]
    assert found == [
        ("read", "AddressRangeError"),
        ("unmap", "NotMappedError"),
        ("map", "AlignmentError"),
    ]
    assert of_kind(sink, "error")[0].offset == bar.size


def test_a_mapped_bar_is_traced_without_its_mapping_being_bypassed() -> None:
    sink = Collect()
    with vfiopy.open(Everything()) as device:
        bar = device.bars[2]
        assert bar.windows
        with tracing(device, sink):
            bar.write64(0x100, 0x1122334455667788)
            assert bar.read_fifo(0x100, 2, width=2) == b"\x88\x77" * 2
    assert registers(sink) == [
        ("write", "bar2", 0x100, 8, 0x1122334455667788),
        ("read", "bar2", 0x100, 2, 0x7788),
        ("read", "bar2", 0x100, 2, 0x7788),
    ]


def test_addresses_bypass_the_trace_and_that_is_told() -> None:
    sink = Collect()
    with vfiopy.open(Everything()) as device:
        early = device.bars[2].hold(0, 8, label="before")
        with pytest.warns(UntracedWarning) as warned, tracing(device, sink):
            view = numpy_view(device.bars[2], 0x10, 4)
        assert [str(one.message).split("'")[1] for one in warned] == ["before", "numpy view of uint8 at 0x10"]
        assert warned[1].filename == __file__
        assert len(view) == 4
        del view
        early.release()
    assert [(event.facts["region"], event.facts["label"]) for event in of_kind(sink, "hold")] == [
        ("bar2", "before"),
        ("bar2", "numpy view of uint8 at 0x10"),
    ]


class Refusing(Collect):
    """An observer that cannot."""

    def tell(self, *_: object) -> None: ...

    def vector_made(self, kind: str, number: int) -> None: ...

    def region_opened(self, index: int, region: Region) -> None:
        raise RuntimeError(f"no {region.name}")


def test_a_region_whose_opening_cannot_be_told_is_closed_again() -> None:
    def mapped() -> int:
        return sum("memfd" in line for line in Path("/proc/self/maps").read_text().splitlines())

    with vfiopy.open(Everything()) as device:
        before = mapped()
        device.observe(Refusing())
        with pytest.raises(RuntimeError, match="BAR 2"):
            _ = device.bars[2]
        assert mapped() == before
        device.observe(None)
        assert device.bars[2].windows
        assert mapped() > before


# --- choosing ---


def test_only_some_registers(device: vfiopy.Device) -> None:
    sink = Collect()
    bar = device.bars[0]
    with tracing(device, sink, only=["bar0:0x4-0x7", "bar0:0x20"]):
        bar.write32(0x04, 5)
        bar.read32(0x00)
        bar.read32(0x20)
        device.bus_master = True
        device.dma.allocate(4096).free()
    assert [(kind, offset) for kind, _, offset, _, _ in registers(sink)] == [("write", 4), ("read", 0x20)]
    assert [event.kind for event in sink.events if event.region is None] == ["open"]


def test_what_is_not_selected_stays_fast(local: vfiopy.Device) -> None:
    bar = local.bars[0]
    with tracing(local, Collect(), only=["dma"]):
        assert bar.state == "open"
    direct = local.space._direct
    with tracing(local, Collect(), only=["bar0"]):
        assert bar.state == "traced"
        assert local.space._direct == direct
    assert bar.state == "open"
    assert bar.trace is None
    assert local.space._direct == direct


@pytest.mark.parametrize(
    "text", ["bar6", "bar0:", "bar0:0x20-0x10", "irq:4", "bar0:zz", "", "bar0 bar1", "dma&1", "bar0&x"]
)
def test_what_is_no_place(text: str) -> None:
    with pytest.raises(ValueError, match="is no place: write bar0, bar0:0x20"):
        Place.parse(text)


def test_places() -> None:
    assert Place.parse("BAR2:0x10-0x1f") == Place("bar2", 0x10, 0x1F)
    assert Place.parse("config:4&0x6") == Place("config", 4, 4, 6)
    one = Place.parse("bar0:6")
    assert one.meets(4, 4)
    assert not one.meets(4, 2)
    assert Selection(["bar0", "bar0:4"]).part("bar0") is None
    assert not Selection(["bar0"]).has("irq")


def test_a_second_trace_is_refused_and_the_first_goes_on(local: vfiopy.Device) -> None:
    sink = Collect()
    with tracing(local, sink):
        with pytest.raises(BusyError, match="being traced already"), tracing(local, Collect()):
            pass
        local.bars[0].read32(0)
    assert registers(sink)


def test_two_devices_in_one_trace_and_in_one_space() -> None:
    with vfiopy.AddressSpace() as space, vfiopy.open(Edu(), space=space) as one, vfiopy.open(Edu(), space=space) as two:
        sink = Collect()
        with tracing([one, two], sink):
            one.bars[0].read32(0)
            two.bars[0].read32(0)
        assert len(registers(sink)) == 2
        assert space._observers == ()


def test_maps_after_a_device_was_closed_are_not_its_own() -> None:
    sink = Collect()
    with vfiopy.AddressSpace() as space:
        device = vfiopy.open(Edu(), space=space)
        with tracing(device, sink):
            device.close()
            space.map(mmap.mmap(-1, 4096)).unmap()
    assert sink.events[-1].kind == "close"


# --- nothing is lost ---


def test_many_threads(local: vfiopy.Device) -> None:
    sink = Collect()
    bar = local.bars[0]

    def use(number: int) -> None:
        for count in range(500):
            bar.write32(0x04, number << 16 | count)

    with tracing(local, sink):
        threads = [threading.Thread(target=use, args=[number]) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    values = [event.value or 0 for event in of_kind(sink, "write")]
    for number in range(4):
        assert [value & 0xFFFF for value in values if value >> 16 == number] == list(range(500))
    assert sink.lost == 0
    times = [event.time for event in sink.events]
    assert times == sorted(times)


def test_the_last_events_only(local: vfiopy.Device) -> None:
    sink = Collect()
    with tracing(local, sink, keep=10) as recorder:
        for _ in range(100):
            local.bars[0].read32(0)
        assert recorder.lost == 91
        assert sink.events == []
    assert [event.kind for event in sink.events] == ["lost"] + ["read"] * 10
    assert sink.events[0].facts["count"] == 91
    assert sink.lost == 91


def test_the_last_events_where_there_is_none() -> None:
    sink = Collect()
    recorder = Recorder(sink, keep=10)
    recorder.missed()  # a KeyboardInterrupt in the first access
    recorder.close()
    assert sink.events == []
    assert sink.lost == 1


def test_sync_hands_over_each_event_at_once(local: vfiopy.Device) -> None:
    sink = Collect()
    with tracing(local, sink, sync=True):
        local.bars[0].read32(0)
        assert registers(sink) == [("read", "bar0", 0, 4, 0x010000ED)]


def test_events_do_not_wait_long(local: vfiopy.Device) -> None:
    came = threading.Event()

    class Waited(Collect):
        def write(self, events: Any) -> None:
            if any(event.kind == "read" for event in events):
                came.set()

    with tracing(local, Waited()):
        local.bars[0].read32(0)
        assert came.wait(10)


class Full(Collect):
    """A disk that is full after a while."""

    def write(self, events: Any) -> None:
        if len(self.events) + len(events) > 300:
            raise OSError(28, "No space left on device")
        super().write(events)


def test_a_sink_that_fails_is_told_with_what_was_lost(local: vfiopy.Device) -> None:
    sink = Full()

    def program() -> None:
        with tracing(local, sink):
            for _ in range(1000):
                assert local.bars[0].read32(0) == 0x010000ED  # the program goes on

    with pytest.raises(VfioError, match=r"No space left on device; 745 events are lost"):
        program()
    assert len(sink.events) == 256
    assert sink.lost == 745
    assert local.bars[0].state == "open"


def test_an_event_that_was_interrupted_is_counted(local: vfiopy.Device, monkeypatch: pytest.MonkeyPatch) -> None:
    sink = Collect()
    bar = local.bars[0]
    with tracing(local, sink) as recorder:
        report = bar.trace
        assert report is not None

        def interrupted(*_: object) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(report, "_add", interrupted)
        with pytest.raises(KeyboardInterrupt):
            bar.read32(0)
        assert recorder.lost == 1
    assert sink.lost == 1


def test_a_forked_child_writes_nothing(local: vfiopy.Device, tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    with tracing(local, path) as recorder:
        local.bars[0].read32(0)
        pid = os.fork()
        if not pid:
            recorder.add("reset", "child", "")
            recorder.close()
            os._exit(0)
        os.waitpid(pid, 0)
    kinds = [json.loads(line)["kind"] for line in path.read_text().splitlines()]
    assert kinds == ["begin", "open", "read", "end"]


# --- what it must never do ---


def test_it_reads_nothing_that_the_program_does_not_read() -> None:
    model = Everything()
    with vfiopy.open(model) as device, device.dma.allocate(4096), tracing(device, Collect(), contents=True):
        device.bars[0].write32(4, 1)
        device.bars[0].read16(8)
    assert [access[:4] for access in model.accesses] == [("write", 0, 4, 4), ("read", 0, 8, 2)]


def test_it_does_not_keep_the_device_open() -> None:
    sink = Collect()
    device = vfiopy.open("emulated:edu")
    alive = weakref.ref(device)
    with tracing(device, sink):
        device.bars[0].read32(0)
        del device
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)
            gc.collect()
            drain_finalizers()
        gc.collect()
        assert alive() is None
    assert sink.events[-1].kind == "close"


def test_it_does_not_keep_memory(local: vfiopy.Device) -> None:
    with tracing(local, Collect(), contents=True):
        buffer = local.dma.allocate(4096)
        memory = weakref.ref(buffer.mapping.memory)
        local.bars[0].write32(4, 1)
        buffer.free()
        del buffer
        gc.collect()
        assert memory() is None


# --- contents ---


def test_contents(local: vfiopy.Device) -> None:
    sink = Collect()
    with tracing(local, sink, contents=True):
        buffer = local.dma.allocate(3 * 4096)
        buffer[4096:4100] = np.frombuffer(b"abcd", dtype="u1")
        local.bars[0].write32(4, 1)
        local.bars[0].write32(4, 2)
        buffer[0] = 7
        iova = buffer.iova
        buffer.free()
    facts = [event.facts for event in of_kind(sink, "memory")]
    found = [(one["iova"] - iova, one["when"], bytes.fromhex(one["data"])[:4]) for one in facts]
    assert found == [(4096, "write", b"abcd"), (0, "unmap", b"\7\0\0\0")]
    assert [event.kind for event in sink.events][-3:] == ["write", "memory", "unmap"]


def test_other_memory_at_the_same_place_is_recorded_anew(local: vfiopy.Device) -> None:
    sink = Collect()
    with tracing(local, sink, contents=True):
        for _ in range(2):
            with local.dma.allocate(4096, iova=0x5000) as buffer:
                buffer[0] = 7
                local.bars[0].write32(4, 1)
    assert [event.facts["when"] for event in of_kind(sink, "memory")] == ["write", "write"]


# --- vectors ---


def test_who_fails_to_hear_of_an_interrupt_does_not_lose_it() -> None:
    vector = Vector("v", 0, lambda number: None)
    with vector:

        def fail(count: int) -> None:
            raise KeyboardInterrupt

        vector.observe(fail)
        os.eventfd_write(vector.fileno(), 3)
        with pytest.raises(KeyboardInterrupt):
            vector.wait(1.0)
        with pytest.raises(KeyboardInterrupt):
            vector.take()
        vector.observe(None)
        assert vector.total == 0
        assert vector.take() == 3
        with pytest.raises(TypeError):
            vector.observe(5)  # type: ignore[arg-type]


def test_events_that_were_put_back_are_told() -> None:
    vector = Vector("v", 0, lambda number: None)
    heard: list[int] = []
    with vector:
        vector.observe(heard.append)

        async def wait_and_be_cancelled() -> None:
            task = asyncio.ensure_future(vector.wait_async())
            await asyncio.sleep(0)
            os.eventfd_write(vector.fileno(), 2)
            vector._serve_waiter()
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

        asyncio.run(wait_and_be_cancelled())
        assert heard == [2, -2]
        assert vector.take() == 2


def test_an_observer_does_not_keep_the_vector() -> None:
    class Heard:
        vector: Vector

        def __call__(self, count: int) -> None:
            pass

    vector = Vector("v", 0, lambda number: None)
    heard = Heard()
    heard.vector = vector
    vector.observe(heard)
    vector.close()
    alive = weakref.ref(vector)
    del vector, heard
    gc.collect()
    assert alive() is None


# --- formats ---


def use_edu(device: vfiopy.Device) -> None:
    edu = EduDriver(device)
    device.bus_master = True
    edu.enable_interrupts()
    edu.factorial(5)
    with device.dma.allocate(4096) as buffer:
        edu.load(buffer.iova, 64)
    with pytest.raises(AddressRangeError):
        device.bars[0].read32(device.bars[0].size)


def test_json_lines(local: vfiopy.Device, tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    with tracing(local, path):
        use_edu(local)
    first, *events, last = [json.loads(line) for line in path.read_text().splitlines()]
    assert (first["kind"], first["format"], first["pid"]) == ("begin", 1, os.getpid())
    assert last == {"kind": "end", "events": len(events), "lost": 0}
    for record in events:
        assert to_json(from_json(record)) == record
    assert {record["kind"] for record in events} >= {"open", "read", "write", "irq", "map", "unmap", "error"}


def check_chrome_trace(text: str) -> list[dict[str, Any]]:
    """The Trace Event Format, as far as we use it: required keys, types, phases, spans that begin and end, time."""
    trace = json.loads(text)
    assert trace["displayTimeUnit"] in ("ms", "ns")
    span = {"ts", "id", "cat"}
    required = {"M": {"args"}, "i": {"ts", "s", "cat"}, "b": span, "e": span, "C": {"ts", "args"}}
    open_spans: set[tuple[str, str]] = set()
    last = 0.0
    for event in trace["traceEvents"]:
        phase = event["ph"]
        assert {"name", "pid", "tid"} | required[phase] <= event.keys(), event
        assert isinstance(event["pid"], int)
        assert isinstance(event["tid"], int)
        if phase == "M":
            assert event["name"] in ("process_name", "thread_name")
            continue
        assert isinstance(event["ts"], float)
        assert event["ts"] >= last
        last = event["ts"]
        if phase == "i":
            assert event["s"] in ("g", "p", "t")
        if phase == "C":
            assert all(isinstance(value, int) for value in event["args"].values())
        key = (event["cat"], str(event.get("id")))
        if phase == "b":
            assert key not in open_spans
            open_spans.add(key)
        if phase == "e":
            open_spans.remove(key)
    assert open_spans == set()
    return list(trace["traceEvents"])


def test_perfetto(local: vfiopy.Device, tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    left = local.dma.allocate(4096)  # a span that the end of the trace has to close
    with tracing(local, path):
        use_edu(local)
    assert left.iova
    events = check_chrome_trace(path.read_text())
    names = [event["name"] for event in events]
    assert "write bar0+0x8/4 <- 0x00000005" in names
    assert [event["args"]["bytes"] for event in events if event["ph"] == "C"] == [4096, 8192, 4096]


def test_perfetto_with_nothing_in_it(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    Recorder(Perfetto(path)).close()
    assert [event["ph"] for event in check_chrome_trace(path.read_text())] == ["M"]


def test_text(local: vfiopy.Device, tmp_path: Path) -> None:
    path = tmp_path / "trace.txt"
    with tracing(local, Text(path)):
        local.bars[0].write32(0x04, 1)
        for _ in range(100):
            local.bars[0].read32(0x04)
        with local.dma.allocate(4096):
            pass
    lines = path.read_text().splitlines()
    assert len(lines) == 6
    assert "write   bar0+0x4/4 <- 0x00000001" in lines[1]
    assert f"{HERE}:" in lines[1]
    assert lines[3].strip() == "... 99 more of the same"


def test_an_open_file_stays_open(local: vfiopy.Device, tmp_path: Path) -> None:
    with (tmp_path / "trace").open("w") as file:
        with tracing(local, JsonLines(file)):
            pass
        file.write("more")
    assert (tmp_path / "trace").read_text().endswith("more")

"""Width is a promise: each Region method makes exactly the accesses that it says, seen by the processor."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from mmio_audit import Auditor, reason_to_skip
from mmio_audit.decode import decode_width
from region_support import PAGE, WIDTHS, Bar

from vfiopy._shim import lib
from vfiopy.errors import AccessError, VfioTimeoutError
from vfiopy.mmio import Region, barrier

SUFFIXES = ["", "_relaxed"]

pytestmark = pytest.mark.skipif(bool(reason_to_skip()), reason=reason_to_skip())


@pytest.fixture(scope="module")
def auditor(tmp_path_factory: pytest.TempPathFactory) -> Auditor:
    return Auditor(tmp_path_factory.mktemp("auditor"))


@pytest.fixture
def bar() -> Iterator[Bar]:
    bar = Bar()
    yield bar
    bar.close()


Watch = Callable[[Callable[[], object]], list[tuple[str, int, int]]]


@pytest.fixture
def watch(auditor: Auditor, bar: Bar) -> Watch:
    def watch(call: Callable[[], object]) -> list[tuple[str, int, int]]:
        with auditor.watch(bar.address, bar.size) as accesses:
            call()
        return accesses

    return watch


def make(bar: Bar, path: str) -> Region:
    """Make a region whose accesses take a given path through the C code."""
    if path == "fast":
        return bar.region()
    if path == "big-endian":
        return bar.region(byteorder="big")
    if path == "traced":
        region = bar.region()
        region.set_trace(lambda *_: None)
        return region
    pieces = [(0, bar.address, PAGE), (2 * PAGE, bar.address + 2 * PAGE, 2 * PAGE)]
    return Region("pieces", bar.size, pieces)


PATHS = ["fast", "big-endian", "traced", "second window"]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("width", WIDTHS)
def test_one_method_one_access(bar: Bar, watch: Watch, width: int, suffix: str, path: str) -> None:
    region = make(bar, path)
    read = getattr(region, f"read{8 * width}{suffix}")
    write = getattr(region, f"write{8 * width}{suffix}")
    offset = 2 * PAGE + 24
    bar.content[offset : offset + 8] = bytes(range(0xF1, 0xF9))
    assert watch(lambda: read(offset)) == [("R", offset, width)]
    assert watch(lambda: write(offset, 2 ** (8 * width) - 2)) == [("W", offset, width)]
    assert watch(lambda: [read(offset), write(0, 0), read(PAGE - 8), write(offset, 1), read(offset)]) == [
        ("R", offset, width),
        ("W", 0, width),
        ("R", PAGE - 8, width),
        ("W", offset, width),
        ("R", offset, width),
    ]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("count", [1, 5, 40])
def test_blocks_and_bursts(bar: Bar, watch: Watch, width: int, count: int, path: str) -> None:
    region = make(bar, path)
    offset = 2 * PAGE + 64
    data = bytes(count * width)
    ascending = [offset + i * width for i in range(count)]
    assert watch(lambda: region.read_block(offset, count, width)) == [("R", at, width) for at in ascending]
    assert watch(lambda: region.write_block(offset, data, width)) == [("W", at, width) for at in ascending]
    assert watch(lambda: region.read_fifo(offset, count, width)) == [("R", offset, width)] * count
    assert watch(lambda: region.write_fifo(offset, data, width)) == [("W", offset, width)] * count


def test_a_block_over_several_pages(bar: Bar, watch: Watch) -> None:
    region = bar.region()
    expected = [("R", at, 8) for at in range(PAGE - 64, 3 * PAGE, 8)]
    assert watch(lambda: region.read_block(PAGE - 64, len(expected), 8)) == expected


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("width", WIDTHS)
def test_a_poll_reads_and_only_reads(bar: Bar, watch: Watch, width: int, path: str) -> None:
    region = make(bar, path)
    poll = getattr(region, f"poll{8 * width}")
    offset = 3 * PAGE
    assert watch(lambda: poll(offset, 1, 0, 1.0)) == [("R", offset, width)]

    def time_out() -> None:
        with pytest.raises(VfioTimeoutError):
            poll(offset, 1, 1, timeout=0.02)

    accesses = watch(time_out)
    assert len(accesses) >= 2
    assert set(accesses) == {("R", offset, width)}


def test_a_poll_reads_no_more_often_than_asked(bar: Bar, watch: Watch) -> None:
    region = bar.region()

    def time_out() -> None:
        with pytest.raises(VfioTimeoutError):
            region.poll32(8, 1, 1, timeout=0.1, interval=0.03)

    # At 0, 30, 60, 90 ms, and at the deadline; fewer on a machine that is busy.
    assert 2 <= len(watch(time_out)) <= 5


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("width", WIDTHS)
def test_accessors_for_compiled_code(bar: Bar, watch: Watch, width: int, suffix: str) -> None:
    read = getattr(lib, f"vfiopy_mmio_read{8 * width}{suffix}")
    write = getattr(lib, f"vfiopy_mmio_write{8 * width}{suffix}")
    assert watch(lambda: read(bar.address + 16)) == [("R", 16, width)]
    assert watch(lambda: write(bar.address + 16, 3)) == [("W", 16, width)]


def test_what_is_refused_or_no_access_touches_nothing(bar: Bar, watch: Watch) -> None:
    def everything_else() -> None:
        region = bar.region()
        read_only = bar.region(writable=False)
        write_only = bar.region(readable=False)
        for refused in (
            lambda: region.read32(2),
            lambda: region.read64(bar.size),
            lambda: region.write8(0, 256),
            lambda: region.write_block(bar.size - 8, bytes(16)),
            lambda: region.read_block(2, 4),
            lambda: region.poll32(0, 1, 2, 1.0),
            lambda: read_only.write32(0, 0),
            lambda: write_only.read32(0),
        ):
            with pytest.raises(AccessError):
                refused()
        repr(region), region.state, region.size, region.windows, bool(region)
        region.read_block(0, 0), region.write_fifo(0, b"")
        with region.hold() as hold:
            repr(hold), hold.address, hold.length
        memoryview(region).release()
        barrier()
        region.set_state("gone")
        region.set_state("open")
        region.close()

    assert watch(everything_else) == []


class TestTheAuditorItself:
    """An auditor that sees nothing would let everything pass: it has to see what is known to be wrong."""

    def test_ctypes_reads_before_it_writes(self, bar: Bar, watch: Watch) -> None:
        register = ctypes.c_uint32.from_address(bar.address + 8)

        def store() -> None:
            register.value = 5

        assert watch(store) == [("R", 8, 4), ("W", 8, 4)]

    def test_a_slice_is_written_twice(self, bar: Bar, watch: Watch) -> None:
        view = memoryview((ctypes.c_char * PAGE).from_address(bar.address)).cast("B")
        data = b"1234"

        def store() -> None:
            view[16:20] = data

        assert watch(store) == [("W", 16, 4)] * 2

    def test_widths_and_order_of_single_accesses(self, bar: Bar, watch: Watch) -> None:
        view = memoryview((ctypes.c_char * PAGE).from_address(bar.address)).cast("B")
        words, halves = view.cast("I"), view.cast("H")
        assert watch(lambda: (words[3], view[5], halves[1])) == [("R", 12, 4), ("R", 5, 1), ("R", 2, 2)]

    def test_vector_instructions_are_not_taken_for_something_else(self, bar: Bar, watch: Watch) -> None:
        view = memoryview((ctypes.c_char * PAGE).from_address(bar.address)).cast("B")
        with pytest.raises(ValueError, match="not a scalar load or store"):
            watch(lambda: bytes(view[:256]))

    @pytest.mark.parametrize(
        ("code", "width", "is_write"),
        [
            ("8b 07", 4, False),  # mov eax, [rdi]
            ("48 8b 07", 8, False),  # mov rax, [rdi]
            ("66 8b 07", 2, False),  # mov ax, [rdi]
            ("44 8a 07", 1, False),  # mov r8b, [rdi]
            ("0f b7 07", 2, False),  # movzx eax, word [rdi]
            ("48 63 07", 4, False),  # movsxd rax, dword [rdi]
            ("66 45 89 07", 2, True),  # mov [r15], r8w
            ("48 c7 07 00 00 00 00", 8, True),  # mov qword [rdi], 0
            ("f3 a4", 1, True),  # rep movsb
            ("f3 48 ab", 8, True),  # rep stosq
        ],
    )
    def test_decoding(self, code: str, width: int, is_write: bool) -> None:
        raw = bytes.fromhex(code).ljust(15, b"\x90")
        assert decode_width(raw, is_write=is_write) == width
        if not code.startswith("f3 a4"):
            with pytest.raises(ValueError, match=r"cannot have been|not a scalar"):
                decode_width(raw, is_write=not is_write)


def test_the_auditor_leaves_everything_as_it_was(bar: Bar, watch: Watch, tmp_path: Path) -> None:
    before = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("SigCgt")]
    watch(lambda: None)
    after = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("SigCgt")]
    assert before == after
    assert mmap.mmap(bar.fd, PAGE)[0] == 0

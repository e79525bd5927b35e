"""The emulated NVMe controller under hosts that do what they must not, or all at once: it answers, and goes on."""

from __future__ import annotations

import os
import resource
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
from nvme_support import BASE, PAGE, bare, content, noise

from vfiopy.emulated.nvme import Backing, Namespace, Nvme
from vfiopy.emulated.nvme.command import RefusedError
from vfiopy.errors import VfioError
from vfiopy.nvme_spec import registers as reg
from vfiopy.nvme_spec.opcodes import AdminOpcode, IoOpcode
from vfiopy.nvme_spec.status import Code

FREE = BASE + 8 * PAGE


def small(**options: object) -> Nvme:
    return Nvme([Namespace.memory(1 << 20)], manual=True, **options)  # type: ignore[arg-type]


@contextmanager
def memory_for(more: int) -> Iterator[None]:
    """Let the process have so many more bytes of address space, and no more."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + more, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


# --- data pointers ---------------------------------------------------------------------------------------------------


def test_a_list_that_leads_to_itself_ends() -> None:
    """The last entry of a page is the pointer to the next list: alone in its list, it would make no progress."""
    with bare(small()) as host:
        last = 8 * PAGE + PAGE - 8
        host.pool[last : last + 8].view("<u8")[0] = BASE + last
        host.put(1, opcode=IoOpcode.READ, nsid=1, prp1=FREE, prp2=BASE + last, cdw12=3 * PAGE // 512 - 1)
        worker = threading.Thread(target=host.step, daemon=True)
        worker.start()
        worker.join(10.0)
        assert not worker.is_alive(), "the controller walks in circles"
        assert host.status(1) == Code.PRP_OFFSET_INVALID


def test_a_log_page_of_16_gib() -> None:
    with bare(small(mdts=0)) as host, memory_for(256 << 20):
        command = {"opcode": AdminOpcode.GET_LOG_PAGE, "cdw10": 0xFFFF << 16 | 2, "cdw11": 0xFFFF}
        host.pool[9 * PAGE : 10 * PAGE].view("<u8")[:] = 1 << 40  # what lies behind the page is not touched
        assert host.submit(0, prp1=FREE, prp2=BASE + 9 * PAGE, **command) == Code.SUCCESS
        assert host.pool[8 * PAGE + 3] == 100, "spare, percent"
        assert not [one for one in host.target.errors if one.exception]


# --- queues ----------------------------------------------------------------------------------------------------------


def test_a_queue_that_is_deleted_in_the_same_turn_runs_no_more() -> None:
    with bare(small()) as host:
        host.put(1, opcode=IoOpcode.WRITE, nsid=1, prp1=FREE, cid=7)
        host.put(0, opcode=AdminOpcode.DELETE_SQ, cdw10=1)
        host.step()
        assert host.status(0) == Code.SUCCESS
        assert host.target.logs.writes == 0, "a command of a queue that is no more was executed"


@pytest.mark.parametrize(("opcode", "cdw11"), [(AdminOpcode.CREATE_CQ, 1), (AdminOpcode.CREATE_SQ, 1 << 16 | 1)])
def test_a_queue_whose_doorbell_is_out_of_reach_is_not_there(opcode: int, cdw11: int) -> None:
    with bare(small()) as host:
        command = {"opcode": opcode, "prp1": FREE, "cdw10": 15 << 16 | 2, "cdw11": cdw11}
        assert host.submit(0, opcode=AdminOpcode.DOORBELL_BUFFER_CONFIG, prp1=FREE, prp2=FREE + PAGE) == 0
        host.target._shadow._events = 0x7000_0000
        assert host.submit(0, **command) == Code.DATA_TRANSFER_ERROR
        host.target._shadow._events = FREE + PAGE
        assert host.submit(0, **command) == Code.SUCCESS, "the queue of a command that failed was there"


# --- registers -------------------------------------------------------------------------------------------------------


def test_enabled_again_before_it_was_disabled() -> None:
    """CC.EN = 0 and 1 without a look at CSTS.RDY: undefined, and yet RDY and EN must not part for ever."""
    with bare(small()) as host:
        host.bar.write32(reg.CC, 0x460000)
        host.bar.write32(reg.CC, 0x460001)
        host.step()
        assert host.bar.read32(reg.CSTS) & 1 == host.bar.read32(reg.CC) & 1
        host.bar.write32(reg.CC, 0x460000)
        host.step()
        assert host.bar.read32(reg.CSTS) == 0
        host.bar.write32(reg.CC, 0x460001)
        host.step()
        assert host.bar.read32(reg.CSTS) == 1


def test_intx_goes_down_where_the_host_has_no_doorbell_to_ring() -> None:
    """With shadow doorbells the head is in memory; a line that does not look there stays up for ever."""
    with bare(small(messages=None)) as host:
        host.submit(0, opcode=AdminOpcode.DOORBELL_BUFFER_CONFIG, prp1=FREE, prp2=FREE + PAGE)
        shadow, events = (host.pool[start : start + PAGE].view("<u4") for start in (8 * PAGE, 9 * PAGE))
        host.submit(0, opcode=AdminOpcode.DELETE_SQ, cdw10=1)
        host.submit(0, opcode=AdminOpcode.DELETE_CQ, cdw10=1)
        host.submit(0, opcode=AdminOpcode.CREATE_CQ, prp1=BASE + 3 * PAGE, cdw10=63 << 16 | 1, cdw11=3)
        host.submit(0, opcode=AdminOpcode.CREATE_SQ, prp1=BASE + 2 * PAGE, cdw10=63 << 16 | 1, cdw11=1 << 16 | 1)
        host.tails[1] = 0
        config = host.target.config
        for number in range(1, 5):
            shadow[2] = number
            host.put(1, opcode=IoOpcode.FLUSH, nsid=1)
            host.step()
            assert config.read16(0x06) & 8
            old, shadow[3] = int(shadow[3]), number
            if (number - int(events[3]) - 1) & 0xFFFF < (number - old) & 0xFFFF:
                host.bar.write32(reg.doorbell(1, 4, completion=True), number)
            host.step()
            assert not config.read16(0x06) & 8


def test_a_host_that_takes_completions_while_it_is_looked_at_rings_again() -> None:
    """EventIdx is for the head that was seen: where the head has moved meanwhile, it has to follow, or all stands."""
    with bare(small()) as host:
        host.submit(0, opcode=AdminOpcode.DOORBELL_BUFFER_CONFIG, prp1=FREE, prp2=FREE + PAGE)
        shadow, events = (host.pool[start : start + PAGE].view("<u4") for start in (8 * PAGE, 9 * PAGE))
        host.submit(0, opcode=AdminOpcode.CREATE_CQ, prp1=FREE + 2 * PAGE, cdw10=3 << 16 | 2, cdw11=1)
        host.submit(0, opcode=AdminOpcode.DELETE_SQ, cdw10=1)
        host.submit(0, opcode=AdminOpcode.CREATE_SQ, prp1=BASE + 2 * PAGE, cdw10=63 << 16 | 1, cdw11=2 << 16 | 1)
        host.tails[1] = 0
        expect = host.target._shadow._expect

        def late(index: int, value: int) -> None:
            if index == 5 and value == 0:
                shadow[5] = 1  # EventIdx is still that of before: no ring
            expect(index, value)

        host.target._shadow._expect = late  # type: ignore[method-assign]
        shadow[2] = 6
        for _ in range(6):
            host.put(1, opcode=IoOpcode.FLUSH, nsid=1)
        host.step()
        cq = host.target.queues.completions[2]
        assert (cq.head, len(cq.backlog)) == (1, 2)
        assert events[5] == 1, "the host takes the next one, and does not ring"


def test_lists_of_ever_so_many_descriptors_are_refused() -> None:
    """Each is a pin and a view: of four bytes each, a command of 1 MiB has a quarter of a million."""
    with bare(small()) as host:
        pages, count = 20, PAGE // 16
        chain = host.pool[8 * PAGE : (8 + pages) * PAGE].view("<u8").reshape(-1, 2)
        chain[:] = (FREE, 4)
        for page in range(1, pages):
            chain[page * count - 1] = (FREE + page * PAGE, (3 if page == pages - 1 else 2) << 60 | PAGE)
        chain[-1] = (FREE, 80)
        command = {"opcode": IoOpcode.READ, "flags": 0x40, "nsid": 1}
        assert host.submit(1, prp1=FREE, prp2=2 << 60 | PAGE, cdw12=39, **command) == Code.INVALID_SGL_COUNT
        chain[-256:] = [(BASE + 50 * PAGE + 8 * number, 2) for number in range(256)]
        assert host.submit(1, prp1=FREE + (pages - 1) * PAGE, prp2=3 << 60 | PAGE, **command) == Code.SUCCESS


# --- what the data are in --------------------------------------------------------------------------------------------


def test_a_closed_image_has_nobody_elses_file(tmp_path: Path) -> None:
    """Closed in the middle of a command, it must not go on with the file that has its number now."""

    class Closing(Namespace):
        def read(self, lba: int, views: Sequence[memoryview]) -> None:
            super().read(lba, views)
            self.close()
            others.append(Namespace.memory(4 << 20))

    others: list[Namespace] = []
    namespace = Closing.image(tmp_path / "disk.img", size=4 << 20)
    number = namespace.backing.fd
    with pytest.raises(RefusedError):
        namespace.verify(0, 8192)
    assert others[0].backing.fd == number
    with pytest.raises(RefusedError):
        namespace.zero(0, 1, deallocate=True)
    assert namespace.backing.closed


def test_closing_a_controller_twice_is_no_error(tmp_path: Path) -> None:
    disk = Nvme([Namespace.image(tmp_path / "disk.img", size=4096)])
    disk.close()
    disk.close()
    assert not disk.errors


def test_discarding_writes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Deallocate is an advice: where it cannot be taken, a disk must not be filled with zeroes for it."""
    with bare(small()) as host:
        space = host.target.namespaces[1]
        space.write(0, [memoryview(b"\x11" * 1024)])
        monkeypatch.setattr("vfiopy.emulated.nvme.backing._fallocate", lambda *_: False)  # as on vfat
        monkeypatch.setattr(space, "write", None)
        host.pool[8 * PAGE : 8 * PAGE + 16].view("<u4")[:] = (0, 2048, 0, 0)
        assert host.submit(1, opcode=IoOpcode.DATASET_MANAGEMENT, nsid=1, prp1=FREE, cdw11=4) == Code.SUCCESS
        assert content(host.target)[:1024] == b"\x11" * 1024
        assert host.submit(1, opcode=IoOpcode.WRITE_ZEROES, nsid=1, cdw12=1 << 25) == Code.SUCCESS
        assert content(host.target)[:1024] == bytes(512) + b"\x11" * 512


def test_an_image_that_cannot_be_made_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "disk.img"
    for size, message in ((1000, "not a whole number of blocks"), (-512, "not a whole"), (1 << 63, "cannot be had"),
                          ((1 << 63) - 512, "cannot be had")):  # fmt: skip
        with pytest.raises(VfioError, match=message):
            Namespace.image(path, size=size)
        assert not path.exists()
    for size in (1000, -512, 1 << 63):
        with pytest.raises(VfioError, match="memory: "):
            Namespace.memory(size)


def test_images_that_are_none(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(VfioError, match="a file or a block device"):
        Namespace.image(tmp_path / "fifo", read_only=True)
    with pytest.raises(VfioError, match="leave read-only out"):
        Namespace.image(tmp_path / "none.img", size=512, read_only=True)


def test_a_full_disk_is_a_status() -> None:
    with bare(Nvme([Namespace(Backing(os.open("/dev/full", os.O_RDWR), 1 << 20, "/dev/full"))], manual=True)) as host:
        command = {"opcode": IoOpcode.WRITE, "nsid": 1, "prp1": FREE}
        assert host.submit(1, **command) == Code.CAPACITY_EXCEEDED
        assert host.submit(1, **{**command, "opcode": IoOpcode.WRITE_ZEROES}) == Code.CAPACITY_EXCEEDED
        assert host.target.logs.writes == 0


def test_many_views_take_time_in_proportion(tmp_path: Path) -> None:
    space = Namespace.image(tmp_path / "disk.img", size=1 << 20)
    data = noise(1 << 20)
    views = [memoryview(data)[start : start + 4] for start in range(0, 1 << 20, 4)]
    begin = time.process_time()
    space.write(0, views)
    assert time.process_time() - begin < 4.0, "of the processor; it was 20 as long as each view moved all that follow"
    assert (tmp_path / "disk.img").read_bytes() == bytes(data)

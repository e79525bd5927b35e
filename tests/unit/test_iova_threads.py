"""Many Python threads on one book, with a kernel behind it; what they leave must be sound and agree with the kernel."""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Callable

from iova_kernel import FakeKernel

from vfiopy import errors
from vfiopy.iova import MAPPER_IOAS, MAPPER_TYPE1, IovaSpace

PAGE = 4096
HERE = 0x7F00_0000_0000
THREADS = 4
OPERATIONS = 3000 if os.environ.get("VFIOPY_PROFILE") == "nightly" else 300
PLACES = 12


class Worker:
    """One thread: random operations around few places, so that threads meet."""

    def __init__(self, space: IovaSpace, kernel: FakeKernel, number: int) -> None:
        self.space, self.kernel, self.number = space, kernel, number
        self.random = random.Random(number)
        self.owner = space.add_owner(f"worker {number}")
        self.trouble: list[BaseException] = []
        self.counts: dict[str, int] = {}

    def place(self) -> int:
        return 0x10000 * (1 + self.random.randrange(PLACES))

    def map(self) -> None:
        iova = self.place() if self.random.random() < 0.7 else -1
        self.space.map(f"{self.number}", HERE, self.random.randint(1, 4) * PAGE, 3, iova, 0xFF_FFFF)

    def unmap(self) -> None:
        if self.random.random() < 0.2:
            first = self.place()
            self.space.unmap_range(first, first + 0x4_FFFF, 0.001)
        else:
            self.space.unmap(self.place(), self.random.choice([0.0, 0.002]))

    def pin(self) -> None:
        iova, size = self.place(), self.random.randint(1, 4) * PAGE
        self.space.pin(iova, size, 1, self.owner)
        try:
            # What is pinned does not go.
            assert sum(length for _address, length, _memory in self.space.check(iova, size, 1)) == size
        finally:
            self.space.unpin(iova, size, self.owner)

    def look(self) -> None:
        iova = self.place()
        found = self.space.find(iova)
        assert found is None or found.iova <= iova < found.iova + found.size
        rows = self.space.overlapping(iova, iova + 0xF_FFFF)
        assert all(row.size for row in rows)
        assert self.space.stats()["pins"] >= 0

    def mapper(self) -> None:
        token = self.space.add_kernel_mapper(MAPPER_IOAS, 100 + self.number, 1, ioctl=self.kernel.address)
        self.space.replay(token)
        self.space.drop(token)
        assert self.kernel.tables.get(100 + self.number, {}) == {}
        self.space.remove_kernel_mapper(token)

    def verify(self) -> None:
        self.space.verify()

    def run(self) -> None:
        actions: list[Callable[[], None]] = [
            *[self.map] * 6, *[self.unmap] * 5, *[self.pin] * 6, *[self.look] * 2, self.mapper, self.verify,
        ]  # fmt: skip
        try:
            for _ in range(OPERATIONS):
                action = self.random.choice(actions)
                try:
                    action()
                    self.counts[action.__name__] = self.counts.get(action.__name__, 0) + 1
                except (errors.OverlapError, errors.BusyError, errors.NotMappedError, errors.NoSpaceError):
                    pass  # somebody was faster; PinnedError and UnmappingError are BusyErrors
        except BaseException as error:
            self.trouble.append(error)


def test_threads_leave_a_sound_book() -> None:
    kernel = FakeKernel()
    space = IovaSpace("threads")
    space.add_kernel_mapper(MAPPER_TYPE1, 10, ioctl=kernel.address)
    workers = [Worker(space, kernel, number) for number in range(THREADS)]
    threads = [threading.Thread(target=worker.run) for worker in workers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [worker.trouble for worker in workers] == [[]] * THREADS
    done = {name for worker in workers for name in worker.counts}
    assert done == {"map", "unmap", "pin", "look", "mapper", "verify"}
    space.verify()
    assert space.stats()["pins"] == 0
    assert {it.iova: it.size for it in space.mappings()} == {
        iova: entry.size for iova, entry in kernel.tables[10].items()
    }
    space.unmap_all()
    assert kernel.tables[10] == {}

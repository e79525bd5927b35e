"""The rings: wrap-around and phase tags, against a controller that is a list."""

from __future__ import annotations

from collections import deque

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vfiopy import AddressSpace
from vfiopy.drivers.nvme import commands
from vfiopy.drivers.nvme.rings import CompletionRing, SubmissionRing
from vfiopy.errors import ClosedError
from vfiopy.nvme_spec.structures import CQE, SQE


class Writer:
    """A controller's end of a completion queue."""

    def __init__(self, memory: np.ndarray) -> None:
        self.memory = memory
        self.tail, self.phase = 0, 1

    def post(self, cid: int, status: int, dw0: int) -> None:
        # dword 3 last, as a bus delivers it at the earliest
        self.memory[self.tail]["dw0"] = dw0
        self.memory[self.tail]["sqid"] = 5
        self.memory[self.tail]["cid"] = cid
        self.memory[self.tail]["status"] = status << 1 | self.phase
        self.tail += 1
        if self.tail == len(self.memory):
            self.tail, self.phase = 0, self.phase ^ 1


@given(entries=st.integers(2, 9), bursts=st.lists(st.integers(0, 8), max_size=30))
def test_completions_come_once_each_and_in_order(entries: int, bursts: list[int]) -> None:
    with AddressSpace("test") as space, space.allocate(entries, CQE) as memory:
        ring = CompletionRing(memory, "test")
        writer = Writer(np.asarray(memory))
        expected: deque[int] = deque()
        cid = 0
        for burst in bursts:
            for _ in range(min(burst, entries - 1 - len(expected))):
                cid = (cid + 1) & 0xFFFF
                writer.post(cid, cid & 0x7FFF, cid * 3)
                expected.append(cid)
            for _ in range(burst // 2 + 1):
                completion = ring.take()
                if not expected:
                    assert completion is None
                    break
                assert completion is not None
                want = expected.popleft()
                assert (completion.cid, completion.dw0, completion.sqid) == (want, want * 3, 5)
                assert completion.status >> 1 == want & 0x7FFF
        while expected:
            completion = ring.take()
            assert completion is not None
            assert completion.cid == expected.popleft()
        assert ring.take() is None
        assert (ring.head, ring.phase) == (writer.tail, writer.phase)
        ring.close()


def test_poll_sees_either_phase() -> None:
    with AddressSpace("test") as space, space.allocate(2, CQE) as memory:
        ring = CompletionRing(memory, "test")
        writer = Writer(np.asarray(memory))
        for number in range(5):
            assert not ring.poll(0.0)
            writer.post(number, 0, 0)
            assert ring.poll(0.0)
            assert ring.take() is not None
        ring.close()


def test_clear_starts_over() -> None:
    with AddressSpace("test") as space, space.allocate(3, CQE) as memory:
        ring = CompletionRing(memory, "test")
        writer = Writer(np.asarray(memory))
        for number in range(4):
            writer.post(number, 0, 0)
            assert ring.take() is not None
        assert (ring.head, ring.phase) == (1, 0)
        ring.clear()
        assert (ring.head, ring.phase) == (0, 1)
        assert not memory.view(np.uint8).any()
        assert ring.take() is None
        ring.close()


def test_closed_ring_is_not_read() -> None:
    with AddressSpace("test") as space, space.allocate(3, CQE) as memory:
        ring = CompletionRing(memory, "test")
        ring.close()
        ring.close()
        with pytest.raises(ClosedError):
            ring.take()


@given(entries=st.integers(2, 7), count=st.integers(0, 25))
def test_submissions_go_round(entries: int, count: int) -> None:
    with AddressSpace("test") as space, space.allocate(entries, SQE) as memory:
        ring = SubmissionRing(memory)
        for number in range(count):
            command = commands.read(number + 1, number << 33, 8)
            assert ring.put(command, number, 0x1000 + number, 0x2000 + number) == (number + 1) % entries
            entry = memory[number % entries]
            assert (entry["opcode"], entry["cid"], entry["nsid"]) == (2, number, number + 1)
            assert (entry["prp1"], entry["prp2"]) == (0x1000 + number, 0x2000 + number)
            assert (entry["cdw10"], entry["cdw11"], entry["cdw12"]) == (0, number << 1, 7)
            assert (entry["flags"], entry["mptr"], entry["cdw13"]) == (0, 0, 0)
        ring.clear()
        assert ring.tail == 0
        assert not memory.view(np.uint8).any()

"""Whatever a driver writes, the emulated NVMe controller answers or fails as the specification has it, and lives on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from emulated_support import wait_for
from hypothesis import given, settings
from hypothesis import strategies as st
from nvme_support import BASE, PAGE, POOL, Bare, driven, noise

import vfiopy
from vfiopy.dma import DmaArray
from vfiopy.drivers import nvme
from vfiopy.emulated.nvme import Namespace, Nvme
from vfiopy.nvme_spec import registers as reg
from vfiopy.nvme_spec.opcodes import AdminOpcode, Cns, Feature, IoOpcode, LogPage
from vfiopy.nvme_spec.structures import CQE, SQE


@pytest.fixture(scope="module")
def parts() -> Iterator[tuple[vfiopy.Device, Nvme, DmaArray]]:
    target = Nvme([Namespace.memory(1 << 20)], manual=True, memory_buffer=1 << 16, serial="F", queues=3, mdts=4)
    with vfiopy.open(target) as device, device.dma.allocate(POOL, iova=BASE) as pool:
        device.bus_master = True
        yield device, target, pool


addresses = st.one_of(
    st.integers(0, POOL // 4).map(lambda dword: BASE + 4 * dword),
    st.integers(0, 64).map(lambda page: BASE + PAGE * page),
    st.integers(0, (1 << 64) - 1),
    st.sampled_from([0, BASE - PAGE, BASE + POOL - PAGE]),
)
small = st.integers(0, 40)
words = st.one_of(small, small.map(lambda value: value << 16), st.integers(0, (1 << 32) - 1))
codes = st.one_of(st.integers(0, 255), st.sampled_from([int(one) for kind in (Cns, Feature, LogPage) for one in kind]))


def entries(opcodes: list[int]) -> st.SearchStrategy[dict[str, int]]:
    return st.fixed_dictionaries(
        {
            "opcode": st.one_of(st.sampled_from(opcodes), st.integers(0, 255)),
            "flags": st.sampled_from([0, 0, 0, 0x40, 0x80, 1]),
            "cid": st.integers(0, 65535),
            "nsid": st.sampled_from([1, 1, 1, 0, 2, 33, 0xFFFF_FFFF]),
            "prp1": addresses,
            "prp2": st.one_of(addresses, st.tuples(words, st.integers(0, 255)).map(lambda x: x[0] | x[1] << 56)),
            "cdw10": st.one_of(words, st.tuples(codes, words).map(lambda pair: pair[0] | pair[1] << 16 & 0xFFFF_0000)),
            "cdw11": words,
            "cdw12": words,
            "cdw13": st.sampled_from([0, 0, 1, 0xFFFF_FFFF]),
        }
    )


ADMIN = entries([int(one) for one in AdminOpcode])
IO = entries([int(one) for one in IoOpcode])
WRITES = st.tuples(
    st.sampled_from(
        [0x0, 0x8, 0xC, 0x10, 0x14, 0x20, 0x24, 0x28, 0x2C, 0x30, 0x50, 0x54, 0x1000, 0x1004, 0x1008, 0x1FFC]
    ),
    st.one_of(small, st.integers(0, (1 << 32) - 1), st.just(0x460001), st.just(0x464001)),
)


@settings(deadline=None, max_examples=80)
@given(
    steps=st.lists(st.one_of(st.tuples(st.just(0), ADMIN), st.tuples(st.just(1), IO), WRITES), max_size=25),
    seed=st.integers(0, 5),
)
def test_anything_at_all(parts: tuple[vfiopy.Device, Nvme, DmaArray], steps: list[tuple[int, Any]], seed: int) -> None:
    device, target, pool = parts
    target.errors.clear()
    bare = Bare(device, target, pool)
    pool[4 * PAGE :] = noise(POOL - 4 * PAGE, seed)
    for what, value in steps:
        if isinstance(value, dict):
            bare.submit(what, **value)
        else:
            bare.bar.write32(what, value)
            bare.step()
    mistakes = [error for error in target.errors if error.exception is not None]
    assert not mistakes
    Bare(device, target, pool)  # a reset brings it back, whatever was done


@settings(deadline=None, max_examples=30)
@given(commands=st.lists(IO, min_size=1, max_size=14))
def test_each_command_has_one_completion(commands: list[dict[str, int]]) -> None:
    with driven(clean=False, queues=0) as (_, controller):
        dma = controller.device.dma
        sq, cq = (dma.allocate(64, kind, alignment=PAGE) for kind in (SQE, CQE))
        controller.admin.execute(nvme.commands.create_cq(1, 64, cq.iova, None))
        controller.admin.execute(nvme.commands.create_sq(1, 64, sq.iova, 1))
        for number, fields in enumerate(commands):
            entry = np.zeros(1, SQE)
            for name, value in fields.items():
                entry[name] = value
            entry["prp1"] |= 1 << 63  # not where the queues are
            entry["prp2"] |= 1 << 63
            entry["cid"] = number
            sq[number] = entry[0]
        controller.device.bars[0].write32(reg.doorbell(1, 4, completion=False), len(commands))
        done = cq[: len(commands)]
        wait_for(lambda: done["status"][-1] & 1)
        controller.admin.execute(nvme.commands.delete_sq(1))
        assert done["cid"].tolist() == list(range(len(commands)))
        assert (done["status"] & 1).all()
        assert not (cq[len(commands) :]["status"] & 1).any()
        controller.admin.execute(nvme.commands.delete_cq(1))

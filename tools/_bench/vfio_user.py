"""(5) A register behind a vfio-user socket: both of vfiopy's ends against C's, and the same without a socket."""

from __future__ import annotations

import asyncio
import ctypes
import os
import random
import signal
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from statistics import quantiles

from vfiopy import emulated, vfio_user
from vfiopy.backend import FileMemory, Prot
from vfiopy.emulated import Edu
from vfiopy.file_window import sealed_memfd
from vfiopy.vfio_user import wire
from vfiopy.vfio_user.channel import Channel, Message
from vfiopy.vfio_user.version import Capabilities, encode_version
from vfiopy.vfio_user.wire import Command, Flag

from .compiled import build
from .results import Row

__all__ = ["NOTES", "TITLE", "run"]

TITLE = "vfio-user: one 32-bit register read over a socket"
NOTES = (
    "Two processes and a socketpair. C sends and receives one message of the same sizes, nothing else. p50, with the "
    "10th percentile and p99 as the range; ratios of p50. Interleaved in rounds. On two CPUs each side sleeps until "
    "the other is done: waking up is what is measured. In-process: no socket, the same device. With one socket the "
    "client takes it out of its idle thread's epoll for each request; a server with a twin socket spares it that."
)
CLIENT, SERVER, ASYNCIO, IN_PROCESS = 2.0, 3.0, 6.0, 1.0
"""Goals on one CPU, in µs: more than C at the same end; in-process altogether."""
PAGE = 4096
_READ = wire.HEADER.pack(1, Command.REGION_READ, 32, 0, 0) + wire.REGION_ACCESS.pack(0, 0, 4)

Sample = Callable[[int], list[int]]
"""Does the thing so many times; returns the ns of each."""


@dataclass(frozen=True, slots=True)
class Contender:
    """One way to read the register: its name, how to, and how many µs more than C are allowed."""

    name: str
    sample: Sample
    more: float | None = None


# --- the other process -----------------------------------------------------------------------------------------------


@contextmanager
def _child(serve: Callable[[socket.socket], None], cpus: set[int]) -> Iterator[socket.socket]:
    """Run ``serve`` in a child; yields this process's end."""
    ours, theirs = socket.socketpair()
    pid = os.fork()
    if not pid:
        try:
            os.sched_setaffinity(0, cpus)
            ours.close()
            serve(theirs)
        finally:
            os._exit(0)
    theirs.close()
    try:
        yield ours
    finally:
        ours.close()
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def _serve_in_c(sock: socket.socket, *, twin: bool = False) -> None:
    """Negotiate as a device of one register would, and leave the reads to C."""
    channel = Channel(sock, "C", max_data=1 << 20)
    ours, theirs = socket.socketpair()  # for requests that never come

    def reply(message: Message, payload: bytes, fds: Sequence[int] = ()) -> None:
        channel.send(message.id, message.command, int(Flag.REPLY), [payload], fds)

    while True:
        message = channel.receive(wait=True)
        assert message is not None
        if message.command == Command.VERSION:
            says = Capabilities.ours(twin_socket=twin, fd_index=0)
            reply(message, encode_version(wire.MINOR, says), [theirs.fileno()] if twin else [])
        elif message.command == Command.GET_INFO:
            reply(message, wire.DEVICE_INFO.pack(16, 0, 9, 5))
        elif message.command == Command.GET_REGION_INFO:
            index = wire.REGION_INFO.unpack(message.payload).region
            reply(message, wire.REGION_INFO.pack(32, 3, index, 0, 0 if index else 1 << 20, 0))
        else:
            reply(message, bytes(message.payload) + bytes(4))
            break
    build("vfio_user").bench_answer(sock.fileno())
    ours.close()


def _serve(sock: socket.socket) -> None:
    server = vfio_user.Server(*emulated.connect(Edu()))
    server.attach(sock)
    server.run()


def _serve_in_loop(sock: socket.socket) -> None:
    server = vfio_user.Server(*emulated.connect(Edu()))
    server.attach(sock)
    asyncio.run(server.serve())


# --- this process ----------------------------------------------------------------------------------------------------


def _in_c(sock: socket.socket) -> Sample:
    ask = build("vfio_user").bench_ask

    def sample(count: int) -> list[int]:
        took = (ctypes.c_uint32 * count)()
        error = ask(sock.fileno(), _READ, count, took)
        if error:
            raise OSError(-error, "the C loop failed")
        return list(took)

    return sample


def _each(action: Callable[[], object]) -> Sample:
    now = time.perf_counter_ns

    def sample(count: int) -> list[int]:
        took = []
        for _ in range(count):
            begin = now()
            action()
            took.append(now() - begin)
        return took

    return sample


def _greet(sock: socket.socket) -> socket.socket:
    """Say VERSION, for a client in C."""
    channel = Channel(sock, "C", max_data=1 << 20)
    channel.send(1, Command.VERSION, 0, [encode_version(0, Capabilities())])
    while channel.receive(wait=True) is None:
        pass
    return sock


def _client(stack: ExitStack, sock: socket.socket) -> tuple[vfio_user.VfioUserDeviceIo, vfio_user.VfioUserMapper]:
    io, mapper = vfio_user.connect(sock)
    stack.callback(mapper.close)
    stack.callback(io.close)
    return io, mapper


def _contenders(stack: ExitStack, cpus: set[int]) -> list[Contender]:
    def child(serve: Callable[[socket.socket], None]) -> socket.socket:
        return stack.enter_context(_child(serve, cpus))

    def reading(serve: Callable[[socket.socket], None]) -> Sample:
        io, _ = _client(stack, child(serve))
        return _each(partial(io.read, 0, 0, 4))

    plain = child(lambda sock: build("vfio_user").bench_answer(sock.fileno()))
    return [
        Contender("C to C", _in_c(plain)),
        Contender("vfiopy to C, one socket", reading(_serve_in_c), CLIENT),
        Contender("vfiopy to C, twin socket", reading(partial(_serve_in_c, twin=True)), CLIENT),
        Contender("C to vfiopy, a thread", _in_c(_greet(child(_serve))), SERVER),
        Contender("C to vfiopy, asyncio", _in_c(_greet(child(_serve_in_loop))), ASYNCIO),
        Contender("vfiopy to vfiopy", reading(_serve)),
    ]


def _measure(group: str, contenders: list[Contender], rounds: int, count: int) -> list[Row]:
    samples: list[list[int]] = [[] for _ in contenders]
    order = list(range(len(contenders)))
    shuffle = random.Random(5).shuffle
    for contender in contenders:
        contender.sample(count)
    for _ in range(rounds):
        shuffle(order)
        for number in order:
            samples[number] += contenders[number].sample(count)
    rows = []
    for contender, each in zip(contenders, samples, strict=True):
        cuts = quantiles(each, n=100, method="inclusive")
        rows.append(Row(group, contender.name, cuts[49] / 1e3, cuts[9] / 1e3, cuts[98] / 1e3, "µs"))
    base = rows[0].value
    return [
        replace(
            row,
            ratio=row.value / base,
            baseline=row is rows[0],
            most=None if contender.more is None else round(base + contender.more, 2),
            remark="" if row is rows[0] else f"+{row.value - base:.1f} µs",
        )
        for row, contender in zip(rows, contenders, strict=True)
    ]


def _others(rounds: int, count: int) -> list[Row]:
    """What is no read over a socket: posted writes, mappings, and the device in this process."""
    with ExitStack() as stack:
        io, mapper = _client(stack, stack.enter_context(_child(_serve, os.sched_getaffinity(0))))
        near, _ = emulated.connect(Edu())
        stack.callback(near.close)
        fd = sealed_memfd("bench", PAGE)
        stack.callback(os.close, fd)
        memory = FileMemory(fd, 0, PAGE, True, 0, None)

        def post(posts: int) -> list[int]:
            begin = time.perf_counter_ns()
            for _ in range(posts):
                io.write(0, 4, b"1234")
            io.read(0, 4, 4)  # all of them are done
            return [(time.perf_counter_ns() - begin) // posts]

        def map_and_unmap() -> None:
            mapper.map(0x10000, memory, Prot.RW)
            mapper.unmap(0x10000, PAGE)

        ways: list[tuple[str, Sample, float | None]] = [
            ("posted write", post, None),
            ("DMA_MAP with a file and DMA_UNMAP, 4 KiB", _each(map_and_unmap), None),
            ("in-process: register read", _each(partial(near.read, 0, 0, 4)), IN_PROCESS),
        ]
        rows = []
        for name, sample, most in ways:
            took = sorted(value for _ in range(rounds) for value in sample(count))
            cuts = quantiles(took, n=100, method="inclusive")
            remark = f"{1e9 / cuts[49]:,.0f} per second" if name == "posted write" else ""
            values = (cuts[49] / 1e3, cuts[9] / 1e3, cuts[98] / 1e3)
            rows.append(Row("others, one CPU", name, *values, "µs", most=most, remark=remark))
        return rows


def run(*, quick: bool) -> list[Row]:
    """Measure, on one CPU and, where there are two, on two."""
    rounds, count = (3, 20) if quick else (15, 1000)
    everywhere = os.sched_getaffinity(0)
    mine = max(everywhere)
    try:
        os.sched_setaffinity(0, {mine})
        with ExitStack() as stack:
            rows = _measure("one CPU", _contenders(stack, {mine}), rounds, count)
        rows += _others(rounds, count)
        others = everywhere - {mine}
        if others:
            with ExitStack() as stack:
                two = _measure("two CPUs", _contenders(stack, {min(others)}), rounds, max(20, count // 4))
            rows += [replace(row, most=None) for row in two]
    finally:
        os.sched_setaffinity(0, everywhere)
    return rows

"""tools/bench: that it measures what it says and tells on what; not how fast anything is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("rich", reason="tools/bench shows tables with rich (extra 'cli')")

from tools._bench.compiled import build
from tools._bench.machine import describe
from tools._bench.measure import Loop, Statement, compare, compare_loops
from tools._bench.registry import BENCHMARKS, load
from tools._bench.results import Row, merge

BENCH = Path(__file__).parents[2] / "tools" / "bench"


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCH), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)


def test_the_mmio_benchmark_end_to_end(tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    done = bench("mmio", "--quick", "--json", str(file))
    assert done.returncode == 0, done.stderr
    results = json.loads(file.read_text())
    shown = " ".join(done.stdout.split())  # where lines break depends on the processor's name
    for key in ("cpu", "virtualization", "kernel", "python", "gil"):
        assert " ".join(str(results["machine"][key]).split()) in shown
    rows = results["benchmarks"]["mmio"]
    for way in ("memoryview", "numpy", "ctypes", "cffi function", "region."):
        for direction in ("read", "write"):
            assert any(row["group"].startswith(direction) and way in row["name"] for row in rows), (way, direction)
    goals = [row for row in rows if row["goal"] is not None]
    assert {row["name"] for row in goals} == {"region.read32(offset)", "region.write32(offset, x)"}
    assert all(row["met"] == (row["ratio"] <= 1.0) for row in goals)
    assert "memoryview.cast('I')[i]" in done.stdout
    # Only our own accesses may be called exact; test_region_width.py shows that they are.
    exact = [row["name"] for row in rows if row["remark"] == "exact"]
    assert exact
    assert all("region." in name or "cffi function" in name for name in exact)


def test_list_and_unknown_names() -> None:
    listed = bench("--list")
    assert all(name in listed.stdout for name in BENCHMARKS)
    wrong = bench("nosuch")
    assert wrong.returncode == 2
    assert "there is no benchmark 'nosuch'; there are: mmio" in wrong.stderr


@pytest.mark.parametrize("name", BENCHMARKS)
def test_each_benchmark_is_one(name: str) -> None:
    benchmark = load(name)
    assert benchmark.TITLE
    assert benchmark.NOTES
    assert callable(benchmark.run)


def test_the_loop_is_subtracted_and_the_ratio_is_to_the_baseline() -> None:
    def spin(seconds: float) -> None:
        end = time.thread_time() + seconds
        while time.thread_time() < end:
            pass

    statements = [
        Statement("slow", "f(0.0004)", {"f": spin}, baseline=True),
        Statement("fast", "f(0.0001)", {"f": spin}, goal=0.5),
    ]
    slow, fast = compare("spin", statements, rounds=5, seconds=0.02)
    assert 0.3e6 < slow.value < 0.8e6
    assert slow.ratio == 1.0
    assert fast.ratio is not None
    assert 0.1 < fast.ratio < 0.6
    assert fast.met is (fast.ratio <= 0.5)
    (empty,) = compare("nothing", [Statement("nothing", "pass")], rounds=9, seconds=0.002)
    assert abs(empty.value) < 5
    assert empty.ratio is None
    assert empty.met is None


def test_loops_time_themselves() -> None:
    counts: dict[str, list[int]] = {"slow": [], "fast": [], "rare": []}

    def loop(name: str, nanoseconds: float) -> Loop:
        def run(count: int) -> float:
            counts[name].append(count)
            return count * nanoseconds

        return Loop(name, run, baseline=name == "slow", goal=0.3 if name == "fast" else None)

    loops = [loop("slow", 4000), loop("fast", 1000), loop("rare", 5e9)]
    slow, fast, rare = compare_loops("made up", loops, rounds=4, seconds=0.001)
    assert (slow.value, slow.unit, slow.ratio, slow.baseline) == (4.0, "µs", 1.0, True)
    assert (fast.value, fast.ratio, fast.met) == (1.0, 0.25, True)
    assert (rare.value, rare.ratio, rare.met) == (5e6, 1.25e6, None)
    assert counts["slow"] == [1, 1, *[250] * 4], "one to warm up, one to see how long it takes"
    assert counts["rare"] == [1] * 6


@pytest.mark.parametrize("name", ["dma_map", "irq"])
def test_nobodys_device_is_taken_unasked(name: str) -> None:
    if "vfiopy.lab=" in Path("/proc/cmdline").read_text():
        pytest.skip("the lab's devices are there to be taken")
    done = bench(name, "--quick")
    assert done.returncode == 3
    assert f"tools/bench: {name} cannot run here: it needs a PCI function of your own" in done.stderr
    assert "VFIOPY_BENCH_BDF=0000:01:00.0" in done.stderr
    assert done.stdout == ""


def test_the_c_side_compiles_and_says_what_fails() -> None:
    from tools._bench import dma_map, irq  # noqa: PLC0415

    for kind in (1, 2):
        run = dma_map._c_loop(dma_map._Target(kind, -1, 1, 0, 4096, 4096), 1)
        with pytest.raises(OSError, match="the C loop failed"):
            run(1)
    function = build("irq").bench_irq
    function.restype = irq.ctypes.c_int64
    bell = irq._Bell(eventfd=-1, device=-1, polls=1)
    assert function(irq.ctypes.byref(bell), 1) == -9  # EBADF: VFIO_DEVICE_SET_IRQS on no fd


def test_somebody_else_rings_after_the_waiter_fell_asleep() -> None:
    from tools._bench import irq  # noqa: PLC0415

    library = build("irq")
    doorbell = irq.ctypes.c_uint32()
    event, told = os.eventfd(1), os.eventfd(0)
    bell = irq._Bell(ring=irq.ctypes.addressof(doorbell), ring_value=7, eventfd=event, polls=1)
    ringer = irq._Ringer(bell=bell, told=told, delay=1_000_000)
    assert library.bench_ringer_start(irq.ctypes.byref(ringer)) == 0
    begin = time.perf_counter_ns()
    os.eventfd_write(told, 1)
    while not doorbell.value:
        assert time.perf_counter_ns() - begin < 10e9
    assert doorbell.value == 7
    assert ringer.rung - begin >= ringer.delay  # the same clock
    library.bench_ringer_stop(irq.ctypes.byref(ringer))
    ringer.end = 0
    # The eventfd was readable before anybody rang: the C side heard it, and would have said so.
    assert irq._c_function("bench_irq_asleep", ringer)(1) != 0
    with pytest.raises(OSError, match="the C loop failed"):
        irq._c_function("bench_irq_asleep", irq._Ringer(told=-1))(1)
    os.close(event)
    os.close(told)


def test_processes_are_merged() -> None:
    runs = [[Row("g", "n", value, value - 1, value + 1, ratio=value / 10, goal=1.0)] for value in (9, 30, 11)]
    (row,) = merge(runs)
    assert (row.value, row.low, row.high, row.ratio, row.met) == (11, 8, 31, 1.1, False)


def test_the_machine_is_described() -> None:
    machine = describe()
    assert str(machine["python"]).startswith("CPython 3.")
    assert machine["virtualization"]
    assert machine["gil"] is True or "t" in sys.abiflags

"""The peer-to-peer example, unchanged: from an NVMe disk into ivshmem's BAR and into another controller's CMB."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from dmabuf_support import no_dmabuf_left
from modes import EDU, IVSHMEM, NVME

EXAMPLE = Path(__file__).parents[2] / "examples" / "p2p.py"


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("p2p", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("kind", "index"), [(IVSHMEM, 0), (NVME, 0)], ids=["ivshmem", "CMB"])
def test_both_ways(
    example: ModuleType, bdf: Callable[..., str], capsys: pytest.CaptureFixture[str], kind: str, index: int
) -> None:
    with no_dmabuf_left():
        status = example.main([bdf(NVME, 1), bdf(kind, index), "--kib", "256"])
    output = capsys.readouterr()
    assert status == 0, output.err
    assert output.out.count("ok  ") == 4
    assert "below the same host bridge" in output.out


def test_a_target_without_memory(
    example: ModuleType, bdf: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert example.main([bdf(NVME, 1), bdf(IVSHMEM), "--bar", "0"]) == 1
    assert "less than a page" in capsys.readouterr().err
    assert example.main([bdf(EDU), bdf(IVSHMEM)]) == 1

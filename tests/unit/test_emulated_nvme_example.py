"""examples/nvme_read.py on a controller that is software."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
from ways import served

import vfiopy
from vfiopy.drivers import nvme
from vfiopy.emulated import Nvme

EXAMPLE = Path(__file__).parents[2] / "examples" / "nvme_read.py"


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("nvme_read", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("interrupts", ["msix", "intx", "polling"])
def test_in_this_process(example: ModuleType, interrupts: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert example.main(["emulated:nvme", "--kib", "512", "--interrupts", interrupts]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "by emulated, " + interrupts in lines[0]
    assert lines[-1] == "ok       we read back our pattern: 512 KiB, every byte"


def test_over_a_socket(example: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    disk = Nvme()
    with served(disk) as path:
        assert example.main([f"vfio-user:{path}", "--kib", "64"]) == 0
    assert "every byte" in capsys.readouterr().out
    with vfiopy.open(disk) as device, nvme.Controller(device) as controller:
        found = controller.namespace(1).read(((1 << 20) + (64 << 10)) // 512, 128).tobytes()
        assert found == example.pattern(1, "driver", 64 << 10)


def test_what_the_kernel_would_have_to_do(example: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    for step in ("prepare", "verify"):
        assert example.main(["emulated:nvme", "--only", step]) == 1
        assert "the kernel does not drive emulated:nvme" in capsys.readouterr().err

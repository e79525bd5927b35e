"""The emulated NVMe controller on image files."""

from __future__ import annotations

from pathlib import Path

import pytest
from nvme_support import driven, noise, refused

from vfiopy.drivers import nvme
from vfiopy.drivers.nvme import commands
from vfiopy.emulated.nvme import Namespace, Nvme
from vfiopy.errors import BusyError, VfioError
from vfiopy.nvme_spec.status import Code


def test_an_image_keeps_what_was_written(tmp_path: Path) -> None:
    path = tmp_path / "disk.img"
    disk = Nvme([Namespace.image(path, size=1 << 30)])
    assert path.stat().st_size == 1 << 30
    with driven(disk) as (_, controller):
        controller.namespace(1).write(2000, noise(65536))
    disk.close()
    disk.close()
    assert path.stat().st_blocks * 512 < 1 << 20, "not sparse"
    with driven(Nvme([Namespace.image(path)])) as (_, controller):
        assert (controller.namespace(1).read(2000, 128) == noise(65536)).all()


def test_an_image_is_one_servers(tmp_path: Path) -> None:
    path = tmp_path / "disk.img"
    first = Namespace.image(path, size=1 << 20)
    with pytest.raises(BusyError, match=r"disk\.img: the image is in use"):
        Namespace.image(path)
    with pytest.raises(BusyError):
        Namespace.image(path, read_only=True)
    first.close()
    one, two = (Namespace.image(path, read_only=True) for _ in range(2))
    one.close()
    two.close()


def test_images_that_cannot_be(tmp_path: Path) -> None:
    odd = tmp_path / "odd.img"
    odd.write_bytes(bytes(1000))
    for make, message in (
        (lambda: Namespace.image(tmp_path / "none.img"), "give a size to have it made"),
        (lambda: Namespace.image(odd), "1000 bytes are not a whole number of blocks of 512"),
        (lambda: Namespace.image(odd, size=2048), "has 1000 bytes, not 2048"),
        (lambda: Namespace.image(tmp_path), "cannot be opened"),
        (lambda: Namespace.image("/dev/null", read_only=True), "a file or a block device"),
    ):
        with pytest.raises(VfioError, match=message):
            make()
    odd.write_bytes(bytes(1024))
    Namespace.image(odd).close()  # nothing kept it locked


def test_a_read_only_image(tmp_path: Path) -> None:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(noise(8192)))
    with driven(Nvme([Namespace.image(path, read_only=True)])) as (_, controller):
        space = controller.namespace(1)
        assert space.info.raw["nsattr"] == 1
        assert (space.read(0, 16) == noise(8192)).all()
        for command in (commands.write(1, 0, 1), commands.write_zeroes(1, 0, 1)):
            assert refused(controller, command, controller.device.dma.allocate(512), io=True) == Code.WRITE_PROTECTED
        with pytest.raises(nvme.NvmeError, match="Write Protected"):
            space.deallocate((0, 1))
        assert controller.admin.smart_log()["critical_warning"] == 8
    assert path.read_bytes() == bytes(noise(8192))


def test_an_image_that_became_shorter(tmp_path: Path) -> None:
    path = tmp_path / "disk.img"
    with driven(Nvme([Namespace.image(path, size=1 << 20)])) as (disk, controller):
        with path.open("r+b") as file:
            file.truncate(4096)
        buffer = controller.device.dma.allocate(512)
        assert refused(controller, commands.read(1, 100, 1), buffer, io=True) == Code.UNRECOVERED_READ_ERROR
        assert disk.logs.media_errors == 1
        assert controller.namespace(1).read(0, 8).size == 4096

"""``vfiopy serve nvme``: images in, a socket out, everything on the disk at the end."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from nvme_support import noise
from typer.testing import CliRunner

import vfiopy
from vfiopy.cli.app import app
from vfiopy.drivers import nvme

runner = CliRunner()
TREE = Path(__file__).parents[2]


def serve(*words: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "vfiopy", "serve", "nvme", *words]
    return subprocess.Popen(command, cwd=TREE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_images_are_served(tmp_path: Path) -> None:
    path, images = tmp_path / "nvme.sock", [tmp_path / "one.img", tmp_path / "two.img"]
    words = [word for image in images for word in ("--image", os.fspath(image))]
    serials = set()
    for round_ in range(2):
        with serve("--socket", os.fspath(path), *words, *(("--size", "16M") if not round_ else ())) as server:
            try:
                assert server.stdout is not None
                lines = [server.stdout.readline() for _ in range(5)]
                assert "vfio-user-pci" in lines[1]
                with vfiopy.open(f"vfio-user:{path}") as device, nvme.Controller(device) as controller:
                    serials.add(controller.info.serial)
                    first, second = controller.namespaces()
                    assert first.info.size == second.info.size == 16 << 20
                    if round_:
                        assert (second.read(100, 256) == noise(128 << 10)).all()
                    second.write(100, noise(128 << 10))
                again = runner.invoke(app, ["serve", "nvme", "--socket", str(tmp_path / "x.sock"), *words])
                assert again.exit_code == 1
                assert "the image is in use" in again.output
            finally:
                server.terminate()
            assert server.wait(10) == 0
    assert len(serials) == 1, "another disk each time"
    with images[1].open("rb") as file:
        file.seek(100 * 512)
        assert file.read(128 << 10) == bytes(noise(128 << 10))


@pytest.mark.parametrize(
    ("words", "message", "code"),
    [
        (["nvme", "--image", "none.img"], "give a size to have it made", 1),
        (["nvme", "--size", "big"], "no size; write", 2),
        (["nvme", "--size", "0"], "no size; write", 2),
        (["nvme", "--size", "1000"], "not a whole number of blocks", 1),
        (["nvme", "--block-size", "520"], "512 or 4096", 2),
        (["edu", "--image", "disk.img"], "are for nvme", 2),
        (["edu", "--read-only"], "are for nvme", 2),
    ],
)
def test_what_cannot_be_served(words: list[str], message: str, code: int, tmp_path: Path) -> None:
    answer = runner.invoke(app, ["serve", *words, "--socket", str(tmp_path / "x.sock")], env={"COLUMNS": "200"})
    assert answer.exit_code == code, answer.output
    assert message in answer.output
    assert not list(tmp_path.iterdir())

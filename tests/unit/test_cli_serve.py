"""``vfiopy serve nvme``: images in, a socket out, everything on the disk at the end."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from emulated_support import wait_for
from nvme_support import noise
from typer.testing import CliRunner

import vfiopy
from vfiopy.cli.app import app
from vfiopy.drivers import nvme
from vfiopy.emulated.nvme import Namespace

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


def test_a_second_sigterm_does_not_end_what_the_first_began(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here for real, in this process: the signal comes while an image is put on the disk."""
    path, images, synced = tmp_path / "nvme.sock", [tmp_path / f"{number}.img" for number in range(40)], []
    sync = Namespace.sync

    def again(namespace: Namespace) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        sync(namespace)
        synced.append(namespace.backing.name)

    def stop() -> None:
        wait_for(path.exists)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Namespace, "sync", again)
    words = [word for image in images for word in ("--image", os.fspath(image))]
    other = threading.Thread(target=stop)
    other.start()
    answer = runner.invoke(app, ["serve", "nvme", "--socket", os.fspath(path), "--size", "1M", *words])
    other.join()
    assert answer.exit_code == 0, answer.output
    assert synced == [os.fspath(image) for image in images]
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_sigterm_while_it_is_made_leaves_nothing_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, image, made = tmp_path / "nvme.sock", tmp_path / "disk.img", Namespace.image

    def asked(*words: Any, **options: Any) -> Namespace:
        os.kill(os.getpid(), signal.SIGTERM)
        return made(*words, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Namespace, "image", asked)
        words = ["serve", "nvme", "--socket", str(path), "--size", "1M", "--image", str(image)]
        answer = runner.invoke(app, words)
    assert (answer.exit_code, answer.output) == (0, "")
    assert not path.exists()
    Namespace.image(image).close()  # its lock is free
    gc.collect()  # what was never closed says so now
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


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
        (["edu", "--block-size", "4096"], "are for nvme", 2),
        (["nvme", "--read-only"], "give --image", 2),
    ],
)
def test_what_cannot_be_served(words: list[str], message: str, code: int, tmp_path: Path) -> None:
    answer = runner.invoke(app, ["serve", *words, "--socket", str(tmp_path / "x.sock")], env={"COLUMNS": "200"})
    assert answer.exit_code == code, answer.output
    assert message in answer.output
    assert not list(tmp_path.iterdir())

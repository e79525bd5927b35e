"""The cache: half-made things never count, and leftovers go away."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import lab_import
import pytest

from tools._lab.paths import cache, finished_folder, is_finished, locked, place, scratch


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def test_cache_is_below_the_xdg_folder(tmp_path: Path) -> None:
    assert cache("kernels") == tmp_path / "vfiopy" / "kernels"


def test_finished_folder_appears_only_at_the_end() -> None:
    target = cache("thing")
    with finished_folder(target) as folder:
        (folder / "file").write_text("1")
        assert not target.exists()
    assert is_finished(target)
    assert (target / "file").read_text() == "1"


def test_failed_work_leaves_nothing() -> None:
    target = cache("thing")

    def interrupted() -> None:
        with finished_folder(target) as folder:
            (folder / "file").touch()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not is_finished(target)
    assert list(target.parent.iterdir()) == []


def test_finished_folder_replaces_an_older_one() -> None:
    target = cache("thing")
    for text in ("old", "new"):
        with finished_folder(target) as folder:
            (folder / text).touch()
    assert {path.name for path in target.iterdir()} == {"new", ".complete"}


def test_scratch_removes_what_a_killed_run_left_but_not_what_is_alive() -> None:
    code = "import sys; from tools._lab.paths import scratch\n"
    code += "with scratch('a') as folder: print(folder, flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=lab_import.ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout
        theirs = Path(other.stdout.readline().strip())
        with scratch("b") as ours:
            assert theirs.exists()
            assert ours.exists()
        other.kill()
        other.wait()
    assert not ours.exists()
    assert theirs.exists()
    with scratch("c"):
        assert not theirs.exists()


def test_lock_keeps_a_second_process_waiting(capfd: pytest.CaptureFixture[str]) -> None:
    code = "from tools._lab.paths import locked\nwith locked('x'): print('in', flush=True)"
    with locked("x"):
        other = subprocess.Popen(
            [sys.executable, "-c", code],
            cwd=lab_import.ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert other.stderr
        assert "waiting" in other.stderr.readline()
        assert other.poll() is None
    out, _ = other.communicate(timeout=30)
    assert out == "in\n"


def test_places_are_given_out_up_to_their_number() -> None:
    code = "from tools._lab.paths import place\nwith place(2): print('in', flush=True)"
    with place(2):
        subprocess.run([sys.executable, "-c", code], cwd=lab_import.ROOT, check=True, capture_output=True, timeout=60)
        with place(2):
            other = subprocess.Popen(
                [sys.executable, "-c", code],
                cwd=lab_import.ROOT,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            assert other.stderr
            assert "2 guests are running already" in other.stderr.readline()
            assert other.poll() is None
        out, _ = other.communicate(timeout=60)
        assert out == "in\n"

"""How objects end: once, never from a finalizer, never in a forked child."""

from __future__ import annotations

import gc
import os
import pickle
import sys

import pytest

from vfiopy.errors import ClosedError, ForkedError, OverlapError, VfioError
from vfiopy.lives import Resource, drain_finalizers, retire


class Thing(Resource):
    def __init__(self, log: list[str]) -> None:
        super().__init__("thing 1")
        self.log = log

    def _release(self) -> None:
        self.log.append("released")


class Stubborn(Resource):
    def __init__(self) -> None:
        super().__init__("stubborn")
        self.refuse = True

    def _release(self) -> None:
        if self.refuse:
            raise ClosedError("not now")


def test_close_is_idempotent_and_bool_means_open() -> None:
    log: list[str] = []
    thing = Thing(log)
    assert thing
    thing.close()
    thing.close()
    assert not thing
    assert log == ["released"]
    with pytest.raises(ClosedError, match="thing 1 is closed"):
        thing.check_open()


def test_a_refused_close_leaves_the_object_open() -> None:
    thing = Stubborn()
    with pytest.raises(ClosedError):
        thing.close()
    assert thing
    thing.refuse = False
    thing.close()
    assert not thing


def test_dropped_object_is_released_by_the_next_operation_with_a_warning() -> None:
    log: list[str] = []
    Thing(log)
    gc.collect()
    assert log == []
    with pytest.warns(ResourceWarning, match="thing 1 was never closed"):
        assert drain_finalizers() == 1
    assert log == ["released"]
    assert drain_finalizers() == 0


def test_warnings_as_errors_do_not_lose_the_release() -> None:
    log: list[str] = []
    Thing(log)
    gc.collect()
    with pytest.MonkeyPatch.context() as patch:
        reported: list[BaseException] = []
        patch.setattr(sys, "unraisablehook", lambda unraisable: reported.append(unraisable.exc_value))
        drain_finalizers()
    assert log == ["released"]
    assert [type(error) for error in reported] == [ResourceWarning], "reported, and not raised at an innocent caller"


def test_what_goes_wrong_in_a_release_is_reported_and_stops_nothing() -> None:
    log: list[str] = []
    stubborn, thing = Stubborn(), Thing(log)
    del stubborn, thing
    gc.collect()
    reported: list[object] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "unraisablehook", reported.append)
        with pytest.warns(ResourceWarning):
            assert drain_finalizers() == 2
    assert len(reported) == 1
    assert log == ["released"]


def test_objects_that_failed_early_need_no_release() -> None:
    class Broken(Resource):
        def __init__(self) -> None:
            raise ValueError("early")

    with pytest.raises(ValueError, match="early"):
        Broken()
    gc.collect()
    assert drain_finalizers() == 0


def test_an_interrupted_drain_loses_nothing() -> None:
    class Interrupted(Thing):
        def _release(self) -> None:
            if "interrupted" not in self.log:
                self.log.append("interrupted")
                raise KeyboardInterrupt
            super()._release()

    first: list[str] = []
    second: list[str] = []
    things = [Thing(second), Interrupted(first)]  # a list drops its last item first
    del things
    gc.collect()
    with pytest.raises(KeyboardInterrupt):
        drain_finalizers()
    with pytest.warns(ResourceWarning, match="thing 1 was never closed"):
        assert drain_finalizers() == 2
    assert first == ["interrupted", "released"]
    assert second == ["released"]


def test_what_has_no_state_is_never_released_twice() -> None:
    calls: list[int] = []

    def release() -> None:
        calls.append(1)
        raise KeyboardInterrupt

    retire(release)
    with pytest.raises(KeyboardInterrupt):
        drain_finalizers()
    assert drain_finalizers() == 0
    assert calls == [1]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_forked_child_can_do_nothing_with_it() -> None:
    log: list[str] = []
    thing = Thing(log)
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        answer = b"no error"
        try:
            thing.check_open()
        except ForkedError as error:
            answer = str(error).encode()
        thing.close()
        os.write(writer, answer + (b"|released" if log else b"|untouched"))
        os._exit(0)
    os.waitpid(child, 0)
    text = os.read(reader, 4096).decode()
    os.close(reader)
    os.close(writer)
    assert "thing 1 belongs to process" in text
    assert "spawn" in text
    assert text.endswith("|untouched")
    thing.close()
    assert log == ["released"]


def test_errors_say_object_call_meaning_and_hint() -> None:
    error = OverlapError("0x1000 is taken", object="space 'dma'", call="IOMMU_IOAS_MAP", hint="unmap it first")
    assert str(error) == (
        "space 'dma': IOMMU_IOAS_MAP: 0x1000 is taken [EEXIST: File exists]\n  hint: unmap it first"
    )
    assert isinstance(error, ValueError)
    assert isinstance(error, OSError)
    assert error.errno == 17
    copy = pickle.loads(pickle.dumps(error))
    assert (str(copy), copy.hint, type(copy)) == (str(error), "unmap it first", OverlapError)


def test_without_a_call_the_errno_is_not_shown() -> None:
    assert str(VfioError("no good", object="BAR 0")) == "BAR 0: no good"

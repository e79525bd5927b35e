"""The selftest ends in a report, whatever happens."""

from __future__ import annotations

from typing import Any

import pytest
from ways import served

import vfiopy
from vfiopy import selftest
from vfiopy.emulated import Edu, EmulatedDeviceIo
from vfiopy.selftest import checks


def outcome(report: selftest.Report, name: str) -> tuple[str, str]:
    (found,) = [result for result in report.results if result.name == name]
    return found.status, found.detail


def test_an_emulated_device_passes() -> None:
    report = selftest.run("emulated:edu")
    assert report.ok
    assert report.device == {"vendor": "1234", "device": "11e8", "config_size": report.device["config_size"]}
    assert outcome(report, "nothing left open") == ("passed", "")


def test_a_device_behind_a_socket_passes_the_same_checks() -> None:
    near = selftest.run("emulated:edu")
    with served(Edu()) as path:
        far = selftest.run(f"vfio-user:{path}")
    assert far.ok
    assert [(result.name, result.status) for result in far.results] == [
        (result.name, result.status) for result in near.results
    ]
    assert outcome(far, "nothing left open") == ("passed", "")


def test_a_check_that_breaks_is_a_result(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(device: vfiopy.Device) -> None:
        raise BufferError("cannot close exported pointers exist")

    monkeypatch.setitem(checks.CHECKS, "map one page", broken)
    report = selftest.run("emulated:edu")
    assert not report.ok
    assert outcome(report, "map one page") == ("failed", "BufferError: cannot close exported pointers exist")
    assert outcome(report, "reset")[0] == "skipped", "the others are run all the same"


def test_a_device_that_cannot_be_closed_is_a_result(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[Any] = []

    def refuse(device: vfiopy.Device) -> None:
        kept.append(device)
        raise vfiopy.BusyError("it is held", object="BAR 0")

    with monkeypatch.context() as patch:
        patch.setattr(vfiopy.Device, "close", refuse)
        report = selftest.run("emulated:edu")
    assert outcome(report, "close") == ("failed", "BusyError: BAR 0: it is held")
    kept[0].close()


def test_a_device_that_falls_silent_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[vfiopy.Device] = []
    real = vfiopy.open

    def spy(*arguments: Any, **keywords: Any) -> vfiopy.Device:
        opened.append(real(*arguments, **keywords))

        def silent(*_: object) -> bytes:
            raise vfiopy.DeviceGoneError("no answer", object="emulated:edu")

        monkeypatch.setattr(EmulatedDeviceIo, "read", silent)
        return opened[0]

    monkeypatch.setattr(vfiopy, "open", spy)
    report = selftest.run("emulated:edu")
    assert report.device == {}
    assert outcome(report, "identity") == ("failed", "DeviceGoneError: emulated:edu: no answer")
    assert not opened[0]

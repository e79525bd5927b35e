"""Layouts, registers, commands and statuses, against numbers of the specification that are written out here again."""

from __future__ import annotations

import pickle
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vfiopy.drivers.nvme import AsyncEvent, Capabilities, ControllerInfo, NamespaceInfo, NvmeError, Status, commands
from vfiopy.nvme_spec import registers as reg
from vfiopy.nvme_spec import structures as layout


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("SQE", 64),
        ("CQE", 16),
        ("POWER_STATE", 32),
        ("IDENTIFY_CONTROLLER", 4096),
        ("IDENTIFY_NAMESPACE", 4096),
        ("LBA_FORMAT", 4),
        ("SMART_LOG", 512),
        ("ERROR_LOG_ENTRY", 64),
        ("RANGE", 16),
    ],
)
def test_sizes(name: str, size: int) -> None:
    dtype = getattr(layout, name)
    assert dtype.itemsize == size
    ends = sorted((offset, offset + kind.itemsize) for kind, offset in (dtype.fields[n][:2] for n in dtype.names))
    assert all(end <= start for (_, end), (start, _) in pairwise(ends)), "fields overlap"
    assert ends[-1][1] <= size


@pytest.mark.parametrize(
    ("dtype", "field", "offset", "size"),
    [
        (layout.SQE, "cid", 2, 2),
        (layout.SQE, "nsid", 4, 4),
        (layout.SQE, "mptr", 16, 8),
        (layout.SQE, "prp1", 24, 8),
        (layout.SQE, "prp2", 32, 8),
        (layout.SQE, "cdw10", 40, 4),
        (layout.SQE, "cdw15", 60, 4),
        (layout.CQE, "sqhd", 8, 2),
        (layout.CQE, "sqid", 10, 2),
        (layout.CQE, "cid", 12, 2),
        (layout.CQE, "status", 14, 2),
        (layout.IDENTIFY_CONTROLLER, "sn", 4, 20),
        (layout.IDENTIFY_CONTROLLER, "mn", 24, 40),
        (layout.IDENTIFY_CONTROLLER, "fr", 64, 8),
        (layout.IDENTIFY_CONTROLLER, "mdts", 77, 1),
        (layout.IDENTIFY_CONTROLLER, "ver", 80, 4),
        (layout.IDENTIFY_CONTROLLER, "rtd3e", 88, 4),
        (layout.IDENTIFY_CONTROLLER, "oacs", 256, 2),
        (layout.IDENTIFY_CONTROLLER, "aerl", 259, 1),
        (layout.IDENTIFY_CONTROLLER, "elpe", 262, 1),
        (layout.IDENTIFY_CONTROLLER, "tnvmcap", 280, 16),
        (layout.IDENTIFY_CONTROLLER, "sqes", 512, 1),
        (layout.IDENTIFY_CONTROLLER, "nn", 516, 4),
        (layout.IDENTIFY_CONTROLLER, "oncs", 520, 2),
        (layout.IDENTIFY_CONTROLLER, "vwc", 525, 1),
        (layout.IDENTIFY_CONTROLLER, "sgls", 536, 4),
        (layout.IDENTIFY_CONTROLLER, "subnqn", 768, 256),
        (layout.IDENTIFY_CONTROLLER, "psd", 2048, 1024),
        (layout.IDENTIFY_NAMESPACE, "nsze", 0, 8),
        (layout.IDENTIFY_NAMESPACE, "flbas", 26, 1),
        (layout.IDENTIFY_NAMESPACE, "dps", 29, 1),
        (layout.IDENTIFY_NAMESPACE, "noiob", 46, 2),
        (layout.IDENTIFY_NAMESPACE, "nguid", 104, 16),
        (layout.IDENTIFY_NAMESPACE, "eui64", 120, 8),
        (layout.IDENTIFY_NAMESPACE, "lbaf", 128, 256),
        (layout.SMART_LOG, "composite_temperature", 1, 2),
        (layout.SMART_LOG, "data_units_read", 32, 16),
        (layout.SMART_LOG, "error_log_entries", 176, 16),
        (layout.SMART_LOG, "temperature_sensors", 200, 16),
        (layout.ERROR_LOG_ENTRY, "status", 12, 2),
        (layout.ERROR_LOG_ENTRY, "nsid", 24, 4),
        (layout.RANGE, "slba", 8, 8),
    ],
)
def test_offsets(dtype: np.dtype[np.void], field: str, offset: int, size: int) -> None:
    assert dtype.fields is not None
    kind, at = dtype.fields[field][:2]
    assert (at, kind.itemsize) == (offset, size)


# --- registers ---------------------------------------------------------------------------------------------------

# What QEMU 11's nvme device says.
QEMU_CAP = 0x004018200F0107FF


def test_capabilities_of_qemu() -> None:
    caps = Capabilities.decode(QEMU_CAP)
    assert caps.queue_entries == 2048
    assert caps.contiguous_queues
    assert caps.ready_timeout == 7.5
    assert caps.doorbell_stride == 4
    assert caps.command_sets & 1
    assert caps.has_nvm_commands
    assert (caps.page_min, caps.page_max) == (4096, 65536)


def test_capabilities_at_the_other_end() -> None:
    raw = 0x0001 | 0xFF << 24 | 3 << 32 | 1 << 36 | 1 << 44 | 1 << 48 | 15 << 52 | 1 << 56 | 1 << 57 | 3 << 59
    caps = Capabilities.decode(raw)
    assert (caps.queue_entries, caps.ready_timeout, caps.doorbell_stride) == (2, 127.5, 32)
    assert (caps.page_min, caps.page_max) == (8192, 1 << 27)
    assert caps.subsystem_reset
    assert caps.persistent_region
    assert caps.memory_buffer
    assert caps.ready_modes == 3
    assert not caps.has_nvm_commands
    assert reg.ready_timeout(caps, 0x0000_0400) == 512.0
    assert reg.configuration(caps, 8192) == 7 << 4 | 1 << 7 | 6 << 16 | 4 << 20


def test_ready_timeout_is_never_nothing() -> None:
    assert reg.ready_timeout(Capabilities.decode(0), 0) == 0.5


def test_configuration() -> None:
    assert reg.configuration(Capabilities.decode(QEMU_CAP), 4096) == 0x460000
    assert reg.configuration(Capabilities.decode(1 << 43), 4096) == 0x460060


@pytest.mark.parametrize(
    ("queue", "stride", "submission", "completion"),
    [(0, 4, 0x1000, 0x1004), (1, 4, 0x1008, 0x100C), (3, 16, 0x1060, 0x1070), (65535, 4, 0x80FF8, 0x80FFC)],
)
def test_doorbells(queue: int, stride: int, submission: int, completion: int) -> None:
    assert reg.doorbell(queue, stride, completion=False) == submission
    assert reg.doorbell(queue, stride, completion=True) == completion


def test_version() -> None:
    assert [reg.version_text(v) for v in (0x10400, 0x10201, 0x20000)] == ["1.4", "1.2.1", "2.0"]


# --- commands ----------------------------------------------------------------------------------------------------


def test_counts_are_zero_based_in_the_entry() -> None:
    read = commands.read(7, 0x1_2345_6789, 65536)
    assert (read.opcode, read.nsid) == (2, 7)
    assert (read.cdw10, read.cdw11, read.cdw12) == (0x2345_6789, 1, 0xFFFF)
    assert commands.write(1, 0, 1, fua=True).cdw12 == 1 << 30
    assert commands.write_zeroes(1, 0, 9, deallocate=True).cdw12 == 1 << 25 | 8
    assert commands.dataset_management(1, 256).cdw10 == 255
    assert commands.dataset_management(1, 256).cdw11 == 4


def test_queue_commands() -> None:
    cq = commands.create_cq(3, 64, 0xABC000, 5)
    assert (cq.opcode, cq.cdw10, cq.cdw11, cq.prp1) == (5, 63 << 16 | 3, 5 << 16 | 3, 0xABC000)
    assert commands.create_cq(3, 64, 0xABC000, None).cdw11 == 1
    sq = commands.create_sq(3, 64, 0xDEF000, 2)
    assert (sq.opcode, sq.cdw10, sq.cdw11, sq.prp1) == (1, 63 << 16 | 3, 2 << 16 | 1, 0xDEF000)
    assert (commands.delete_sq(3).opcode, commands.delete_cq(3).opcode) == (0, 4)
    assert commands.abort(2, 0x11).cdw10 == 0x11 << 16 | 2


def test_log_page_lengths_are_dwords() -> None:
    command = commands.get_log_page(2, 512, keep=True)
    assert (command.cdw10, command.cdw11, command.nsid) == (127 << 16 | 1 << 15 | 2, 0, 0xFFFF_FFFF)
    long = commands.get_log_page(7, 1 << 20, offset=0x1_0000_0200)
    assert (long.cdw10 >> 16, long.cdw11) == (0xFFFF, 3)
    assert (long.cdw12, long.cdw13) == (0x200, 1)


# --- identify ----------------------------------------------------------------------------------------------------


def test_controller_info() -> None:
    raw = np.zeros(1, layout.IDENTIFY_CONTROLLER)
    raw["sn"], raw["mn"], raw["fr"] = b"  S1  ".ljust(20), b"A model".ljust(40), b"11.1.0"
    raw["mdts"], raw["aerl"], raw["rtd3e"], raw["oncs"], raw["vwc"] = 7, 3, 2_500_000, 0x8, 1
    raw["tnvmcap"] = np.void((5 << 64).to_bytes(16, "little"))
    info = ControllerInfo.decode(raw[0])
    assert (info.serial, info.model, info.firmware) == ("S1", "A model", "11.1.0")
    assert (info.transfer_pages, info.event_requests, info.shutdown_seconds) == (128, 4, 2.5)
    assert info.capacity == 5 << 64
    assert info.volatile_cache
    assert info.write_zeroes
    assert not info.dataset_management


@pytest.mark.parametrize(("flbas", "index"), [(0x00, 0), (0x12, 2), (0x25, 0x15), (0x6F, 0x3F)])
def test_namespace_format_index_has_two_parts(flbas: int, index: int) -> None:
    raw = np.zeros(1, layout.IDENTIFY_NAMESPACE)
    raw["nsze"], raw["flbas"] = 1000, flbas
    raw["lbaf"][0]["lbads"] = 9
    raw["lbaf"][0][index] = (8, 12, 0)
    info = NamespaceInfo.decode(4, raw[0])
    assert (info.nsid, info.blocks, info.block_size, info.metadata_size) == (4, 1000, 4096, 8)
    assert info.size == 4096000


# --- statuses ----------------------------------------------------------------------------------------------------


def test_success() -> None:
    assert Status.decode(0x0001).ok
    assert Status.decode(0x0000).name == "Successful Completion"


@pytest.mark.parametrize(
    ("field", "text"),
    [
        (0x4016, "Invalid Namespace or Format (generic, SCT 0h SC 0Bh)"),
        (0xC016, "Invalid Namespace or Format (generic, SCT 0h SC 0Bh, do not retry)"),
        (0x0100, "LBA Out of Range (generic, SCT 0h SC 80h)"),
        (0x0202, "Invalid Queue Identifier (command specific, SCT 1h SC 01h)"),
        (0x0502, "Unrecovered Read Error (media and data integrity, SCT 2h SC 81h)"),
        (0x0606, "Asymmetric Access Transition (path related, SCT 3h SC 03h)"),
        (0x0E0A, "vendor specific status 05h (vendor specific, SCT 7h SC 05h)"),
        (0x0182, "vendor specific status C1h (generic, SCT 0h SC C1h)"),
        (0x00FA, "unknown status 7Dh (generic, SCT 0h SC 7Dh)"),
        (0x0800, "unknown status 00h (reserved type 4, SCT 4h SC 00h)"),
    ],
)
def test_names(field: int, text: str) -> None:
    status = Status.decode(field)
    assert not status.ok
    assert str(status) == text


@given(st.integers(0, 0xFFFF))
def test_every_status_has_a_text_and_all_its_bits(field: int) -> None:
    status = Status.decode(field)
    assert str(status)
    again = status.sc << 1 | status.sct << 9 | status.crd << 12 | status.more << 14 | status.dnr << 15
    assert again == field & 0xFFFE


def test_errors_name_queue_command_and_remedy() -> None:
    error = NvmeError(Status.decode(0x8100), object="0000:00:05.0 I/O queue 1", call="Read of 8 blocks at LBA 9")
    assert str(error) == (
        "0000:00:05.0 I/O queue 1: Read of 8 blocks at LBA 9: "
        "LBA Out of Range (generic, SCT 0h SC 80h, do not retry) [EIO: Input/output error]\n"
        "  hint: the namespace ends before; namespace.blocks says where"
    )
    assert (error.sct, error.sc, error.dnr) == (0, 0x80, True)
    again = pickle.loads(pickle.dumps(error))
    assert str(again) == str(error)
    assert again.status == error.status


def test_events() -> None:
    event = AsyncEvent.decode(0x00020101)
    assert (event.type, event.information, event.log_page) == (1, 1, 2)
    assert str(event) == "health: temperature threshold crossed"
    assert str(AsyncEvent.decode(0x7705)) == "type 5: information 77h"

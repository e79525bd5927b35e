"""The table of errno meanings: complete where it must be, free of typing mistakes, and what errors are made of it."""

from __future__ import annotations

import errno
import os
import pickle
import re
from pathlib import Path

import pytest

from vfiopy import errors, uapi
from vfiopy.errno_table import TABLE, look_up
from vfiopy.errno_table.generic import FAMILIES, GENERIC
from vfiopy.errors import (
    IovaRangeError,
    IrqCountError,
    MemlockError,
    MemoryKindError,
    NoSpaceError,
    NotMappedError,
    NotSupportedError,
    NotViableError,
    OverlapError,
    PermissionDeniedError,
    RevokedError,
    VfioError,
    from_errno,
)
from vfiopy.vfio_user.wire import Command

ROWS = [
    *((call, number, row) for call, rows in TABLE.items() for number, row in rows.items()),
    *((prefix, number, row) for prefix, rows in FAMILIES for number, row in rows.items()),
    *(("any call", number, row) for number, row in GENERIC.items()),
]
SOURCES = "".join(path.read_text() for path in (Path(errors.__file__).parent / "kernel").rglob("*.py"))


@pytest.mark.parametrize(("call", "number", "row"), ROWS, ids=[f"{c}-{errno.errorcode.get(n, n)}" for c, n, _ in ROWS])
def test_row_is_well_formed(call: str, number: int, row: tuple[str, str, str]) -> None:
    kind, meaning, hint = row
    assert issubclass(getattr(errors, kind), VfioError)
    assert kind in errors.__all__
    assert number in errno.errorcode
    assert len(meaning) > 10
    for text in (meaning, hint):
        assert text == text.strip()
        assert not text.endswith(".")
        assert "\n" not in text
        assert "  " not in text


def test_rows_are_about_calls_that_exist() -> None:
    for call in TABLE:
        if call.startswith(("VFIO_DEVICE_FEATURE_", "IOMMU_OPTION_")):
            assert hasattr(uapi, call), call
        elif call.startswith("VFIO_USER_"):
            assert call.removeprefix("VFIO_USER_") in Command.__members__, call
        elif call.isupper() or call.startswith(("VFIO_", "IOMMU_")):
            assert hasattr(uapi, call), call
            assert f'"{call}"' in SOURCES, call
        elif call.startswith("open "):
            assert f'kind = "{call.removeprefix("open ")}"' in SOURCES, call
        else:
            assert f'"{call}"' in SOURCES, call


def test_every_call_of_the_kernel_layer_has_a_name_that_users_can_search_for() -> None:
    names = set(re.findall(r'_(?:ioctl|ioctl_value|query)\(\s*"([^"]+)"', SOURCES))
    assert len(names) > 25
    assert all(hasattr(uapi, name) for name in names)


@pytest.mark.parametrize(
    ("number", "call", "kind", "says"),
    [
        (errno.ENOMEM, "VFIO_IOMMU_MAP_DMA", MemlockError, "RLIMIT_MEMLOCK"),
        (errno.EEXIST, "VFIO_IOMMU_MAP_DMA", OverlapError, "overlaps"),
        (errno.EINVAL, "VFIO_IOMMU_MAP_DMA", IovaRangeError, "usable IOVAs"),
        (errno.ENOSPC, "VFIO_IOMMU_MAP_DMA", NoSpaceError, "dma_entry_limit"),
        (errno.EFAULT, "IOMMU_IOAS_MAP", MemoryKindError, "is it a PCI BAR? export a dma-buf"),
        (errno.ENOENT, "IOMMU_IOAS_UNMAP", NotMappedError, "unmap exactly what was mapped"),
        (errno.ENODEV, "IOMMU_IOAS_MAP_FILE", RevokedError, "memory decode"),
        (errno.EPERM, "VFIO_SET_IOMMU", PermissionDeniedError, "vfio_iommu_type1.allow_unsafe_interrupts=1"),
        (errno.EPERM, "VFIO_DEVICE_BIND_IOMMUFD", PermissionDeniedError, "iommufd.allow_unsafe_interrupts=1"),
        (errno.EBUSY, "VFIO_DEVICE_BIND_IOMMUFD", NotViableError, "close /dev/vfio/N"),
        (errno.ENOENT, "open iommufd", NotSupportedError, "backend='type1v2'"),
        # the family speaks where the call does not
        (errno.ENOTTY, "IOMMU_HW_QUEUE_ALLOC", NotSupportedError, "iommufd does not have the call"),
        (errno.ENOTTY, "VFIO_DEVICE_FEATURE_MIG_DATA_SIZE", NotSupportedError, "does not have this feature"),
        (errno.EACCES, "open VFIO group", PermissionDeniedError, "udev rule"),
        # and what holds for any call where neither does
        (errno.EMFILE, "VFIO_GROUP_GET_DEVICE_FD", VfioError, "RLIMIT_NOFILE"),
    ],
)
def test_class_and_text(number: int, call: str, kind: type[VfioError], says: str) -> None:
    error = from_errno(number, call=call, object="0000:00:04.0", detail="iova 0x1000")
    assert type(error) is kind
    assert says in str(error)
    assert error.errno == number
    assert error.call == call
    assert error.object == "0000:00:04.0"
    assert "(iova 0x1000)" in error.meaning
    assert str(error).startswith(f"0000:00:04.0: {call}: ")
    assert f"[{errno.errorcode[number]}: {os.strerror(number)}]" in str(error)


def test_an_errno_that_nobody_expects_keeps_the_systems_words() -> None:
    error = from_errno(errno.EL2HLT, call="VFIO_DEVICE_RESET", object="x")
    assert type(error) is VfioError
    assert error.meaning == os.strerror(errno.EL2HLT)
    assert error.hint == ""
    assert look_up(errno.EL2HLT, "VFIO_DEVICE_RESET") is None


def test_builtin_classes_still_catch() -> None:
    with pytest.raises(PermissionError):
        raise from_errno(errno.EPERM, call="VFIO_SET_IOMMU", object="x")
    with pytest.raises(MemoryError):
        raise from_errno(errno.ENOMEM, call="IOMMU_IOAS_MAP", object="x")
    with pytest.raises(ValueError, match="overlaps"):
        raise from_errno(errno.EEXIST, call="IOMMU_IOAS_MAP", object="x")


@pytest.mark.parametrize(
    "error",
    [
        from_errno(errno.EEXIST, call="IOMMU_IOAS_MAP", object="IOAS 1", detail="iova 0x0"),
        IrqCountError("too few", available=3, object="x", call="VFIO_DEVICE_SET_IRQS", hint="ask for 3"),
    ],
)
def test_errors_survive_pickling(error: VfioError) -> None:
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error)
    assert str(copy) == str(error)
    assert vars(copy) == vars(error)

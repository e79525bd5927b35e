"""What an error means: of vfiopy, of the kernel's log, or of another program that uses VFIO."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from vfiopy.doctor.kernel_log import match_lines
from vfiopy.errno_table import TABLE, look_up

__all__ = ["Explanation", "explain", "find_calls", "find_errnos"]


@dataclass(frozen=True, slots=True)
class Explanation:
    """One thing that the text may mean.

    Attributes:
        about: the call, or what the kernel logged.
        errno: name of the error number, empty for a line of the kernel's log.
        cause: what it means there.
        remedy: what to do; may be empty.
    """

    about: str
    errno: str
    cause: str
    remedy: str


_NAMES: Final = {name: number for number, name in errno.errorcode.items()} | {
    "EOPNOTSUPP": errno.EOPNOTSUPP,
    "EDEADLK": errno.EDEADLK,
    "EWOULDBLOCK": errno.EAGAIN,
}
_NUMBER = re.compile(r"(?:os error|errno|error(?: code)?|ret(?:urned|val)?|code|rc)\W{0,4}-?(\d{1,3})\b", re.IGNORECASE)
_NEGATIVE = re.compile(r"(?<![\w.:])-(\d{1,3})\b")

# How QEMU, DPDK, SPDK, libvfn, cloud-hypervisor and others call what they do, and what a group of them begins with.
_ALIASES: Final = (
    (
        r"VFIO_MAP_DMA|vfio_(?:container_)?dma_map|vfio_dma_mem_map|IOMMU_MAP_DMA|(?<!backend_)\bmap_dma|DMA map",
        "VFIO_IOMMU_MAP_DMA",
    ),
    (r"vfio_(?:container_)?dma_unmap|unmap_dma", "VFIO_IOMMU_UNMAP_DMA"),
    (r"iommufd.*map_file|IOAS_MAP_FILE", "IOMMU_IOAS_MAP_FILE"),
    (r"iommufd(?:_backend)?_?map(?:_dma)?\b|IOAS_MAP\b", "IOMMU_IOAS_MAP"),
    (r"IOAS_UNMAP|iommufd.*unmap", "IOMMU_IOAS_UNMAP"),
    (r"set(?:up)?.{0,20}iommu.{0,20}(?:container|type)|SET_IOMMU", "VFIO_SET_IOMMU"),
    (r"set (?:group )?container|add.*group.*to.*container|SET_CONTAINER", "VFIO_GROUP_SET_CONTAINER"),
    (r"UNSET_CONTAINER", "VFIO_GROUP_UNSET_CONTAINER"),
    (r"get(?:ting)? device.{0,20}(?:fd|from group)|GET_DEVICE_FD|VF token", "VFIO_GROUP_GET_DEVICE_FD"),
    (r"bind.{0,12}iommufd|BIND_IOMMUFD|VF token", "VFIO_DEVICE_BIND_IOMMUFD"),
    (r"attach.{0,20}(?:ioas|hwpt|iommufd)|ATTACH_IOMMUFD", "VFIO_DEVICE_ATTACH_IOMMUFD_PT"),
    (r"set(?:ting)?_?\s?irqs?|SET_IRQS|enable (?:INTx|MSI)", "VFIO_DEVICE_SET_IRQS"),
    (r"HOT_RESET|hot[ -]reset", "VFIO_DEVICE_PCI_HOT_RESET"),
    (r"DEVICE_RESET|reset (?:the )?device", "VFIO_DEVICE_RESET"),
    (r"DMA_BUF\b|dma-?buf", "VFIO_DEVICE_FEATURE_DMA_BUF"),
    (r"IOVA_RANGES", "IOMMU_IOAS_IOVA_RANGES"),
    (r"(?:mmap|map)\w*.{0,30}(?:region|BAR)", "mmap of a VFIO device"),
    (r"/dev/vfio/vfio\b|open.{0,20}container", "open VFIO container"),
    (r"/dev/vfio/devices/", "open VFIO device"),
    (r"/dev/vfio/(?:noiommu-)?\d+|open.{0,20}group", "open VFIO group"),
    (r"/dev/iommu\b", "open iommufd"),
)
_VIABLE = re.compile(r"not viable|all devices.*(bound|group).*vfio", re.IGNORECASE)


def explain(text: str) -> list[Explanation]:
    """Explain an error: ``"EPERM VFIO_SET_IOMMU"``, a message of any program, or lines of the kernel's log.

    Args:
        text: where an errno is named (``EPERM``, ``os error 1``, ``Operation not permitted``, ``-1``) and a call
            (its ioctl, a node, or the words of QEMU and others for it), their meaning together. With a call only,
            each errno that it is known for; with an errno only, each call that gives it a meaning.

    Returns:
        What it may mean, likeliest first; empty where nothing is known.
    """
    found: dict[tuple[str, str], Explanation] = {}
    for one in _read(text):
        found.setdefault((one.about, one.errno), one)
    return list(found.values())


def _read(text: str) -> Iterator[Explanation]:
    for logged in match_lines(text.splitlines()):
        yield Explanation(f"log: {logged.pattern.name}", "", logged.pattern.cause, logged.pattern.remedy)
    if _VIABLE.search(text):
        yield from _rows("VFIO_GROUP_GET_DEVICE_FD", errno.EPERM)
    calls, numbers = find_calls(text), find_errnos(text)
    for call in calls:
        for number in numbers or TABLE.get(call, {}):
            yield from _rows(call, number)
    if not calls:
        for number in numbers:
            # The calls that everybody makes come first in the table.
            for call, rows in TABLE.items():
                if number in rows and not call.startswith("VFIO_USER_"):
                    yield from _rows(call, number)


def _rows(call: str, number: int) -> Iterator[Explanation]:
    row = look_up(number, call)
    if row is not None:
        yield Explanation(call, errno.errorcode.get(number, str(number)), row.meaning, row.hint)


def find_calls(text: str) -> list[str]:
    """The calls that a text names, by their own names or those of other programs; longest names win."""
    exact = [call for call in TABLE if re.search(rf"(?<!\w){re.escape(call)}(?!\w)", text)]
    if exact:
        return exact
    found = [call for regex, call in _ALIASES if re.search(regex, text, re.IGNORECASE)]
    return list(dict.fromkeys(found))


def find_errnos(text: str) -> list[int]:
    """The error numbers that a text names: as a name, as the system's words, or as a number."""
    numbers = [_NAMES[word] for word in re.findall(r"\bE[A-Z0-9]+\b", text) if word in _NAMES]
    low = text.casefold()
    words = ((number, re.escape(os.strerror(number).casefold())) for number in errno.errorcode)
    numbers += [number for number, word in words if re.search(rf"\b{word}", low)]
    if not numbers:
        digits = [*_NUMBER.findall(text), *_NEGATIVE.findall(text)]
        numbers = [int(word) for word in digits if int(word) in errno.errorcode]
    return list(dict.fromkeys(numbers))

"""The table of ioctls: each with its typed method, read from the code, and with what users call instead."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import vfiopy
from vfiopy import uapi
from vfiopy.kernel import ioctl

__all__ = ["FRIENDLY", "feature_names", "in_markdown", "ioctl_names", "methods"]

_FOLDER = Path(vfiopy.__file__).parent / "kernel" / "ioctl"
_VFIO = range(0x3B64, 0x3C00)  # _IO(';', 100) and up, of VFIO and of iommufd
_OTHERS = re.compile(r"(DMA_BUF_IOCTL|DMA_BUF_SET_NAME|DMA_HEAP_IOCTL|UDMABUF_CREATE|SYNC_IOC)\w*")
_FLAGS = ("GET", "SET", "PROBE", "MASK", "SET_MASTER", "CLEAR_MASTER")
_FEATURES = {
    name
    for name in uapi.__all__
    if name.startswith("VFIO_DEVICE_FEATURE_") and name.removeprefix("VFIO_DEVICE_FEATURE_") not in _FLAGS
}
_ALIASES = {"DMA_BUF_SET_NAME_A", "DMA_BUF_SET_NAME_B"}  # of DMA_BUF_SET_NAME, for 32 and 64 bits


def ioctl_names() -> list[str]:
    """Every ioctl of the headers, in their order, that is not of one architecture."""
    source = Path(uapi.__file__).read_text()
    names = re.findall(r"^([A-Z]\w*): Final = ", source, re.MULTILINE)
    return [
        name
        for name in names
        if (name.startswith(("VFIO_", "IOMMU_")) and getattr(uapi, name) in _VFIO)
        or (_OTHERS.fullmatch(name) and not name.endswith("MAGIC") and name not in _ALIASES)
    ]


def feature_names() -> list[str]:
    """The features of VFIO_DEVICE_FEATURE that vfio-pci has: those that its typed methods name."""
    return sorted(name for name in methods() if name.startswith("VFIO_DEVICE_FEATURE_"))


def methods() -> dict[str, list[str]]:
    """Ioctl, or feature → the public typed methods that make it: ``Class.method``."""
    names = {*ioctl_names(), *_ALIASES}
    found: dict[str, list[str]] = {}
    for path in sorted(_FOLDER.glob("*.py")):
        for owner in (part for part in ast.parse(path.read_text()).body if isinstance(part, ast.ClassDef)):
            own = {part.name: part for part in owner.body if isinstance(part, ast.FunctionDef)}
            for name, method in own.items():
                reached = _attributes(method, "uapi").union(
                    *(_attributes(own[inner], "uapi") for inner in _attributes(method, "self") & own.keys())
                )
                for number in sorted(reached):
                    if not name.startswith("_") and (number in names or number in _FEATURES):
                        found.setdefault(number, []).append(f"{owner.name}.{name}")
    return found


def _attributes(method: ast.FunctionDef, of: str) -> set[str]:
    parts = (part for part in ast.walk(method) if isinstance(part, ast.Attribute))
    return {part.attr for part in parts if isinstance(part.value, ast.Name) and part.value.id == of}


def in_markdown() -> str:
    """Both tables, as Markdown."""
    known = methods()
    lines = ["| ioctl | typed method | what most programs use |", "|---|---|---|"]
    for name in ioctl_names():
        own = known.get(name) or known[f"{name}_B"]
        shown = ["FeatureCalls.feature"] if name == "VFIO_DEVICE_FEATURE" else own
        lines.append(f"| `{name}` | {', '.join(map(_reference, shown))} | {FRIENDLY[name]} |")
    lines += ["", "## Features of VFIO_DEVICE_FEATURE", "", "| feature | typed method | what most programs use |"]
    lines += ["|---|---|---|"]
    for name in feature_names():
        short = name.removeprefix("VFIO_DEVICE_FEATURE_")
        lines.append(f"| `{short}` | {', '.join(map(_reference, known[name]))} | {FRIENDLY[name]} |")
    return "\n".join(lines)


def _reference(method: str) -> str:
    """To the class that users have: the first exported one that has it from where it is written."""
    owner, name = method.split(".")
    for public in sorted(ioctl.__all__, key=lambda public: (public.startswith("Compat"), public)):
        thing = getattr(ioctl, public)
        if isinstance(thing, type) and any(base.__name__ == owner for base in thing.__mro__):
            return f"{{py:meth}}`{public}.{name}() <vfiopy.kernel.ioctl.{public}.{name}>`"
    raise LookupError(f"vfiopy.kernel.ioctl exports no class with {method}")


def _call(name: str, text: str = "") -> str:
    kind = "func" if name in ("open", "bind", "kernel.hot_reset", "kernel.hot_reset_info") else "meth"
    shown = text or f"{name.removeprefix('kernel.')}()"
    return f"{{py:{kind}}}`{shown} <vfiopy.{name}>`"


def _property(name: str) -> str:
    return f"{{py:attr}}`{name.removeprefix('kernel.')} <vfiopy.{name}>`"


_OPEN = _call("open")
_CLOSE = _call("Device.close")
_MAP = f"{_call('AddressSpace.map')}, {_call('AddressSpace.allocate')}"
_UNMAP = f"{_call('Mapping.unmap')}, {_call('AddressSpace.unmap')}"
_IOAS = "kernel.Ioas"
_RARE = "(the typed method)"

FRIENDLY = {
    "VFIO_GET_API_VERSION": _OPEN,
    "VFIO_CHECK_EXTENSION": _call("kernel.Container.has"),
    "VFIO_SET_IOMMU": f"{_call('open', 'open(backend=...)')}",
    "VFIO_GROUP_GET_STATUS": f"{_OPEN}; before it, {_call('Function.group_blockers')}",
    "VFIO_GROUP_SET_CONTAINER": _OPEN,
    "VFIO_GROUP_UNSET_CONTAINER": _CLOSE,
    "VFIO_GROUP_GET_DEVICE_FD": f"{_OPEN}, with `vf_token=` for a virtual function",
    "VFIO_DEVICE_GET_INFO": _property("Device.info"),
    "VFIO_DEVICE_GET_REGION_INFO": "`device.bars`, `device.config`, " + _call("Device.region"),
    "VFIO_DEVICE_GET_IRQ_INFO": _property("Interrupt.info"),
    "VFIO_DEVICE_SET_IRQS": f"{_call('Interrupt.enable')}, {_call('Interrupt.mask')}, {_call('Vector.trigger')}",
    "VFIO_DEVICE_RESET": _call("Device.reset"),
    "VFIO_DEVICE_GET_PCI_HOT_RESET_INFO": _call("kernel.hot_reset_info"),
    "VFIO_DEVICE_PCI_HOT_RESET": _call("kernel.hot_reset"),
    "VFIO_DEVICE_QUERY_GFX_PLANE": _call("DmaBuf.of_plane"),
    "VFIO_DEVICE_GET_GFX_DMABUF": _call("DmaBuf.of_plane"),
    "VFIO_DEVICE_IOEVENTFD": _RARE,
    "VFIO_DEVICE_FEATURE": "see below",
    "VFIO_DEVICE_BIND_IOMMUFD": _OPEN,
    "VFIO_DEVICE_ATTACH_IOMMUFD_PT": _OPEN,
    "VFIO_DEVICE_DETACH_IOMMUFD_PT": _CLOSE,
    "VFIO_MIG_GET_PRECOPY_INFO": _RARE,
    "VFIO_IOMMU_GET_INFO": f"{_call('AddressSpace.usable_ranges')}",
    "VFIO_IOMMU_MAP_DMA": _MAP,
    "VFIO_IOMMU_UNMAP_DMA": _UNMAP,
    "VFIO_IOMMU_DIRTY_PAGES": _RARE,
    "IOMMU_DESTROY": "`close()` of the object",
    "IOMMU_IOAS_ALLOC": f"{_OPEN}, {_call('kernel.Iommufd.ioas')}",
    "IOMMU_IOAS_IOVA_RANGES": f"{_call('AddressSpace.usable_ranges')}",
    "IOMMU_IOAS_ALLOW_IOVAS": _call(f"{_IOAS}.allow"),
    "IOMMU_IOAS_MAP": _MAP,
    "IOMMU_IOAS_NOIOMMU_GET_PA": _OPEN + " with `noiommu=True`",
    "IOMMU_IOAS_MAP_FILE": f"{_call('AddressSpace.map')} of a memfd, {_call('AddressSpace.import_dmabuf')}",
    "IOMMU_IOAS_COPY": f"{_call('DmaBufMapping.copy_to')}, {_call(f'{_IOAS}.copy_from')}",
    "IOMMU_IOAS_UNMAP": _UNMAP,
    "IOMMU_OPTION": _RARE,
    "IOMMU_VFIO_IOAS": f"{_OPEN} with `backend=\"iommufd-compat-type1v2\"`",
    "IOMMU_HWPT_ALLOC": _call("kernel.Iommufd.hwpt"),
    "IOMMU_GET_HW_INFO": _call("kernel.Iommufd.hw_info"),
    "IOMMU_HWPT_SET_DIRTY_TRACKING": _RARE,
    "IOMMU_HWPT_GET_DIRTY_BITMAP": _RARE,
    "IOMMU_HWPT_INVALIDATE": _RARE,
    "IOMMU_FAULT_QUEUE_ALLOC": _call("kernel.Iommufd.fault_queue"),
    "IOMMU_VIOMMU_ALLOC": _RARE,
    "IOMMU_VDEVICE_ALLOC": _RARE,
    "IOMMU_IOAS_CHANGE_PROCESS": _RARE,
    "IOMMU_VEVENTQ_ALLOC": _RARE,
    "IOMMU_HW_QUEUE_ALLOC": _RARE,
    "DMA_BUF_IOCTL_SYNC": _call("DmaBuf.cpu_access"),
    "DMA_BUF_SET_NAME": _property("DmaBuf.name"),
    "DMA_BUF_IOCTL_EXPORT_SYNC_FILE": _call("DmaBuf.fence"),
    "DMA_BUF_IOCTL_IMPORT_SYNC_FILE": _call("DmaBuf.add_fence"),
    "DMA_HEAP_IOCTL_ALLOC": _call("DmaBuf.of_heap"),
    "UDMABUF_CREATE": f"{_call('DmaBuf.allocate')}, {_call('DmaBuf.of_memfd')}",
    "UDMABUF_CREATE_LIST": _call("DmaBuf.of_memfd"),
    "SYNC_IOC_MERGE": _call("Fence.merge"),
    "SYNC_IOC_FILE_INFO": _property("Fence.info"),
    "SYNC_IOC_SET_DEADLINE": _call("Fence.set_deadline"),
    "VFIO_DEVICE_FEATURE_BUS_MASTER": f"{_property('Device.bus_master')}, which writes COMMAND",
    "VFIO_DEVICE_FEATURE_DMA_BUF": f"{_call('DmaBuf.of_bar')}, {_call('AddressSpace.peer')}",
    "VFIO_DEVICE_FEATURE_DMA_LOGGING_REPORT": _RARE,
    "VFIO_DEVICE_FEATURE_DMA_LOGGING_START": _RARE,
    "VFIO_DEVICE_FEATURE_DMA_LOGGING_STOP": _RARE,
    "VFIO_DEVICE_FEATURE_LOW_POWER_ENTRY": _RARE,
    "VFIO_DEVICE_FEATURE_LOW_POWER_ENTRY_WITH_WAKEUP": _RARE,
    "VFIO_DEVICE_FEATURE_LOW_POWER_EXIT": _RARE,
    "VFIO_DEVICE_FEATURE_MIGRATION": _RARE,
    "VFIO_DEVICE_FEATURE_MIG_DATA_SIZE": _RARE,
    "VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE": _RARE,
    "VFIO_DEVICE_FEATURE_MIG_PRECOPY_INFOv2": _RARE,
    "VFIO_DEVICE_FEATURE_PCI_VF_TOKEN": f"{_OPEN} with `vf_token=`",
}
"""Ioctl → what a user of vfiopy does instead of it."""

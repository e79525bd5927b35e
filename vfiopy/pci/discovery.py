"""Finding PCI functions: by address, by attribute, by class, by predicate.

Enumeration goes through libudev (pyudev) where that is installed, else straight through sysfs: the same
functions either way. pyudev is imported when it is first needed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from vfiopy.errors import DeviceNotFoundError
from vfiopy.pci.address import PciAddress
from vfiopy.pci.function import Function
from vfiopy.pci.names import class_matches
from vfiopy.pci.system import System

__all__ = ["find", "function"]

_NEAR = 4  # addresses named in an error


def function(address: PciAddress | str, *, system: System | None = None) -> Function:
    """The function at an address.

    Args:
        address: ``"0000:00:05.0"``; the domain may be left out where it is 0.
        system: other roots than /sys, /proc and /dev.

    Raises:
        PciAddressError: the text is not an address.
        DeviceNotFoundError: nothing is there; names what is near.
    """
    system = System() if system is None else system
    found = Function(PciAddress.parse(address), system)
    if not found.exists:
        raise _not_found(found.address, system)
    return found


def find(
    *,
    vendor: int | None = None,
    device: int | None = None,
    subsystem_vendor: int | None = None,
    subsystem_device: int | None = None,
    class_code: int | str | None = None,
    driver: str | None = None,
    iommu_group: int | None = None,
    address: PciAddress | str | None = None,
    predicate: Callable[[Function], bool] | None = None,
    udev: bool | None = None,
    system: System | None = None,
) -> list[Function]:
    """Find functions that have all the attributes asked for, sorted by address; maybe none.

    Args:
        vendor: vendor ID.
        device: device ID.
        subsystem_vendor: subsystem vendor ID.
        subsystem_device: subsystem ID.
        class_code: base class (0x01), class and sub-class (0x0108) or all 24 bits (0x010802); a word such as
            ``"nvme"``; or 2, 4 or 6 hexadecimal digits.
        driver: name of the driver that holds it; ``""`` for those that no driver holds.
        iommu_group: number of its IOMMU group.
        address: where it sits; nothing there is an empty list, not an error.
        predicate: called with each function that passed the rest.
        udev: True takes libudev (``ImportError`` where it is missing), False sysfs, None what is there.
        system: other roots than /sys, /proc and /dev.

    Raises:
        PciAddressError, ValueError: the address or the class word means nothing.
    """
    system = System() if system is None else system
    where = None if address is None else PciAddress.parse(address)
    if class_code is not None:
        class_matches(0, class_code)  # a wrong word is an error even where there is no function

    def fits(candidate: Function) -> bool:
        numbers = (
            (vendor, "vendor"),
            (device, "device"),
            (subsystem_vendor, "subsystem_vendor"),
            (subsystem_device, "subsystem_device"),
            (iommu_group, "iommu_group"),
        )
        return (
            all(wanted is None or getattr(candidate, name) == wanted for wanted, name in numbers)
            and (class_code is None or class_matches(candidate.class_code, class_code))
            and (driver is None or (candidate.driver or "") == driver)
            and (predicate is None or predicate(candidate))
        )

    if where is not None:
        here = Function(where, system)
        return [here] if here.exists and fits(here) else []
    found = (Function(name, system) for name in _names(system, udev))
    return sorted((one for one in found if one.exists and fits(one)), key=lambda one: one.address)


def _names(system: System, udev: bool | None) -> Iterable[str]:
    if udev is None:
        udev = system.is_this_machine and _has_udev()
    if not udev:
        return system.names(system.pci_devices)
    import pyudev  # noqa: PLC0415  only when first needed

    return [one.sys_name for one in pyudev.Context().list_devices(subsystem="pci")]


def _has_udev() -> bool:
    """Whether pyudev and the library under it are there."""
    try:
        import pyudev  # noqa: PLC0415

        pyudev.Context()
    except (ImportError, OSError):
        return False
    return True


def _not_found(address: PciAddress, system: System) -> DeviceNotFoundError:
    if not system.pci_devices.is_dir():
        return DeviceNotFoundError(
            f"this machine shows no PCI bus: {system.pci_devices} is missing",
            object=str(address),
            hint="is sysfs mounted? Containers often hide it",
        )
    known = [PciAddress.parse(name) for name in system.names(system.pci_devices)]
    here = (address.bus, address.device, address.function)
    ways: tuple[tuple[str, Callable[[PciAddress], bool]], ...] = (
        ("the same number is in another domain", lambda one: (one.bus, one.device, one.function) == here),
        ("the device has other functions", lambda one: one.slot == address.slot),
        (
            "the same device number is on another bus",
            lambda one: (one.domain, one.device, one.function) == (address.domain, *here[1:]),
        ),
        ("the bus has", lambda one: (one.domain, one.bus) == (address.domain, address.bus)),
    )
    for what, is_near in ways:
        near = [str(one) for one in known if is_near(one)]
        if near:
            more = f" and {len(near) - _NEAR} more" if len(near) > _NEAR else ""
            return DeviceNotFoundError(
                "no PCI function has this address",
                object=str(address),
                hint=f"{what}: {', '.join(near[:_NEAR])}{more}",
            )
    return DeviceNotFoundError(
        "no PCI function has this address",
        object=str(address),
        hint=f"none of the machine's {len(known)} functions is near; vfiopy.find() lists them",
    )

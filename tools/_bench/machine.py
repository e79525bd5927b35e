"""What the figures were taken on: a figure without it says nothing."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from datetime import UTC, datetime
from pathlib import Path

__all__ = ["describe"]

CLOCK_SOURCES = Path("/sys/devices/system/clocksource/clocksource0/available_clocksource")
HYPERVISORS = {"qemu": "TCG", "kvm": "KVM", "none": "native"}


def _cpu_fields() -> dict[str, str]:
    fields: dict[str, str] = {}
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        key, _, value = line.partition(":")
        fields.setdefault(key.strip(), value.strip())
    return fields


def _cpu_name(fields: dict[str, str]) -> str:
    if name := fields.get("model name"):
        family = f"family {fields.get('cpu family', '?')} model {fields.get('model', '?')}"
        return f"{name}, {family}"
    # arm64 names no model here
    return f"{platform.machine()} implementer {fields.get('CPU implementer', '?')} part {fields.get('CPU part', '?')}"


def _virtualization(fields: dict[str, str]) -> str:
    """Say ``"native"``, ``"KVM"``, ``"TCG"`` or what else it is."""
    if "TCG" in fields.get("model name", ""):
        return "TCG"
    if tool := shutil.which("systemd-detect-virt"):
        found = subprocess.run([tool, "--vm"], capture_output=True, text=True, check=False).stdout.strip()
        return HYPERVISORS.get(found, found)
    if "hypervisor" not in fields.get("flags", "").split() and platform.machine() == "x86_64":
        return "native"
    if CLOCK_SOURCES.exists() and "kvm-clock" in CLOCK_SOURCES.read_text().split():
        return "KVM"
    return "unknown hypervisor" if platform.machine() == "x86_64" else "unknown"


def describe() -> dict[str, object]:
    """Describe processor, virtualization, kernel and Python."""
    fields = _cpu_fields()
    return {
        "cpu": _cpu_name(fields),
        "cpus": os.cpu_count(),
        "virtualization": _virtualization(fields),
        "kernel": platform.release(),
        "machine": platform.machine(),
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "gil": getattr(sys, "_is_gil_enabled", lambda: True)(),
        "compiler": sysconfig.get_config_var("CC"),
        "load": round(os.getloadavg()[0], 2),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }

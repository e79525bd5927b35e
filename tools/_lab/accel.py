"""KVM if it really boots a guest here, else TCG."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

from .paths import cache, say
from .qemu import Qemu

__all__ = ["accelerator"]

PROBE_SECONDS = 15
KVM = ["-accel", "kvm", "-cpu", "host"]
TCG = ["-accel", "tcg,thread=multi", "-cpu", "max"]


def _boots(qemu: Qemu, kernel: Path) -> bool:
    """Whether the kernel gets far enough under KVM to miss its root file system."""
    command = [*qemu.command, "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-m", "512"]
    command += [*KVM, "-serial", "stdio", "-kernel", str(kernel), "-append", "console=ttyS0 panic=-1"]
    try:
        result = subprocess.run(
            command, check=False, stdin=subprocess.DEVNULL, capture_output=True, timeout=PROBE_SECONDS
        )
    except subprocess.TimeoutExpired:
        return False
    return b"Unable to mount root" in result.stdout


def accelerator(qemu: Qemu, kernel: Path) -> list[str]:
    """QEMU arguments for the accelerator; ``VFIOPY_LAB_ACCEL=kvm|tcg`` decides without a probe.

    ``/dev/kvm`` may exist and still never boot a guest (nested virtualization that is only half there), so
    the verdict comes from a boot with a time limit. It is remembered until the host boots again.
    """
    forced = os.environ.get("VFIOPY_LAB_ACCEL")
    if forced:
        return KVM if forced == "kvm" else TCG
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        return TCG
    key = f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {qemu.version}"
    record = cache("kvm.json")
    try:
        known = json.loads(record.read_text())
    except (OSError, ValueError):
        known = {}
    if known.get("key") != key:
        say(f"does KVM boot a guest here? (at most {PROBE_SECONDS} s; remembered until the host boots again)")
        known = {"key": key, "kvm": _boots(qemu, kernel)}
        record.write_text(json.dumps(known))
        say("KVM works" if known["kvm"] else "it does not: the guest will be emulated (TCG)")
    return KVM if known["kvm"] else TCG

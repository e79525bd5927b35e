"""tools/demo: from a fresh clone to a script that drives a device, without hardware or privileges."""

from __future__ import annotations

import subprocess
import sys
import time

from .environment import PYTHON, ensure_build, ensure_environment
from .packages import BUILD, ensure_packages
from .report import TREE, SetupError, say, step

__all__ = ["main"]

EXAMPLE = "examples/edu.py"
NEXT = """
What you saw: {example} drove QEMU's edu device, here a Python class in the same process.
The same script drives the real one; only the name changes.

Next:
  less {example}
      the script; it is short
  .venv/bin/vfiopy selftest emulated:edu
      what a driver needs of a device, checked one by one; on your hardware: vfiopy selftest BDF
  tools/lab run --bind 0000:00:04.0 -- python {example} 0000:00:04.0
      the same script on a real kernel with QEMU's device (builds the kernel first: 5-10 minutes, once)
  README.md
      real hardware: IOMMU on, binding, memory limits, permissions; where everything is in the code
"""


def main() -> int:
    """Set up and run the example."""
    started = time.monotonic()
    try:
        with step("system packages"):
            ensure_packages(BUILD)
        with step("virtual environment"):
            ensure_environment("cli")
        with step("extensions"):
            ensure_build()
        say(f"{EXAMPLE} emulated:edu")
        command = [str(PYTHON), EXAMPLE, "emulated:edu"]
        status = subprocess.run(command, cwd=TREE, stdin=subprocess.DEVNULL, check=False).returncode
    except SetupError as error:
        print(f"tools/demo: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("tools/demo: interrupted", file=sys.stderr)
        return 130
    if status:
        print(f"tools/demo: {EXAMPLE} failed with exit status {status}", file=sys.stderr)
        return 1
    say(f"done in {time.monotonic() - started:.0f} s")
    print(NEXT.format(example=EXAMPLE))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""tools/docs: the documentation as a site."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from .environment import PYTHON, ensure_build, ensure_environment
from .packages import BUILD, ensure_packages
from .report import TREE, SetupError, step

__all__ = ["SITE", "build_command", "main"]

SITE = TREE / "build" / "docs"


def build_command() -> list[str | Path]:
    """Build all of it anew; a warning is an error, and so is a name that nothing stands for."""
    options = ["-W", "--keep-going", "-n", "-q", "-E", "-a"]
    return [PYTHON, "-m", "sphinx", *options, "-d", SITE.with_name("docs-doctrees"), TREE / "docs", SITE]


def main() -> int:
    """Set up and build."""
    argparse.ArgumentParser(prog="tools/docs", description="Build docs/ as a site in build/docs.").parse_args()
    try:
        with step("system packages"):
            ensure_packages(BUILD)
        with step("virtual environment"):
            ensure_environment("docs")
        with step("extensions"):
            ensure_build()
        with step("site"):
            status = subprocess.run(build_command(), cwd=TREE, stdin=subprocess.DEVNULL, check=False).returncode
    except SetupError as error:
        print(f"tools/docs: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("tools/docs: interrupted", file=sys.stderr)
        return 130
    if status == 0:
        print(f"open {SITE / 'index.html'}")
    return status


if __name__ == "__main__":
    sys.exit(main())

"""``vfiopy run``: a script with the device open."""

from __future__ import annotations

import gc
import runpy
import sys
import traceback
from pathlib import Path
from types import TracebackType
from typing import Annotated

import typer

import vfiopy
from vfiopy.cli.common import refusals_told
from vfiopy.cli.place import BackendOption, TargetArgument

__all__ = ["run_run"]


def run_run(
    context: typer.Context,
    script: Annotated[Path, typer.Argument(help="Python file.", exists=True, dir_okay=False, readable=True)],
    target: TargetArgument,
    backend: BackendOption = None,
) -> None:
    """Run a script with 'device' open: vfiopy run [--backend B] SCRIPT TARGET [ARGS...].

    The script sees device and vfiopy as globals, __name__ == "__main__", and its own path and ARGS in sys.argv. Its
    exit status is this command's, a traceback begins at the script, and the device is closed at the end.
    """
    with refusals_told(), vfiopy.open(target, backend=backend) as device:
        status = _run(script, [*context.args], {"device": device, "vfiopy": vfiopy})
        gc.collect()  # what the script made and left in circles: views of BARs, buffers
    raise typer.Exit(status)


def _run(script: Path, arguments: list[str], names: dict[str, object]) -> int:
    old_argv, old_path = sys.argv, sys.path[:]
    sys.argv = [str(script), *arguments]
    sys.path.insert(0, str(script.resolve().parent))  # as python SCRIPT does
    try:
        runpy.run_path(str(script), init_globals=names, run_name="__main__").clear()
    except SystemExit as ended:
        return _status(ended.code)
    except KeyboardInterrupt:
        return 130  # 128 + SIGINT, as a shell has it
    except BaseException as error:
        error.__traceback__ = _of_script(error.__traceback__, str(script))
        traceback.print_exception(error)
        traceback.clear_frames(error.__traceback__)
        return 1
    finally:
        sys.argv, sys.path[:] = old_argv, old_path
        sys.stdout.flush()
    return 0


def _status(code: object) -> int:
    """What Python itself makes of SystemExit's code."""
    if code is None:
        return 0
    if isinstance(code, int):
        return code & 0xFF
    sys.stderr.write(f"{code}\n")
    return 1


def _of_script(trace: TracebackType | None, script: str) -> TracebackType | None:
    """The traceback from the script on: ours and runpy's frames say nothing to who wrote it."""
    here = trace
    while here is not None:
        if here.tb_frame.f_code.co_filename == script:
            return here
        here = here.tb_next
    return None  # a SyntaxError has no frame of the script

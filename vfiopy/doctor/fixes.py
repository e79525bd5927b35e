"""What the doctor may fix by itself: what is safe, and can be undone. Everything else stays with the reader."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from vfiopy import pci
from vfiopy.doctor.examine import Report, examine
from vfiopy.doctor.finding import Finding, Severity
from vfiopy.errors import BindingError, VfioError
from vfiopy.pci import Function, System, is_vfio_driver

__all__ = ["Fix", "fix"]

_PATIENCE = 60.0  # seconds, for modprobe


@dataclass(frozen=True, slots=True)
class Fix:
    """One thing that was done, or would be.

    Attributes:
        check: the check whose finding it answers.
        object: PCI address, or ``machine``.
        action: what it does.
        undo: the command that takes it back.
        outcome: ``planned``, ``done``, or ``failed: ...``.
    """

    check: str
    object: str
    action: str
    undo: str
    outcome: str = "planned"


@dataclass(frozen=True, slots=True)
class _Step:
    fix: Fix
    run: Callable[[], object]
    covers: tuple[tuple[str, str], ...] = ()


def fix(
    functions: Iterable[Function],
    *,
    dry_run: bool = False,
    system: System | None = None,
    state_dir: Path | str | None = None,
) -> tuple[list[Fix], Report]:
    """Do what is safe about what :func:`examine` finds, in its order, and examine again after each step.

    Loads vfio-pci; clears an override that a driver left behind; binds a function, with its whole group if that is
    what it takes, when the running system uses none of them; never one without an IOMMU. Where something stands in
    the way that this cannot fix, nothing that comes after it is done. How things were is written down first:
    ``vfiopy restore`` goes back.

    Args:
        functions: which ones.
        dry_run: only say what would be done.
        system: other roots than /sys, /proc and /dev.
        state_dir: folder of records, as for :func:`vfiopy.bind`.

    Returns:
        What was done, and what is found after it.
    """
    system = System() if system is None else system
    those = {str(one): one for one in functions}
    done: list[Fix] = []
    settled: set[tuple[str, str]] = set()
    failed: set[str] = set()
    while True:
        report = examine(those.values(), system=system)
        step = _next(report, those, settled, failed, system, state_dir)
        if step is None:
            return done, report
        settled |= {(step.fix.check, step.fix.object), *step.covers}
        if dry_run:
            done.append(step.fix)
            continue
        try:
            step.run()
        except (VfioError, OSError, subprocess.SubprocessError) as error:
            words = error.meaning if isinstance(error, VfioError) else str(error)
            failed |= {step.fix.object, *(where for _, where in step.covers)}
            done.append(replace(step.fix, outcome=f"failed: {words}"))
        else:
            done.append(replace(step.fix, outcome="done"))


def _next(
    report: Report,
    those: dict[str, Function],
    settled: set[tuple[str, str]],
    failed: set[str],
    system: System,
    state_dir: Path | str | None,
) -> _Step | None:
    stuck = set(failed)
    for finding in report.findings:
        key = (finding.check, finding.object)
        if "machine" in stuck or finding.object in stuck or key in settled:
            continue
        step = next(_steps(finding, those.get(finding.object), system, state_dir), None)
        if step is not None:
            return step
        if finding.problem.severity is Severity.BLOCKS:
            stuck.add(finding.object)
    return None


def _steps(finding: Finding, one: Function | None, system: System, state_dir: Path | str | None) -> Iterator[_Step]:
    if finding.check == "vfio module":
        made = Fix(finding.check, finding.object, "modprobe vfio-pci", "modprobe -r vfio-pci")
        yield _Step(made, lambda: _load("vfio-pci"), covers=(("vfio module", "machine"),))
    elif one is None:
        return
    elif finding.check == "driver override":
        override = one.driver_override
        if is_vfio_driver(override) and one.driver is None:
            return  # vfio-pci refused it, or is not loaded: another finding says why
        # Not "vfiopy restore": with a record of vfiopy's that goes further back.
        undo = f"echo {override} > {one.sysfs}/driver_override"
        made = Fix(finding.check, finding.object, f"clear driver_override ({override})", undo)
        yield _Step(made, lambda: pci.clear_override(one, state_dir=state_dir, system=system))
    elif finding.check in ("not bound", "group not viable") and one.iommu_group is not None:
        others = [other for other in one.group_blockers() if other != one]
        wanted_too = [other for other in others if not other.is_bridge]
        if len(wanted_too) < len(others) or any(pci.uses(other) for other in (one, *wanted_too) if not other.is_vfio):
            return  # a bridge's driver, or what the running system uses
        # What a VFIO driver has stays with it: a variant's device would lose what that driver can do.
        wanted = wanted_too if one.is_vfio else [one, *wanted_too]
        names = " ".join(map(str, wanted))
        made = Fix(finding.check, finding.object, f"vfiopy bind {names}", f"vfiopy unbind {names}")
        yield _Step(
            made,
            lambda: pci.bind(wanted, state_dir=state_dir, system=system).keep(),
            covers=(("group not viable", str(one)), ("not bound", str(one))),
        )


def _load(module: str) -> None:
    try:
        subprocess.run(["modprobe", module], check=True, capture_output=True, text=True, timeout=_PATIENCE)
    except subprocess.CalledProcessError as error:
        raise BindingError(
            f"modprobe {module} failed: {error.stderr.strip()}", object="machine", call="modprobe"
        ) from error

"""``vfiopy doctor``: why a device cannot be used."""

from __future__ import annotations

import sys
from dataclasses import asdict
from typing import Annotated, Any, TextIO
from uuid import UUID

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from vfiopy.cli.common import console, print_json, refusals_told, system_of
from vfiopy.cli.complete import complete_address
from vfiopy.doctor import (
    Finding,
    Fix,
    Report,
    Severity,
    examine,
    explain,
    fix,
    read_kernel_log,
    study_log,
    try_out,
)
from vfiopy.errors import VfioError
from vfiopy.pci import Function, PciAddress, System, find, function
from vfiopy.pci.p2p import ancestors

__all__ = ["run_doctor"]

_COLOURS = {Severity.BLOCKS: "bold red", Severity.LIMITS: "yellow", Severity.NOTE: "cyan"}


def run_doctor(
    context: typer.Context,
    address: Annotated[
        str | None,
        typer.Argument(
            help="PCI address; left out: the machine, and each device bound to VFIO.", autocompletion=complete_address
        ),
    ] = None,
    log: Annotated[bool, typer.Option("--log", help="Look through the kernel's log too.")] = False,
    log_file: Annotated[
        typer.FileText | None,
        typer.Option(
            "--log-file",
            encoding="utf-8",
            errors="replace",
            help="As --log, of a saved log (dmesg, journalctl -k); - is standard input.",
        ),
    ] = None,
    error: Annotated[
        str | None,
        typer.Option(
            "--explain", metavar="ERROR", help="Only explain an error: 'EPERM VFIO_SET_IOMMU', or a message; - reads."
        ),
    ] = None,
    deeper: Annotated[bool, typer.Option("--open", help="Open the device too (which resets it), and try it.")] = False,
    backend: Annotated[str | None, typer.Option(help="For --open: the way to open it.")] = None,
    vf_token: Annotated[
        UUID | None, typer.Option("--vf-token", help="For --open: the token of a virtual function.")
    ] = None,
    noiommu: Annotated[bool, typer.Option("--noiommu", help="For --open: accept that there is no IOMMU.")] = False,
    repair: Annotated[bool, typer.Option("--fix", help="Do what is safe and can be undone.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="For --fix: only say what would be done.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")] = False,
) -> None:
    """Say why a device cannot be opened, mapped or reset: cause, evidence, remedy, what to fix first.

    Opens and changes nothing, without --open and --fix. Exit status 1 when something keeps a device from being used.
    """
    if error is not None:
        _explain(sys.stdin.read() if error == "-" else error, as_json)
        return
    if deeper and address is None:
        raise typer.BadParameter("--open takes a PCI address")
    if dry_run and not repair:
        raise typer.BadParameter("--dry-run belongs to --fix")
    system = system_of(context)
    fixes: list[Fix] = []
    with refusals_told():
        if address is None:
            functions = find(predicate=lambda one: one.is_vfio, system=system)
        else:
            functions = [function(address, system=system)]
        if repair:
            fixes, report = fix(functions, dry_run=dry_run, system=system)
        else:
            report = examine(functions, system=system)
        if deeper:
            report = _tried(report, functions[0], backend, vf_token, noiommu)
        if log or log_file is not None:
            report = _logged(report, None if address is None else functions[0], log_file, system)
    if as_json:
        print_json(_as_dict(report) | {"fixes": [asdict(one) for one in fixes]})
    else:
        _print_fixes(console(), fixes)
        if repair and not fixes:
            console().print("nothing here that may be fixed without you")
        _print(console(), report)
    raise typer.Exit(0 if report.ok else 1)


def _tried(report: Report, one: Function, backend: str | None, vf_token: UUID | None, noiommu: bool) -> Report:
    reason = "" if one.is_vfio else "VFIO does not hold it"
    if any(finding.check == "held" and finding.object == str(one) for finding in report.findings):
        reason = "somebody has it open"
    if reason:
        return report.joined([], skipped=[(str(one), "open", reason)])
    attempt = try_out(one, backend=backend, vf_token=vf_token, noiommu=noiommu)
    known = {(finding.check, finding.object) for finding in report.findings}
    fresh = [finding for finding in attempt.findings if (finding.check, finding.object) not in known]
    return report.joined(fresh, attempt.passed, attempt.skipped)


def _logged(report: Report, one: Function | None, log_file: TextIO | None, system: System) -> Report:
    try:
        lines = read_kernel_log(system) if log_file is None else log_file.read().splitlines()
    except VfioError as error:  # kept to root, as distributions do; the rest of the report is worth having
        reason = f"{error.meaning}; {error.hint}" if error.hint else error.meaning
        return report.joined([], skipped=[("machine", "log", reason)])
    # The ports above a device report what happens to its link.
    wanted = None if one is None else [one.address, *(PciAddress.parse(port) for port in ancestors(one)[1:-1])]
    return report.joined(study_log(lines, wanted))


def _explain(text: str, as_json: bool) -> None:
    found = explain(text)
    if as_json:
        print_json({"format": 1, "explanations": [asdict(one) for one in found]})
    else:
        screen = console()
        for one in found:
            screen.print(Text.assemble((f"{one.about} {one.errno}".strip(), "bold"), f": {one.cause}"))
            if one.remedy:
                _hang(screen, "   remedy:   ", one.remedy)
        if not found:
            screen.print("nothing is known about that: name the errno, and the ioctl or the node")
    raise typer.Exit(0 if found else 1)


def _finding(finding: Finding) -> dict[str, str]:
    return {
        "check": finding.check,
        "object": finding.object,
        "severity": finding.problem.severity.value,
        "cause": finding.problem.cause,
        "evidence": finding.problem.evidence,
        "remedy": finding.problem.remedy,
    }


def _as_dict(report: Report) -> dict[str, Any]:
    return {
        "format": 1,
        "ok": report.ok,
        "findings": [_finding(finding) for finding in report.findings],
        "passed": [{"object": where, "check": name} for where, name in report.passed],
        "skipped": [{"object": where, "check": name, "reason": reason} for where, name, reason in report.skipped],
    }


def _hang(screen: Console, label: str, text: str) -> None:
    """A label, and a text that folds to the right of it."""
    grid = Table.grid()
    grid.add_column(no_wrap=True, style="dim")
    grid.add_column(overflow="fold")
    grid.add_row(label, Text(text))
    screen.print(grid)


def _print_fixes(screen: Console, fixes: list[Fix]) -> None:
    for one in fixes:
        colour = "green" if one.outcome == "done" else "bold red" if one.outcome.startswith("failed") else "cyan"
        screen.print(Text.assemble((one.outcome, colour), f"  {one.object}: ", (one.action, "bold")))
        _hang(screen, "   undo:     ", one.undo)


def _print(screen: Console, report: Report) -> None:
    for number, finding in enumerate(report.findings, 1):
        problem = finding.problem
        screen.print(
            Text.assemble(
                f"{number}. ",
                (problem.severity.value, _COLOURS[problem.severity]),
                f"  {finding.object}: ",
                (problem.cause, "bold"),
            )
        )
        _hang(screen, "   evidence: ", problem.evidence)
        _hang(screen, "   remedy:   ", problem.remedy)
    for where, name, reason in report.skipped:
        screen.print(Text(f"not checked: {where}, {name}: {reason}", style="dim"))
    verdict = "nothing keeps it from being used" if report.ok else "fix the first one first"
    screen.print(f"{len(report.findings)} found, {len(report.passed)} checks passed: {verdict}")

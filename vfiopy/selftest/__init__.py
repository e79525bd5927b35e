"""A non-destructive check of one device on one machine: ``vfiopy selftest BDF``."""

from vfiopy.selftest.report import Report, Result, Status
from vfiopy.selftest.runner import run

__all__ = ["Report", "Result", "Status", "run"]

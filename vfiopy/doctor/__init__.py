"""Why a device cannot be opened, mapped or reset: from sysfs, procfs and nodes, the kernel's log, an error's text."""

from vfiopy.doctor.examine import Report, examine
from vfiopy.doctor.explain import Explanation, explain
from vfiopy.doctor.finding import Finding, Severity
from vfiopy.doctor.kernel_log import read_kernel_log, study_log
from vfiopy.doctor.symptoms import SYMPTOMS, Symptom

__all__ = [
    "SYMPTOMS",
    "Explanation",
    "Finding",
    "Report",
    "Severity",
    "Symptom",
    "examine",
    "explain",
    "read_kernel_log",
    "study_log",
]

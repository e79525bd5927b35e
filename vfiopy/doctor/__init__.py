"""Why a device cannot be opened, mapped or reset: from sysfs, procfs and nodes, the kernel's log, an error's text."""

from vfiopy.doctor.examine import Report, examine
from vfiopy.doctor.explain import Explanation, explain
from vfiopy.doctor.finding import Finding, Severity
from vfiopy.doctor.fixes import Fix, fix
from vfiopy.doctor.kernel_log import read_kernel_log, study_log
from vfiopy.doctor.symptoms import SYMPTOMS, Symptom
from vfiopy.doctor.trying import Attempt, try_out

__all__ = [
    "SYMPTOMS",
    "Attempt",
    "Explanation",
    "Finding",
    "Fix",
    "Report",
    "Severity",
    "Symptom",
    "examine",
    "explain",
    "fix",
    "read_kernel_log",
    "study_log",
    "try_out",
]

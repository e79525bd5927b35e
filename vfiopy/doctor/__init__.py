"""Why a device cannot be opened, mapped or reset, from sysfs, procfs and the nodes alone; changes nothing."""

from vfiopy.doctor.examine import Report, examine
from vfiopy.doctor.finding import Finding, Severity

__all__ = ["Finding", "Report", "Severity", "examine"]

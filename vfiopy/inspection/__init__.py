"""Looking at the address spaces of another process: of one that lets us, or, as root, at the IOMMU's page tables."""

from vfiopy.inspection.server import Inspection, allow_inspection

__all__ = ["Inspection", "allow_inspection"]

"""Named registers and fields over a BAR or configuration space; see docs/registers.md."""

from vfiopy.registers.access import Access, RegisterSpace, access_of
from vfiopy.registers.bound import Array, Field, Memory, Register, Registers
from vfiopy.registers.config_space import config_register, config_registers
from vfiopy.registers.peakrdl import PeakRdlCallbacks, peakrdl_async_callbacks, peakrdl_callbacks
from vfiopy.registers.registermap import RegisterMap
from vfiopy.registers.spec import FieldSpec, GroupSpec, MemorySpec, RegisterSpec
from vfiopy.registers.systemrdl import from_systemrdl, load

__all__ = [
    "Access",
    "Array",
    "Field",
    "FieldSpec",
    "GroupSpec",
    "Memory",
    "MemorySpec",
    "PeakRdlCallbacks",
    "Register",
    "RegisterMap",
    "RegisterSpace",
    "RegisterSpec",
    "Registers",
    "access_of",
    "config_register",
    "config_registers",
    "from_systemrdl",
    "load",
    "peakrdl_async_callbacks",
    "peakrdl_callbacks",
]

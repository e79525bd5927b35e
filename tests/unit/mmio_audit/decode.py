"""The width of a memory operand, for the instructions that compilers make of a scalar access.

Encodings: Intel 64 and IA-32 Architectures Software Developer's Manual, volume 2.
"""

from __future__ import annotations

__all__ = ["decode_width"]

_OPERAND_SIZE = 0x66
_STRING_PREFIXES = (0xF2, 0xF3)
_REX = range(0x40, 0x50)
_REX_W = 8

# opcode: (is a store, is one byte wide)
_ONE_BYTE = {
    0x88: (True, True),  # mov r/m8, r8
    0x89: (True, False),  # mov r/m, r
    0x8A: (False, True),  # mov r8, r/m8
    0x8B: (False, False),  # mov r, r/m
    0xA4: (None, True),  # movs byte
    0xA5: (None, False),  # movs
    0xAA: (True, True),  # stos byte
    0xAB: (True, False),  # stos
    0xC6: (True, True),  # mov r/m8, imm8
    0xC7: (True, False),  # mov r/m, imm
    0x63: (False, None),  # movsxd: reads 4
}
# second byte after 0x0f: width read by the extending loads
_EXTENDING_LOADS = {0xB6: 1, 0xB7: 2, 0xBE: 1, 0xBF: 2}


def decode_width(code: bytes, *, is_write: bool) -> int:
    """Return how many bytes the instruction reads or writes in memory.

    Raises:
        ValueError: an instruction that is not among the scalar loads and stores (a vector access, say), or one whose
            direction is not the one that the processor reported.
    """
    position = 0
    narrow = False
    while code[position] == _OPERAND_SIZE or code[position] in _STRING_PREFIXES:
        narrow |= code[position] == _OPERAND_SIZE
        position += 1
    rex = 0
    if code[position] in _REX:
        rex = code[position]
        position += 1
    scalar = 8 if rex & _REX_W else 2 if narrow else 4
    opcode = code[position]
    if opcode == 0x0F and code[position + 1] in _EXTENDING_LOADS and not is_write:
        return _EXTENDING_LOADS[code[position + 1]]
    if opcode not in _ONE_BYTE:
        raise ValueError(f"not a scalar load or store: {code.hex(' ')}")
    stores, byte = _ONE_BYTE[opcode]
    if stores is not None and stores != is_write:
        raise ValueError(f"{code.hex(' ')} cannot have been a {'store' if is_write else 'load'}")
    if byte is None:
        return 4
    return 1 if byte else scalar

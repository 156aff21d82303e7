"""Generates PTX that decodes NF4 codes in registers, eight at a time, without a load per value.

All values of one output and group are code -> round(NF4_VALUES[code] * scale), so there are only
16 different ones. `table_ptx` multiplies and rounds those 16, and lays them out as two planes of
16 bytes, the low and the high bytes of the rounded values, four registers each. `lookup_ptx` then
reads both planes with byte permutes, whose selectors are the codes themselves: about three
instructions per value, with the same bits as multiplying value by value.

Every operand belongs to one element of a tensor, so that the result does not depend on how the
compiler distributes a tensor over threads. No operand is read after a result is written: the
compiler may assign both to the same register. Not yet measured on a device. The alternative is a
load per value from a table of 16 floats.
"""

import struct

from engine.model.quantized_weight import NF4_VALUES

TABLE_REGISTERS = 8  # the low bytes of codes 0-3, 4-7, 8-11, 12-15, then the high bytes
TABLE_CONSTRAINTS = ",".join(["=r"] * TABLE_REGISTERS + ["f"])
LOOKUP_CONSTRAINTS = ",".join(["=r"] * 4 + ["r"] * (1 + TABLE_REGISTERS))


def table_ptx(pair_type: str) -> str:
    """Return PTX: one float32 scale ($8) -> table ($0 .. $7). `pair_type`: bf16x2 or f16x2."""
    lines = [".reg .f32 value<16>;", ".reg .b32 pair<8>;"]
    for code, value in enumerate(NF4_VALUES):
        lines.append(f"mul.rn.f32 value{code}, $8, 0f{_float_bits(value):08X};")
    for i in range(8):  # the second operand becomes the lower half
        lines.append(f"cvt.rn.{pair_type}.f32 pair{i}, value{2 * i + 1}, value{2 * i};")
    for i in range(4):
        lines.append(f"prmt.b32 ${i}, pair{2 * i}, pair{2 * i + 1}, 0x6420;")
        lines.append(f"prmt.b32 ${4 + i}, pair{2 * i}, pair{2 * i + 1}, 0x7531;")
    return _block(lines)


def lookup_ptx() -> str:
    """Return PTX: a word of eight codes ($4), a table ($5 .. $12) -> four pairs of values.

    The pairs are $0 .. $3, the first value of each in the lower half.
    """
    lines = [".reg .b32 index, side, below, above, low0, high0, low1, high1;"]
    lines.append("and.b32 index, $4, 0x77777777;")
    lines.append("shr.u32 side, $4, 1;")
    lines.append("and.b32 side, side, 0x44444444;")
    lines.append("or.b32 side, side, 0x32103210;")  # byte i of `below`, or of `above` from 8 on
    for half in range(2):
        if half:
            lines += ["shr.u32 index, index, 16;", "shr.u32 side, side, 16;"]
        for plane, first in (("low", 5), ("high", 9)):
            lines.append(f"prmt.b32 below, ${first}, ${first + 1}, index;")
            lines.append(f"prmt.b32 above, ${first + 2}, ${first + 3}, index;")
            lines.append(f"prmt.b32 {plane}{half}, below, above, side;")
    for half in range(2):
        lines.append(f"prmt.b32 ${2 * half}, low{half}, high{half}, 0x5140;")
        lines.append(f"prmt.b32 ${2 * half + 1}, low{half}, high{half}, 0x7362;")
    return _block(lines)


def _block(lines: list[str]) -> str:
    return "{\n" + "\n".join(lines) + "\n}"


def _float_bits(value: float) -> int:
    return struct.unpack("<I", struct.pack("<f", value))[0]

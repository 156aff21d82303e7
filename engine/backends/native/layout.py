"""Compares the ctypes structs and enums with those that the native library was compiled with.

structs.py mirrors them by hand, and a field in the wrong place corrupts memory silently. The
library therefore describes its own (src/layout.cpp), one line of text for each:
`ReefLoraSegment 16 sites:pointer64@0 start:int32@8 ...`: bytes, then name, type and offset of each
field; `enum KvFormat BF16=0 INT8=1`: the values.
"""

import ctypes as c
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import ModuleType

ABSENT = "no such field"


class LayoutError(RuntimeError):
    """A struct or enum differs from the library's; the message names the fields or values."""


@dataclass(frozen=True, slots=True)
class Layout:
    size: int
    fields: dict[str, str]  # name -> "int32 at byte 8"


def check_layouts(description: str, mirror: ModuleType) -> None:
    """Raise LayoutError unless `mirror` has the structs and enums of the library's description."""
    lines = description.splitlines()
    expected = dict(_parse_line(line) for line in lines if not line.startswith("enum "))
    enums = dict(_parse_enum(line) for line in lines if line.startswith("enum "))
    found = {
        name: _layout_of(value)
        for name, value in vars(mirror).items()
        if isinstance(value, type) and issubclass(value, c.Structure | c.Union)
    }
    differences = [*_differences(expected, found), *_enum_differences(enums, mirror.ENUMS)]
    if differences:
        raise LayoutError(f"structs.py differs from the native library: {'; '.join(differences)}")


def _parse_line(line: str) -> tuple[str, Layout]:
    name, size, *fields = line.split()
    parts = (field.split(":") for field in fields)
    return name, Layout(int(size), {field: at.replace("@", " at byte ") for field, at in parts})


def _parse_enum(line: str) -> tuple[str, dict[str, int]]:
    _, name, *values = line.split()
    return name, {key: int(value) for key, _, value in (pair.partition("=") for pair in values)}


def _layout_of(struct: type[c.Structure] | type[c.Union]) -> Layout:
    fields = {
        name: f"{_kind(field)}{8 * c.sizeof(field)} at byte {getattr(struct, name).offset}"
        for name, field, *_ in struct._fields_
    }
    return Layout(c.sizeof(struct), fields)


def _kind(field: type) -> str:
    if issubclass(field, c.c_void_p | c._Pointer):
        return "pointer"
    if issubclass(field, c.Structure | c.Union):
        return "struct"
    minus_one = field(-1).value
    return "float" if isinstance(minus_one, float) else "int" if minus_one < 0 else "uint"


def _differences(expected: Mapping[str, Layout], found: Mapping[str, Layout]) -> Iterator[str]:
    for name in expected.keys() - found.keys():
        yield f"{name} is in the library alone"
    for name in found.keys() - expected.keys():
        yield f"{name} is in structs.py alone"
    for name in expected.keys() & found.keys():
        yield from _field_differences(name, expected[name], found[name])


def _field_differences(struct: str, expected: Layout, found: Layout) -> Iterator[str]:
    for field in {**expected.fields, **found.fields}:
        right, here = expected.fields.get(field, ABSENT), found.fields.get(field, ABSENT)
        if right != here:
            yield f"{struct}.{field}: expected {right}, found {here}"
    if expected.size != found.size:
        yield f"{struct}: expected {expected.size} bytes, found {found.size}"


def _enum_differences(
    expected: Mapping[str, dict[str, int]], found: Mapping[str, dict[str, int]]
) -> Iterator[str]:
    for name in {**expected, **found}:
        right, here = expected.get(name), found.get(name)
        if right != here:
            yield f"enum {name}: expected {right}, found {here}"

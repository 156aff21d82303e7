"""Compares the ctypes structs with the structs that the native library was compiled with.

structs.py mirrors the C structs by hand, and a field in the wrong place corrupts memory
silently. The library therefore describes its structs (src/layout.cpp), one line of text for each:
`LoraSegment 16 sites:pointer64@0 start:int32@8 ...`: bytes, then name, type and offset of fields.
"""

import ctypes as c
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import ModuleType

ABSENT = "no such field"


class LayoutError(RuntimeError):
    """A ctypes struct and the library's struct differ; the message names the fields."""


@dataclass(frozen=True, slots=True)
class Layout:
    size: int
    fields: dict[str, str]  # name -> "int32 at byte 8"


def check_layouts(description: str, mirror: ModuleType) -> None:
    """Raise LayoutError unless the structs of `mirror` are those of the library's description."""
    expected = dict(map(_parse_line, description.splitlines()))
    found = {
        name: _layout_of(value)
        for name, value in vars(mirror).items()
        if isinstance(value, type) and issubclass(value, c.Structure | c.Union)
    }
    differences = list(_differences(expected, found))
    if differences:
        raise LayoutError(f"structs.py differs from the native library: {'; '.join(differences)}")


def _parse_line(line: str) -> tuple[str, Layout]:
    name, size, *fields = line.split()
    parts = (field.split(":") for field in fields)
    return name, Layout(int(size), {field: at.replace("@", " at byte ") for field, at in parts})


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

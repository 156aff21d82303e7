"""Tests that the ctypes structs agree with the C structs, and that wrong ones are refused."""

import ctypes as c
import re
import shutil
from pathlib import Path
from types import ModuleType

import pytest

from engine.backends.native import build, library, structs
from engine.backends.native.build import BuildError, compile_library
from engine.backends.native.layout import LayoutError, check_layouts

NOT_MIRRORED = {"ReefContext"}  # opaque: Python holds only a pointer to it


@pytest.fixture
def description() -> str:
    try:
        return library._load().reef_struct_layouts().decode()
    except BuildError as error:
        pytest.skip(str(error))


def test_all_structs_agree_with_the_library(description: str) -> None:
    check_layouts(description, structs)


def test_every_struct_of_the_sources_is_described(description: str) -> None:
    declared: set[str] = set()
    for path in build.SOURCES.iterdir():
        declared |= set(re.findall(r"^(?:struct|union) (Reef\w+) \{", path.read_text(), re.M))
    assert {line.split()[0] for line in _of_structs(description)} == declared - NOT_MIRRORED


def test_every_enum_of_the_sources_is_described_with_all_values(description: str) -> None:
    declared = {
        name: len(re.findall(r"^ *REEF_\w+|(?<=, )REEF_\w+|(?<=^ )REEF_\w+", body, re.M))
        for path in build.SOURCES.iterdir()
        for name, body in re.findall(r"enum Reef(\w+) : int32_t \{([^}]*)\}", path.read_text())
    }
    lines = [line for line in description.splitlines() if line.startswith("enum ")]
    assert {line.split()[1]: len(line.split()) - 2 for line in lines} == declared


def test_a_wrong_enum_value_is_named(description: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(structs.ENUMS, "KvFormat", {"BF16": 1, "INT8": 0})
    with pytest.raises(LayoutError, match=r"enum KvFormat: expected \{'BF16': 0, 'INT8': 1\}"):
        check_layouts(description, structs)


def test_swapped_fields_are_named(description: str) -> None:
    fields = list(structs.ReefLoraSlice._fields_)
    fields[0], fields[1] = fields[1], fields[0]
    with pytest.raises(LayoutError) as raised:
        check_layouts(description, _changed(structs.ReefLoraSlice, fields))
    assert "ReefLoraSlice.r0: expected int32 at byte 0, found int32 at byte 4" in str(raised.value)
    assert "ReefLoraSlice.r1: expected int32 at byte 4, found int32 at byte 0" in str(raised.value)
    assert "ReefLoraSite" not in str(raised.value), "the others are in order"


def test_a_missing_field_is_named(description: str) -> None:
    fields = [field for field in structs.ReefAttentionArgs._fields_ if field[0] != "soft_cap"]
    with pytest.raises(LayoutError) as raised:
        check_layouts(description, _changed(structs.ReefAttentionArgs, fields))
    message = str(raised.value)
    assert (
        "ReefAttentionArgs.soft_cap: expected float32 at byte 108, found no such field" in message
    )


def test_a_field_that_the_library_lacks_is_named(description: str) -> None:
    fields = [*structs.ReefLoraArgs._fields_, ("late", c.c_int32)]  # fits the padding at the end
    with pytest.raises(
        LayoutError, match=r"ReefLoraArgs\.late: expected no such field, found int32"
    ):
        check_layouts(description, _changed(structs.ReefLoraArgs, fields))


def test_a_wrong_size_is_reported(description: str) -> None:
    fields = [*structs.ReefKvLayer._fields_, ("more", c.c_int64)]
    with pytest.raises(LayoutError, match="ReefKvLayer: expected 32 bytes, found 40"):
        check_layouts(description, _changed(structs.ReefKvLayer, fields))


def test_a_wrong_type_of_the_right_size_is_named(description: str) -> None:
    types = dict(structs.ReefEmbedArgs._fields_) | {"scale": c.c_int32}
    with pytest.raises(LayoutError) as raised:
        check_layouts(description, _changed(structs.ReefEmbedArgs, list(types.items())))
    message = str(raised.value)
    assert "ReefEmbedArgs.scale: expected float32 at byte 32, found int32 at byte 32" in message


def test_a_struct_on_one_side_alone_is_named(description: str) -> None:
    without = "".join(
        line for line in description.splitlines(keepends=True) if not line.startswith("ReefStep ")
    )
    with pytest.raises(LayoutError, match=r"ReefStep is in structs\.py alone"):
        check_layouts(without, structs)
    with pytest.raises(LayoutError, match="Extra is in the library alone"):
        check_layouts(description + "Extra 4 rows:int32@0\n", structs)


def test_loading_the_library_checks_its_structs(
    description: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fields = list(structs.ReefDraw._fields_)[:-1]
    monkeypatch.setattr(library, "structs", _changed(structs.ReefDraw, fields))
    with pytest.raises(LayoutError, match=r"ReefDraw\.min_p"):
        library._load.__wrapped__()


def test_a_field_missing_from_the_description_does_not_compile(
    tmp_path: Path, description: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = tmp_path / "src"
    shutil.copytree(build.SOURCES, sources)
    for path in sources.glob("*.cpp"):
        if path.name != "layout.cpp":
            path.unlink()
    monkeypatch.setattr(build, "SOURCES", sources)
    compile_library(tmp_path / "lib")
    header = sources / "kernels.h"
    declaration = "struct ReefGatherArgs {"
    header.write_text(header.read_text().replace(declaration, f"{declaration} int32_t late;"))
    with pytest.raises(BuildError, match="GatherArgs"):
        compile_library(tmp_path / "lib")


def _of_structs(description: str) -> list[str]:
    return [line for line in description.splitlines() if not line.startswith("enum ")]


def _changed(struct: type[c.Structure], fields: list[tuple[str, type]]) -> ModuleType:
    """Return structs.py with other fields in one struct."""
    mirror = ModuleType("structs")
    vars(mirror).update(vars(structs))
    name = struct.__name__
    vars(mirror)[name] = type(name, (c.Structure,), {"_fields_": fields})
    return mirror

"""Write the grammar of arguments that stand one behind the other, without types or escapes.

A text stands there as it is, up to the mark behind it; all else is JSON. Of the texts of a
parameter that may also be something else, those are left out that would be read as that.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from deployments.ingress.structured.json_parts import JsonParts, with_definitions
from deployments.ingress.structured.lark import SPACE, Lark, any_of, quoted
from deployments.ingress.structured.schema import SchemaRefused
from deployments.ingress.structured.shapes import Shape, properties_of, shapes_of, string_terms
from deployments.text.tools.pattern import Slot, Space, parts_of
from deployments.text.tools.typed_values import ArgumentTypes, typed_value

# Texts that are read as another type
_READ_AS: Mapping[str, str] = {
    "null": r"/\s*(?i:none|null)\s*/",
    "boolean": r"/\s*(?i:true|false)\s*/",
    "integer": r"/\s*-?[0-9](?s:.*)/",
    "number": r"/\s*-?[0-9](?s:.*)/",
    "object": r"/\s*\{(?s:.*)/",
    "array": r"/\s*\[(?s:.*)/",
}


@dataclass(frozen=True, slots=True)
class _Frame:
    """What stands around the value of one parameter. `ends` are what the value cannot contain."""

    before: str  # an expression
    inside: str  # next to the value, on both sides
    after: str
    mark: str


def parameters(
    lark: Lark, json_parts: JsonParts, pattern: str, schema: Mapping[str, Any], path: str
) -> str:
    """Write the parameters of one tool, in the schema's order. Raises SchemaRefused."""
    properties, required = properties_of(schema)
    types = ArgumentTypes(schema)
    parts: list[str] = []
    for name, each in properties.items():
        place = f"/properties/{name}"
        parameter = _Parameter(lark, json_parts, pattern, name, types.of(name))
        body = lark.rule(f"{any_of(list(parameter.forms(each, schema, place, path)))} {SPACE}")
        parts.append(body if name in required else f"{body}?")
    return " ".join(parts)


class _Parameter:
    def __init__(
        self, lark: Lark, json_parts: JsonParts, pattern: str, name: str, types: frozenset[str]
    ) -> None:
        self._lark = lark
        self._json_parts = json_parts
        self._pattern = pattern
        self._name = name
        self._types = types
        self._says_string = "{is_string}" in pattern

    def forms(
        self, schema: object, root: Mapping[str, Any], place: str, path: str
    ) -> Iterator[str]:
        """List the ways in which the parameter may be written."""
        if "string" not in self._types:
            part = with_definitions(schema, root)
            yield self._of_json(self._json_parts.add(part, path + place))
            return
        num_forms = 0
        for shape in shapes_of(schema, root, place):
            for form in self._of_shape(shape, root, path):
                num_forms += 1
                yield form
        if not num_forms:
            raise SchemaRefused(f"no value at {place} can be written in this model's calls")

    def _of_shape(self, shape: Shape, root: Mapping[str, Any], path: str) -> Iterator[str]:
        if shape.values is not None:
            for value in shape.values:
                yield from self._of_value(value)
        elif shape.type in ("string", "any"):
            self._json_parts.leave_out("format", shape.schema, path + shape.place)
            yield self._of_text(shape)
        else:
            part = with_definitions(shape.schema, root)
            yield self._of_json(self._json_parts.add_tight(part, path + shape.place))

    def _of_text(self, shape: Shape) -> str:
        frame = self._frame(is_string=True)
        terms = string_terms(shape)
        if not self._says_string and shape.type == "string":
            others = sorted(self._types - {"string"})
            terms += [f"~{_READ_AS[kind]}" for kind in others]
        allowed = " & ".join(terms)
        inside = frame.inside
        until = self._lark.until(allowed, frame.mark, before=inside, after=inside)
        return f"{frame.before} {until} {frame.after}".strip()

    def _of_json(self, reference: str) -> str:
        frame = self._frame(is_string=False)
        inside = quoted(frame.inside) if frame.inside else ""
        end = self._lark.marks(frame.mark)
        return " ".join((frame.before, inside, reference, inside, end, frame.after)).strip()

    def _of_value(self, value: object) -> Iterator[str]:
        """Write one value, if it is read back as that."""
        is_string = isinstance(value, str)
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        frame = self._frame(is_string)
        said = is_string if self._says_string else None
        read = json.loads(typed_value(text, self._types, said))
        if read == value and type(read) is type(value) and frame.mark not in text:
            written = quoted(f"{frame.inside}{text}{frame.inside}")
            end = self._lark.marks(frame.mark)
            yield " ".join((frame.before, written, end, frame.after)).strip()

    def _frame(self, is_string: bool) -> _Frame:
        """Fill everything but the value into the format's pattern."""
        known = {"key": self._name, "is_string": "true" if is_string else "false"}
        texts, spaced, mark, inside = ["", ""], "", "", ""
        at = 0
        for part in parts_of(self._pattern):
            if isinstance(part, Slot) and part.name == "value":
                at, mark, inside = 1, part.ends_with, "\n" if part.in_lines else ""
            elif isinstance(part, Slot):
                self._check_key(part)
                texts[at] += known[part.name]
            elif isinstance(part, Space):
                spaced, texts[0] = f"{self._lark.marks(texts[0])} {SPACE} ", ""
            else:
                texts[at] += part.text
        before = spaced + self._lark.marks(texts[0])
        return _Frame(before, inside, self._lark.marks(texts[1].removeprefix(mark)), mark)

    def _check_key(self, slot: Slot) -> None:
        if slot.name == "key" and slot.ends_with in self._name:
            raise SchemaRefused(f"the name {self._name!r} cannot be written in this model's calls")

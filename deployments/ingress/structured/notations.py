"""Write the grammar of arguments in two notations that are almost JSON.

Python's: `name="text", n=3`. Bare JSON: `name:<|"|>text<|"|>,n:3`, keys without quotes, and texts
between marks, without escapes. Objects have the properties that the schema names, or, if it names
none, any.
"""

import json
import keyword
import re
from collections.abc import Mapping, Sequence
from typing import Any

from deployments.ingress.structured.json_parts import JsonParts
from deployments.ingress.structured.lark import Lark, any_of, quoted
from deployments.ingress.structured.schema import SchemaRefused
from deployments.ingress.structured.shapes import Shape, properties_of, shapes_of, string_terms

QUOTE = '<|"|>'
MAX_PAIRS = 64  # of an object whose properties are not named
_BARE_KEY = re.compile(r"[^\s:,{}\[\]<]{1,256}")
_PLAIN_CHARACTER = r'[^"\\\x00-\x1f\x7f]'
_NUMBER = r"/-?(0|[1-9][0-9]{0,15})(\.[0-9]{1,15})?/"  # of a size that every reader takes
_ANY = ("string", "number", "boolean", "null", "array", "object")


class Notation:
    """How values are written, but for texts and names: the two notations have their own."""

    between = ","  # values

    def __init__(self, lark: Lark, parts: JsonParts, root: Mapping[str, Any], path: str) -> None:
        self._lark = lark
        self._parts = parts
        self._root = root
        self._path = path
        self._reserved: dict[int, str] = {}  # rules of objects and lists, by their schemas

    # ---- what is different -----------------------------------------------------------------

    def string(self, shape: Shape) -> str:
        raise NotImplementedError

    def value(self, value: object) -> str:
        """Write one value."""
        raise NotImplementedError

    def name(self, name: str) -> str:
        """Write the name of a property, and what stands behind it."""
        raise NotImplementedError

    def any_name(self) -> str:
        raise NotImplementedError

    # ---- what is the same ------------------------------------------------------------------

    def of(self, schema: object, place: str) -> str:
        """Refer to a rule for values of a schema. Raises SchemaRefused."""
        key = id(schema)
        if key in self._reserved:
            return self._reserved[key]
        name = self._reserved[key] = self._lark.reserve()
        shapes = shapes_of(schema, self._root, place)
        if not shapes:
            raise SchemaRefused(f"nothing is allowed at {place}")
        self._lark.define(name, any_of([e for shape in shapes for e in self._of_shape(shape)]))
        return name

    def _of_shape(self, shape: Shape) -> list[str]:
        if shape.values is not None:
            return [self.value(value) for value in shape.values]
        match shape.type:
            case "string":
                self._parts.leave_out("format", shape.schema, self._path + shape.place)
                return [self.string(shape)]
            case "array":
                return [self._array(shape)]
            case "object":
                return [f'"{{" {self.pairs(shape.schema, shape.place)} "}}"']
            case "any":
                kinds = (Shape(kind, {"type": kind}, shape.place) for kind in _ANY)
                return [form for kind in kinds for form in self._of_shape(kind)]
            case "number" if len(shape.schema) == 1:
                return [_NUMBER]
            case _:
                return [self._parts.add_tight(shape.schema, self._path + shape.place)]

    def _array(self, shape: Shape) -> str:
        items = self.of(shape.schema.get("items", True), f"{shape.place}/items")
        least, most = int(shape.schema.get("minItems", 0)), shape.schema.get("maxItems")
        if most == 0:
            return '"[]"'
        rest = "" if most is None else int(most) - 1
        between = quoted(self.between)
        filled = f'"[" {items} ({between} {items}){{{max(0, least - 1)},{rest}}} "]"'
        return filled if least else f'("[]" | {filled})'

    def pairs(self, schema: Mapping[str, Any], place: str) -> str:
        """Write the properties of an object, or its arguments, in the schema's order."""
        properties, required = properties_of(schema, place)
        if not properties:
            return self._any_pairs(schema.get("additionalProperties", True), place)
        forms = [
            (f"{self.name(name)} {self.of(each, f'{place}/properties/{name}')}", name in required)
            for name, each in properties.items()
        ]
        return self._in_order(forms)

    def _in_order(self, forms: Sequence[tuple[str, bool]]) -> str:
        between = quoted(self.between)
        rest, firsts = "", list[str]()
        tails = [""]
        for form, is_required in reversed(forms):
            more = f"({between} {form}){'' if is_required else '?'} {rest}".strip()
            rest = self._lark.rule(more)
            tails.append(rest)
        for at, (form, is_required) in enumerate(forms):
            firsts.append(f"{form} {tails[len(forms) - at - 1]}".strip())
            if is_required:
                return any_of(firsts)
        return f"({' | '.join(firsts)})?"

    def _any_pairs(self, others: object, place: str) -> str:
        if others is False:
            return ""
        pair = f"{self.any_name()} {self.of(others, f'{place}/additionalProperties')}"
        return f"({pair} ({quoted(self.between)} {pair}){{0,{MAX_PAIRS - 1}}})?"


class BareJson(Notation):
    def string(self, shape: Shape) -> str:
        text = self._lark.until(" & ".join(string_terms(shape)), QUOTE)
        return f"{self._lark.marks(QUOTE)} {text}"

    def value(self, value: object) -> str:
        return self._lark.marks(self._written(value))

    def _written(self, value: object) -> str:
        if isinstance(value, str):
            if QUOTE in value:
                raise SchemaRefused(f"the text {value!r} cannot be written in this model's calls")
            return f"{QUOTE}{value}{QUOTE}"
        if isinstance(value, list):
            return f"[{','.join(map(self._written, value))}]"  # pyright: ignore
        if isinstance(value, dict):
            pairs = (f"{self._key(k)}:{self._written(v)}" for k, v in value.items())  # pyright: ignore
            return f"{{{','.join(pairs)}}}"
        return json.dumps(value)

    def name(self, name: str) -> str:
        return self._lark.marks(f"{self._key(name)}:")

    def _key(self, name: str) -> str:
        return name if _BARE_KEY.fullmatch(name) else self._written(name)

    def any_name(self) -> str:
        return r"/[a-zA-Z_][a-zA-Z0-9_]{0,63}:/"


class Python(Notation):
    """The names of arguments are Python's own; those of objects inside are texts."""

    between = ", "

    def arguments(self, schema: Mapping[str, Any]) -> str:
        for name in schema.get("properties", {}):
            if not name.isidentifier() or keyword.iskeyword(name) or name == "f":
                raise SchemaRefused(f"{name!r} cannot be the name of an argument in Python")
        return _Arguments(self._lark, self._parts, self._root, self._path).pairs(schema, "")

    def string(self, shape: Shape) -> str:
        least, most = shape.schema.get("minLength", 0), shape.schema.get("maxLength", "")
        if "pattern" in shape.schema:
            terms = " & ".join((*string_terms(shape), f"/{_PLAIN_CHARACTER}*/"))
            return self._lark.terminal(rf'"\"" ({terms}) "\""')
        times = f"{{{least:.0f},{most if most == '' else int(most)}}}"
        character = rf'(?:{_PLAIN_CHARACTER}|\\["\\nrt])'
        return self._lark.terminal(rf'"\"" /{character}{times}/ "\""')

    def value(self, value: object) -> str:
        return quoted(json.dumps(value, ensure_ascii=False))

    def name(self, name: str) -> str:
        return quoted(f"{quoted(name)}: ")

    def any_name(self) -> str:
        return r'/"[a-zA-Z_][a-zA-Z0-9_]{0,63}": /'


class _Arguments(Python):
    def of(self, schema: object, place: str) -> str:
        return Python(self._lark, self._parts, self._root, self._path).of(schema, place)

    def name(self, name: str) -> str:
        return quoted(f"{name}=")

    def any_name(self) -> str:
        return r"/[a-zA-Z_][a-zA-Z0-9_]{0,63}=/"

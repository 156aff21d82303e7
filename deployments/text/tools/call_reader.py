"""CallReader: read calls in one format, from where they begin to where they end."""

from collections.abc import Generator, Mapping, Sequence
from typing import Any

from deployments.text.tools.bodies import (
    ID_PATTERN,
    NAME_PATTERN,
    as_object,
    read_arguments,
    read_bare_json,
    read_calls,
    read_keyed_calls,
    read_python,
)
from deployments.text.tools.call import NotACall, ToolCall
from deployments.text.tools.formats import ToolFormat
from deployments.text.tools.pattern import Literal, Part, Slot, Space, parts_of
from deployments.text.tools.scanner import Reading, Scanner
from deployments.text.tools.typed_values import ArgumentTypes, typed_value

MAX_KEY = 256  # characters of a parameter's name

Schemas = Mapping[str, Mapping[str, Any]]


class CallReader:
    """`schemas` are those of the arguments of the request's tools, by the tools' names."""

    def __init__(self, form: ToolFormat, schemas: Schemas) -> None:
        self._form = form
        self._schemas = schemas
        self._parts = parts_of(form.call)
        last_slot = max(at for at, part in enumerate(self._parts) if isinstance(part, Slot))
        # Brackets end by themselves: what closes a call behind them may be missing at the end.
        has_own_end = "{parameters}" not in form.call
        self._first_needless = last_slot + (1 if has_own_end else 2)
        self.opening = form.opening

    def read(self, scanner: Scanner) -> Generator[ToolCall | None]:
        """Read one call, or a section of them. Yields None where the text ends for now.

        Raises NotACall.
        """
        if self._form.section is None:
            yield from (yield from self._call(scanner))
            return
        yield from scanner.literal(self._form.section[0])
        yield from self._section(scanner, self._form.section[1])

    def _section(self, scanner: Scanner, closing: str) -> Generator[ToolCall | None]:
        num_calls = 0
        while True:
            yield from scanner.space()
            is_end = yield from scanner.starts_with(closing)
            if num_calls and (is_end or (scanner.is_whole and closing.startswith(scanner.rest))):
                break
            yield from (yield from self._call(scanner))
            num_calls += 1
        yield from scanner.literal(closing, may_end=True)

    def _call(self, scanner: Scanner) -> Reading[Sequence[ToolCall]]:
        found: dict[str, Any] = {}
        for at, part in enumerate(self._parts):
            if isinstance(part, Slot):
                found[part.name] = yield from self._slot(part, scanner, found)
            else:
                yield from _plain(part, scanner, may_end=at >= self._first_needless)
        for slot in ("calls", "keyed", "python"):
            if slot in found:
                return self._known(found[slot])
        arguments = found.get("arguments") or found.get("parameters") or found["bare_json"]
        return [ToolCall(found["name"], arguments)]

    def _known(self, calls: Sequence[ToolCall]) -> Sequence[ToolCall]:
        """Take JSON that nothing marks as a call for one only if there are such tools."""
        if not self.opening and not all(call.name in self._schemas for call in calls):
            raise NotACall
        return calls

    def _slot(self, slot: Slot, scanner: Scanner, found: Mapping[str, Any]) -> Reading[Any]:
        match slot.name:
            case "name":
                return (yield from scanner.match(NAME_PATTERN))
            case "id":
                return (yield from scanner.match(ID_PATTERN))
            case "arguments":
                return (yield from read_arguments(scanner))
            case "calls":
                return (yield from read_calls(scanner, self._form.keys))
            case "keyed":
                return (yield from read_keyed_calls(scanner))
            case "bare_json":
                return (yield from read_bare_json(scanner))
            case "python":
                return (yield from read_python(scanner))
            case "parameters":
                return (yield from self._parameters(slot, scanner, found["name"]))
            case _:
                raise AssertionError(f"no slot is called {slot.name}")

    # ---- parameters ----------------------------------------------------------------------

    def _parameters(self, slot: Slot, scanner: Scanner, name: str) -> Reading[str]:
        """Read parameters up to what ends the call, as a JSON object."""
        types = ArgumentTypes(self._schemas.get(name))
        fields: dict[str, str] = {}
        while True:
            yield from scanner.space()
            if (yield from scanner.starts_with(slot.ends_with)):
                return as_object(fields)
            key, text, is_string = yield from self._parameter(scanner, types)
            if key in fields:
                raise NotACall
            fields[key] = typed_value(text, types.of(key), is_string)

    def _parameter(
        self, scanner: Scanner, types: ArgumentTypes
    ) -> Reading[tuple[str, str, bool | None]]:
        found: dict[str, str] = {}
        is_read = False  # what follows a slot is read with it
        for part in parts_of(self._form.parameter):
            if isinstance(part, Slot):
                yield from _parameter_slot(part, scanner, found, types)
            elif not (is_read and isinstance(part, Literal)):
                yield from _plain(part, scanner)
            is_read = isinstance(part, Slot)
        said = found.get("is_string")
        if said not in (None, "true", "false"):
            raise NotACall
        return found["key"], found["value"], None if said is None else said == "true"


def _plain(part: Part, scanner: Scanner, may_end: bool = False) -> Reading[None]:
    if isinstance(part, Space):
        yield from scanner.space()
    elif isinstance(part, Literal):
        yield from scanner.literal(part.text, may_end)


def _parameter_slot(
    slot: Slot, scanner: Scanner, found: dict[str, str], types: ArgumentTypes
) -> Reading[None]:
    """Read a part of a parameter and the literal behind it. A second `{key}` repeats the first."""
    if slot.name == "value" and found.get("is_string") != "true" and types.are_nested(found["key"]):
        text, _ = yield from scanner.value_before((slot.ends_with,))
        yield from scanner.literal(slot.ends_with)
    else:
        text = yield from scanner.until(slot.ends_with)
    if slot.in_lines:
        text = text.removeprefix("\n").removesuffix("\n")
    is_other = found.get(slot.name, text) != text
    if is_other or (slot.name == "key" and not 1 <= len(text) <= MAX_KEY):
        raise NotACall
    found[slot.name] = text

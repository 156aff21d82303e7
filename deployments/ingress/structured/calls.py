"""Write the grammar of an answer that must be calls, in the format that the model writes them in.

Something else may be allowed in their stead. A model that reasons may do so first. White space is
free where the format's reader takes any.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from deployments.ingress.structured.json_parts import JsonParts
from deployments.ingress.structured.lark import SPACE, Lark, any_of, quoted
from deployments.ingress.structured.notations import BareJson, Python
from deployments.ingress.structured.parameters import parameters
from deployments.ingress.structured.schema import Preparation, SchemaRefused
from deployments.ingress.structured.thought import NO_THOUGHT, Thought
from deployments.text.tools.formats import ToolFormat
from deployments.text.tools.pattern import Literal, Slot, Space, parts_of

MAX_CALLS = 128  # as many as a message may bring back

_ID = "/[A-Za-z0-9]{1,32}/"
_SHORT_ID = "/[A-Za-z0-9]{9}/"


@dataclass(frozen=True, slots=True)
class CallableTool:
    """`path` is the place of the schema in the request."""

    name: str
    schema: Mapping[str, Any]
    path: str


@dataclass(frozen=True, slots=True)
class ForcedCalls:
    """One of these tools must be called."""

    form: ToolFormat
    tools: Sequence[CallableTool]
    one_call: bool
    thought: Thought = NO_THOUGHT


class CallsRefused(ValueError):
    """A tool's schema cannot be enforced; `path` is its place, the message says why."""

    def __init__(self, path: str, message: str) -> None:
        super().__init__(message)
        self.path = path


def calls_document(
    wanted: ForcedCalls, is_lenient: bool, otherwise: str = ""
) -> tuple[dict[str, Any], list[str]]:
    """Return llguidance's document, and what is not enforced. Raises CallsRefused.

    `otherwise`: the grammar that an answer without calls must match, if there may be one.
    """
    writer = _Writer(wanted, is_lenient)
    start = writer.start(otherwise)
    grammars = [{"lark_grammar": writer.lark.text(start)}, *writer.parts.documents]
    return {"grammars": grammars}, writer.not_enforced + writer.parts.not_enforced


@dataclass(slots=True)
class _Writer:
    wanted: ForcedCalls
    is_lenient: bool
    lark: Lark = field(init=False)
    parts: JsonParts = field(init=False)
    not_enforced: list[str] = field(default_factory=list[str])

    def __post_init__(self) -> None:
        self.lark = Lark(self.wanted.thought.mark_ids)
        self.parts = JsonParts(self.is_lenient)

    def start(self, otherwise: str) -> str:
        thought, form = self.wanted.thought, self.wanted.form
        tools = [(tool, self._prepared(tool)) for tool in self.wanted.tools]
        answers = [self._channels(tools) if form.has_channels else self._section(tools)]
        if otherwise:
            answers.append(thought.answer(self.lark, otherwise))
        return f"{thought.before(self.lark)} {any_of(answers)}"

    def _section(self, tools: Sequence[tuple[CallableTool, dict[str, Any]]]) -> str:
        calls = self._calls(tools)
        if self.wanted.form.section is None:
            return calls
        opening, closing = map(self.lark.marks, self.wanted.form.section)
        return f"{SPACE} {opening} {calls} {SPACE} {closing}"

    def _prepared(self, tool: CallableTool) -> dict[str, Any]:
        preparation = Preparation(self.is_lenient)
        try:
            prepared = preparation.prepare(tool.schema)
        except SchemaRefused as error:
            raise CallsRefused(tool.path, str(error)) from None
        self.not_enforced += (f"{tool.path}: {each}" for each in preparation.not_enforced)
        assert isinstance(prepared, dict), "it was checked to be the schema of an object"
        return {**prepared, "type": "object"}

    # ---- calls between marks ---------------------------------------------------------------

    def _calls(self, tools: Sequence[tuple[CallableTool, dict[str, Any]]]) -> str:
        """Write one call or several, each behind white space."""
        form = self.wanted.form
        if form.in_list or "{python}" in form.call:
            return f"{SPACE} {self._around(self._list(tools))}"
        call = self.lark.rule(any_of([self._call(tool, schema) for tool, schema in tools]))
        return self._several(f"{SPACE} {call}")

    def _several(self, call: str) -> str:
        return call if self.wanted.one_call else f"({call}){{1,{MAX_CALLS}}}"

    def _around(self, body: str) -> str:
        """Write what is the same around the only slot of a format."""
        return " ".join(
            body if isinstance(part, Slot) else self._plain(part)
            for part in parts_of(self.wanted.form.call)
        )

    def _plain(self, part: Literal | Space) -> str:
        return SPACE if isinstance(part, Space) else self.lark.marks(part.text)

    def _list(self, tools: Sequence[tuple[CallableTool, dict[str, Any]]]) -> str:
        each = self.lark.rule(any_of([self._element(tool, schema) for tool, schema in tools]))
        more = "" if self.wanted.one_call else f'({SPACE} "," {SPACE} {each}){{0,{MAX_CALLS - 1}}}'
        return f'"[" {SPACE} {each} {more} {SPACE} "]"'

    def _element(self, tool: CallableTool, schema: dict[str, Any]) -> str:
        if "{python}" in self.wanted.form.call:
            python = Python(self.lark, self.parts, schema, tool.path)
            arguments = _refused_at(tool.path, lambda: python.arguments(schema))
            return f'{quoted(f"{tool.name}(")} {arguments} ")"'
        return self._json_call(tool, schema)

    def _json_call(self, tool: CallableTool, schema: dict[str, Any]) -> str:
        form = self.wanted.form
        arguments = self.parts.add(schema, tool.path)
        if "{keyed}" in form.call:
            members = [(tool.name, arguments)]
        else:
            members = [(form.keys[0], quoted(quoted(tool.name))), (form.keys[1], arguments)]
        if form.id_key == "id":
            members.append(("id", rf'"\"" {_SHORT_ID} "\""'))
        elif form.id_key:
            members.insert(0, (form.id_key, r'/"[0-9]{1,3}"/'))
        written = (f"{quoted(quoted(k) + ':')} {SPACE} {value}" for k, value in members)
        between = f' {SPACE} "," {SPACE} '
        return f'"{{" {SPACE} {between.join(written)} {SPACE} "}}"'

    def _call(self, tool: CallableTool, schema: dict[str, Any]) -> str:
        return self.lark.rule(" ".join(self._call_parts(tool, schema)))

    def _call_parts(self, tool: CallableTool, schema: dict[str, Any]) -> Iterator[str]:
        """Write one call; its name is part of the text around it."""
        text = ""
        for part in parts_of(self.wanted.form.call):
            if isinstance(part, Literal):
                text += part.text
                continue
            if isinstance(part, Slot) and part.name == "name":
                text += tool.name
                continue
            if text:
                yield self.lark.marks(text)
                text = ""
            yield SPACE if isinstance(part, Space) else self._slot(part.name, tool, schema)
        if text:
            yield self.lark.marks(text)

    def _slot(self, name: str, tool: CallableTool, schema: dict[str, Any]) -> str:
        match name:
            case "id":
                return _ID
            case "arguments":
                return self.parts.add(schema, tool.path)
            case "calls" | "keyed":
                return self._json_call(tool, schema)
            case "bare_json":
                bare = BareJson(self.lark, self.parts, schema, tool.path)
                pairs = _refused_at(tool.path, lambda: bare.pairs(schema, ""))
                return f'"{{" {pairs} "}}"'
            case _:
                pattern = self.wanted.form.parameter
                return _refused_at(
                    tool.path,
                    lambda: parameters(self.lark, self.parts, pattern, schema, tool.path),
                )

    # ---- channels --------------------------------------------------------------------------

    def _channels(self, tools: Sequence[tuple[CallableTool, dict[str, Any]]]) -> str:
        """Write one call: a second one would follow the mark that ends an answer."""
        return any_of([self._channel_call(tool, schema) for tool, schema in tools])

    def _channel_call(self, tool: CallableTool, schema: dict[str, Any]) -> str:
        to, json_text = f" to=functions.{tool.name}", self.parts.add(schema, tool.path)
        headers = (
            f"{to}<|channel|>commentary json<|message|>",
            f"<|channel|>commentary{to} <|constrain|>json<|message|>",
        )
        return f"{any_of([self.lark.marks(header) for header in headers])} {json_text}"


def _refused_at(path: str, write: Callable[[], str]) -> str:
    try:
        return write()
    except SchemaRefused as error:
        raise CallsRefused(path, str(error)) from None

"""Parse the tools of a chat request, and which of them the model may or must call."""

# Fields are JSON of any shape until they are checked here.
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportUnknownMemberType=false

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import msgspec
from pydantic import BeforeValidator, SkipValidation

from deployments.ingress.api.json_schema import find_fault
from deployments.ingress.api.objects import read_object, wrong
from deployments.ingress.api.openai_fields import is_empty, short
from deployments.ingress.http_errors import invalid
from deployments.text.tools.call import NAME, is_name

MAX_TOOLS = 128
MAX_TOOL_BYTES = 256 * 1024  # of all tools, as JSON

_TOOL_FIELDS = ("type", "function", "cache_control")
_FUNCTION_FIELDS = ("name", "description", "parameters", "strict")
_MODES = {"none": "none", "auto": "auto", "required": "required", "any": "required"}
_NO_PARAMETERS: Mapping[str, Any] = {"type": "object", "properties": {}}


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that the model may call. `schema` is that of its arguments, `path` its place."""

    name: str
    description: str | None
    schema: Mapping[str, Any]
    path: str

    def document(self) -> dict[str, Any]:
        """Write the tool for chat templates."""
        described = {} if self.description is None else {"description": self.description}
        function = {"name": self.name, **described, "parameters": self.schema}
        return {"type": "function", "function": function}


@dataclass(frozen=True, slots=True)
class ToolChoice:
    """`mode` is none, auto or required; with `names` these tools alone may be called."""

    mode: str
    names: Sequence[str] = ()
    is_named: bool = False  # it names the one tool that must be called

    @property
    def is_forced(self) -> bool:
        return self.mode == "required"


# ---- tools ---------------------------------------------------------------------------------


def _read_tools(value: object) -> list[Tool] | None:
    """Read the list of tools. Raises ApiError with the place of the first fault."""
    if value is None or value == []:
        return None
    if not isinstance(value, list):
        raise invalid(f"tools: must be a list, not {short(value)}.", "tools")
    if len(value) > MAX_TOOLS:
        raise invalid(f"tools: must have at most {MAX_TOOLS} tools, not {len(value)}.", "tools")
    num_bytes = len(msgspec.json.encode(value))
    if num_bytes > MAX_TOOL_BYTES:
        message = f"tools: must have at most {MAX_TOOL_BYTES} bytes as JSON, not {num_bytes}."
        raise invalid(message, "tools")
    tools = [_read_tool(each, f"tools[{at}]") for at, each in enumerate(value)]
    names = [tool.name for tool in tools]
    for at, name in enumerate(names):
        if name in names[:at]:
            raise wrong(f"tools[{at}].function.name", f"{name!r} is the name of two tools")
    return tools


def _read_tool(value: object, path: str) -> Tool:
    fields = read_object(value, path, _TOOL_FIELDS)
    if fields.get("type", "function") != "function":
        raise wrong(f"{path}.type", f"only 'function' is supported, not {short(fields['type'])}")
    path = f"{path}.function"
    function = read_object(fields.get("function"), path, _FUNCTION_FIELDS)
    name, description = function.get("name"), function.get("description")
    if not is_name(name):
        raise wrong(f"{path}.name", f"must match ^{NAME}$, not be {short(name)}")
    if not isinstance(description, str | None):
        raise wrong(f"{path}.description", f"must be text, not {short(description)}")
    if not isinstance(strict := function.get("strict"), bool | None):
        raise wrong(f"{path}.strict", f"must be true or false, not {short(strict)}")
    path = f"{path}.parameters"
    return Tool(str(name), description, _schema(function.get("parameters"), path), path)


def _schema(value: object, path: str) -> Mapping[str, Any]:
    if value is None or value == {}:
        return _NO_PARAMETERS
    fault = find_fault(value)
    if fault is not None:
        raise wrong(path + fault[0], fault[1])
    if not isinstance(value, dict) or value.get("type", "object") != "object":
        raise wrong(path, "must be the schema of an object")
    return value


# ---- which of them -------------------------------------------------------------------------


def _read_choice(value: object) -> ToolChoice | None:
    if value is None:
        return None
    if isinstance(value, str) and value in _MODES:
        return ToolChoice(_MODES[value])
    kind = value.get("type") if isinstance(value, dict) else None
    if kind == "function":
        fields = read_object(value, "tool_choice", ("type", "function"))
        name = _chosen_name(fields, "tool_choice")
        return ToolChoice("required", (name,), is_named=True)
    if kind == "allowed_tools":
        return _read_allowed(read_object(value, "tool_choice", ("type", "allowed_tools")))
    wanted = "'none', 'auto', 'required' or an object of the type 'function' or 'allowed_tools'"
    raise wrong("tool_choice", f"must be {wanted}, not {short(value)}")


def _read_allowed(choice: dict[str, Any]) -> ToolChoice:
    """Read which tools may be called, of those that the model is told about."""
    path = "tool_choice.allowed_tools"
    fields = read_object(choice.get("allowed_tools"), path, ("mode", "tools"))
    mode, tools = fields.get("mode", "auto"), fields.get("tools")
    if mode not in ("auto", "required"):
        raise wrong(f"{path}.mode", f"must be 'auto' or 'required', not {short(mode)}")
    if not isinstance(tools, list) or not 1 <= len(tools) <= MAX_TOOLS:
        raise wrong(f"{path}.tools", f"must be a list of 1 to {MAX_TOOLS} tools")
    names: list[str] = []
    for at, tool in enumerate(tools):
        place = f"{path}.tools[{at}]"
        names.append(_chosen_name(read_object(tool, place, ("type", "function")), place))
    return ToolChoice(mode, tuple(names))


def _chosen_name(fields: dict[str, Any], path: str) -> str:
    if fields.get("type", "function") != "function":
        raise wrong(f"{path}.type", f"only 'function' is supported, not {short(fields['type'])}")
    path = f"{path}.function"
    name = read_object(fields.get("function"), path, ("name",)).get("name")
    if not is_name(name):
        raise wrong(f"{path}.name", f"must match ^{NAME}$, not be {short(name)}")
    return str(name)


def _instead(field: str, use: str) -> Any:
    """Make the validator of a field that has a successor."""

    def refuse(value: object) -> None:
        if is_empty(value) or (field == "function_call" and value in ("none", "auto")):
            return
        raise invalid(f"{field} is not supported: use {use}.", field, "unsupported_field")

    return BeforeValidator(refuse)


Tools = Annotated[
    list[Tool] | None,
    SkipValidation,
    BeforeValidator(_read_tools, json_schema_input_type=list[dict[str, Any]] | None),
]
Choice = Annotated[
    ToolChoice | None,
    SkipValidation,
    BeforeValidator(
        _read_choice,
        json_schema_input_type=Literal["none", "auto", "required", "any"] | dict[str, Any] | None,
    ),
]
NoFunctions = Annotated[None, _instead("functions", "tools")]
NoFunctionCall = Annotated[None, _instead("function_call", "tool_choice")]

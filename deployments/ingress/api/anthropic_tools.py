"""Read the tools of Anthropic's API, and translate them for chats."""

# Fields are JSON of any shape until they are checked here.
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportUnknownMemberType=false

from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BeforeValidator, SkipValidation

from deployments.ingress.api.objects import read_flag, read_object, unsupported, wrong
from deployments.ingress.api.openai_fields import is_empty, short
from deployments.ingress.http_errors import invalid

_FIELDS = (
    *("type", "name", "description", "input_schema", "strict"),
    *("cache_control", "eager_input_streaming"),  # they change no answer
    *("allowed_callers", "defer_loading", "input_examples"),  # refused below
)
_CHOICES = {"auto": "auto", "any": "required", "none": "none"}


@dataclass(frozen=True, slots=True)
class UseOfTools:
    """`choice` is in the form of chats."""

    choice: Any
    is_parallel: bool


def _read_tools(value: object) -> list[dict[str, Any]]:
    """Translate the list of tools; what chats refuse as well is left to them. Raises ApiError."""
    if value is None:
        return []
    if not isinstance(value, list):
        raise invalid(f"tools: must be a list, not {short(value)}.", "tools")
    return [_tool(each, f"tools[{at}]") for at, each in enumerate(value)]


def _tool(value: object, path: str) -> dict[str, Any]:
    kind = value.get("type") if isinstance(value, dict) else None
    if kind not in (None, "custom"):
        raise unsupported(
            f"{path}.type",
            f"{short(kind)} is not supported, only tools of your own, of the type 'custom'",
        )
    fields = read_object(value, path, _FIELDS)
    callers = fields.get("allowed_callers")
    if not is_empty(callers) and callers != ["direct"]:
        raise unsupported(f"{path}.allowed_callers", f"must be ['direct'], not {short(callers)}")
    if read_flag(fields, "defer_loading", path):
        raise unsupported(f"{path}.defer_loading", "must be false: there is no search for tools")
    if not is_empty(fields.get("input_examples")):
        raise unsupported(f"{path}.input_examples", "must be empty: describe them in words")
    if "input_schema" not in fields:
        raise wrong(f"{path}.input_schema", "is required")
    names = {"name": "name", "description": "description", "input_schema": "parameters"}
    function = {theirs: fields[ours] for ours, theirs in names.items() if ours in fields}
    return {"type": "function", "function": {**function, "strict": fields.get("strict")}}


def _read_choice(value: object) -> UseOfTools | None:
    if value is None:
        return None
    fields = read_object(value, "tool_choice", ("type", "name", "disable_parallel_tool_use"))
    kind = fields.get("type")
    is_parallel = not read_flag(fields, "disable_parallel_tool_use", "tool_choice")
    if kind == "tool":
        function = {"name": fields.get("name")}
        return UseOfTools({"type": "function", "function": function}, is_parallel)
    if not isinstance(kind, str) or kind not in _CHOICES:
        wanted = "'auto', 'any', 'tool' or 'none'"
        raise wrong("tool_choice.type", f"must be {wanted}, not {short(kind)}")
    if not is_empty(fields.get("name")):
        raise wrong("tool_choice.name", f"only the type 'tool' has a name, not {kind!r}")
    return UseOfTools(_CHOICES[kind], is_parallel)


def tool_names(num_tools: int) -> dict[str, str]:
    """Map the places of tools in chats to those in this API."""
    names = {"tool_choice.function": "tool_choice"}
    for at in range(num_tools):
        names[f"tools[{at}].function"] = f"tools[{at}]"
        names[f"tools[{at}].function.parameters"] = f"tools[{at}].input_schema"
    return names


ClientTools = Annotated[
    list[dict[str, Any]],
    SkipValidation,
    BeforeValidator(_read_tools, json_schema_input_type=list[dict[str, Any]] | None),
]
ToolUseChoice = Annotated[
    UseOfTools | None,
    SkipValidation,
    BeforeValidator(_read_choice, json_schema_input_type=dict[str, Any] | None),
]

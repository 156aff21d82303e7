# ruff: noqa: RUF001 - the vertical lines of DeepSeek's marks are wide
"""List the formats in which models write calls, as patterns of what stands in their answers.

In a pattern a newline is white space of any kind, or none; all else but the slots stands there as
it is. Slots of a call:

- `{name}`, `{id}`: the tool's name; an identifier, which is dropped
- `{arguments}`: a JSON object
- `{calls}`: JSON objects with a name and arguments, or a list of them
- `{keyed}`: the same, with the name as the only key
- `{parameters}`: one `parameter` after the other. Its `{value}` has neither quotes nor escapes: a
  newline on both sides of the slot is one that does not belong to the value. `{is_string}` is
  `true` or `false`
- `{bare_json}`: an object whose keys have no quotes and whose texts stand between `<|"|>`
- `{python}`: a Python list of calls

A new model needs a line here only if none of these patterns fits it.
"""

from dataclasses import dataclass

from deployments.text.tools.pattern import opening_of

AUTO, NONE = "auto", "none"  # where a name may be given: what is found, and no format


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """How one call is written, and what stands around all calls of an answer.

    Without anything that it begins with, a format is of whole answers: what begins as a call is one
    if it names a tool of the request.
    """

    name: str
    call: str
    section: tuple[str, str] | None = None
    parameter: str = ""
    keys: tuple[str, str] = ("name", "arguments")  # of `{calls}`; `parameters` is read as well
    in_list: bool = False  # whether `{calls}` of one answer are written as one JSON list
    id_key: str = ""  # of an identifier in them
    has_channels: bool = False  # and no pattern: see `channels`

    @property
    def opening(self) -> str:
        """What calls begin with; "" where nothing marks them."""
        if self.has_channels:
            return ""
        return self.section[0] if self.section else opening_of(self.call)


_GLM_PARAMETER = "<arg_key>{key}</arg_key>\n<arg_value>{value}</arg_value>"
_QWEN_CALL = "\n<function={name}>\n{parameters}</function>\n"
_ATTRIBUTES = '<parameter name="{key}">{value}</parameter>'
_DSML_CALL = '<｜DSML｜invoke name="{name}">\n{parameters}</｜DSML｜invoke>'
_DSML_PARAMETER = '<｜DSML｜parameter name="{key}" string="{is_string}">{value}</｜DSML｜parameter>'
_DEEPSEEK = ("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>")

# Where two fit a template, the first one is taken: those with the longer beginnings come first.
_FORMATS = (
    # JSON with name and arguments
    ToolFormat("hermes", "<tool_call>\n{calls}\n</tool_call>"),
    ToolFormat("tool-calls", "<tool_calls>\n{calls}\n</tool_calls>", in_list=True),
    ToolFormat("nemotron-v2", "<TOOLCALL>\n{calls}\n</TOOLCALL>", in_list=True),
    ToolFormat("granite", "<|tool_call|>\n{calls}", in_list=True),
    ToolFormat("gigachat", "<|message_sep|>\nfunction call<|role_sep|>\n{calls}"),
    ToolFormat("gigachat-3.1", "<|function_call|>\n{calls}"),
    ToolFormat(
        "cohere",
        "<|START_ACTION|>\n{calls}\n<|END_ACTION|>",
        keys=("tool_name", "parameters"),
        in_list=True,
        id_key="tool_call_id",
    ),
    ToolFormat("mistral-nemo", "[TOOL_CALLS]\n{calls}", in_list=True, id_key="id"),
    ToolFormat("apertus", "<|tools_prefix|>\n{keyed}\n<|tools_suffix|>", in_list=True),
    # A name, then its arguments as JSON
    ToolFormat("mistral-id", "[TOOL_CALLS]{name}[CALL_ID]{id}[ARGS]\n{arguments}"),
    ToolFormat("mistral", "[TOOL_CALLS]{name}[ARGS]\n{arguments}"),
    ToolFormat(
        "deepseek-v3",
        "<｜tool▁call▁begin｜>function<｜tool▁sep｜>{name}\n```json\n{arguments}\n```"
        "<｜tool▁call▁end｜>",
        section=_DEEPSEEK,
    ),
    ToolFormat(
        "deepseek-v3.1",
        "<｜tool▁call▁begin｜>{name}<｜tool▁sep｜>\n{arguments}\n<｜tool▁call▁end｜>",
        section=_DEEPSEEK,
    ),
    ToolFormat(
        "kimi-k2",
        "<|tool_call_begin|>functions.{name}:{id}<|tool_call_argument_begin|>\n{arguments}\n"
        "<|tool_call_end|>",
        section=("<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"),
    ),
    ToolFormat(
        "solar",
        "<|tool_call:begin|>{id}<|tool_call:name|>{name}<|tool_call:args|>\n{arguments}\n"
        "<|tool_call:end|>",
    ),
    ToolFormat("functionary-3.1", "<function={name}>\n{arguments}\n</function>"),
    # Parameters without types
    ToolFormat(
        "qwen3-coder",
        f"<tool_call>{_QWEN_CALL}</tool_call>",
        parameter="<parameter={key}>\n{value}\n</parameter>",
    ),
    ToolFormat(
        "qwen3-coder-tight",
        f"<tool_call>{_QWEN_CALL}</tool_call>",
        parameter="<parameter={key}>{value}</parameter>",
    ),
    ToolFormat(
        "seed-oss",
        f"<seed:tool_call>{_QWEN_CALL}</seed:tool_call>",
        parameter="<parameter={key}>{value}</parameter>",
    ),
    ToolFormat("glm", "<tool_call>{name}\n{parameters}</tool_call>", parameter=_GLM_PARAMETER),
    ToolFormat(
        "hunyuan-3",
        "<tool_call:opensource>{name}<tool_sep:opensource>\n{parameters}</tool_call:opensource>",
        section=("<tool_calls:opensource>", "</tool_calls:opensource>"),
        parameter="<arg_key:opensource>{key}</arg_key:opensource>\n"
        "<arg_value:opensource>{value}</arg_value:opensource>",
    ),
    ToolFormat(
        "minimax-m2",
        '<invoke name="{name}">\n{parameters}</invoke>',
        section=("<minimax:tool_call>", "</minimax:tool_call>"),
        parameter=_ATTRIBUTES,
    ),
    ToolFormat(
        "minimax-m3",
        ']<]minimax[>[<invoke name="{name}">\n{parameters}]<]minimax[>[</invoke>',
        section=("]<]minimax[>[<tool_call>", "]<]minimax[>[</tool_call>"),
        parameter="]<]minimax[>[<{key}>{value}]<]minimax[>[</{key}>",
    ),
    ToolFormat(
        "minicpm5",
        '<function name="{name}">\n{parameters}</function>',
        parameter='<param name="{key}">{value}</param>',
    ),
    ToolFormat(
        "deepseek-v3.2",
        _DSML_CALL,
        section=("<｜DSML｜function_calls>", "</｜DSML｜function_calls>"),
        parameter=_DSML_PARAMETER,
    ),
    ToolFormat(
        "deepseek-v4",
        _DSML_CALL,
        section=("<｜DSML｜tool_calls>", "</｜DSML｜tool_calls>"),
        parameter=_DSML_PARAMETER,
    ),
    # Notations of their own
    ToolFormat("gemma-4", "<|tool_call>call:{name}{bare_json}<tool_call|>"),
    ToolFormat("lfm-2", "<|tool_call_start|>\n{python}\n<|tool_call_end|>"),
    ToolFormat("gpt-oss", "", has_channels=True),
    # Nothing around it
    ToolFormat("llama-3", "{calls}", keys=("name", "parameters")),
)

FORMATS = {form.name: form for form in _FORMATS}

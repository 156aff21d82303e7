# ruff: noqa: RUF001 - the vertical lines of DeepSeek's marks are wide
"""Small chat templates that write calls in the style of each format, by the format's name."""

_CHAT = """\
{%- if tools %}TOOLS:{% for t in tools %}{{ t | tojson }}{% endfor %}<|end|>{% endif %}
{%- for m in messages %}
{%- if m.role == 'assistant' %}<|assistant|>
{%- if m.content %}{{ m.content }}{% endif %}
{%- if m.tool_calls %}CALLS{% endif %}<|end|>
{%- elif m.role == 'tool' %}<|tool|>{{ m.content }}<|end|>
{%- else %}<|{{ m.role }}|>{{ m.content }}<|end|>
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}<|assistant|>{% endif %}"""

_BARE = """\
{%- macro bare(v) -%}
{%- if v is string -%}<|"|>{{ v }}<|"|>
{%- elif v is mapping -%}{{ '{' }}
{%- for k, w in v.items() -%}{{ k }}:{{ bare(w) }}{{ ',' if not loop.last }}{%- endfor -%}
{{ '}' }}
{%- elif v is sequence -%}[
{%- for w in v -%}{{ bare(w) }}{{ ',' if not loop.last }}{%- endfor -%}]
{%- else -%}{{ v | tojson }}{%- endif -%}
{%- endmacro -%}"""

JSON_CALL = '{"name": "{{ c.name }}", "arguments": {{ c.arguments | tojson }}}'
VALUE = "{{ v if v is string else v | tojson }}"


def each(call: str, between: str = "") -> str:
    """Write every call of a message; `c` is its function."""
    end = "{{ between if not loop.last }}"
    start = "{% set between = '" + between + "' %}{% for t in m.tool_calls %}"
    return f"{start}{{% set c = t.function %}}{call}{end}{{% endfor %}}"


def lines(text: str) -> str:
    """Keep newlines from the template's own rules about them."""
    return text.replace("\n", '{{ "\\n" }}')


def parameters(parameter: str, between: str = "") -> str:
    """Write every argument; `k` is its name and `v` its value."""
    loop = "{% for k, v in c.arguments.items() %}" + parameter
    return lines(loop + ("{{ '" + between + "' if not loop.last }}" if between else "")) + (
        "{% endfor %}"
    )


QWEN = lines("<function={{ c.name }}>\n") + parameters(
    "<parameter={{ k }}>\n" + VALUE + "\n</parameter>\n"
)
TIGHT = lines("<function={{ c.name }}>\n") + parameters(
    "<parameter={{ k }}>" + VALUE + "</parameter>\n"
)
GLM = parameters("<arg_key>{{ k }}</arg_key>\n<arg_value>" + VALUE + "</arg_value>\n")
DSML = lines('<｜DSML｜invoke name="{{ c.name }}">\n') + parameters(
    '<｜DSML｜parameter name="{{ k }}" string="{{ "true" if v is string else "false" }}">'
    + VALUE
    + "</｜DSML｜parameter>\n"
)
DEEPSEEK = "<｜tool▁calls▁begin｜>{}<｜tool▁calls▁end｜>"

CALLS = {
    "hermes": each(lines("\n<tool_call>\n" + JSON_CALL + "\n</tool_call>")),
    "tool-calls": lines("\n<tool_calls>[" + each(JSON_CALL, ", ") + "]</tool_calls>\n"),
    "nemotron-v2": "<TOOLCALL>[" + each(JSON_CALL, ", ") + "]</TOOLCALL>",
    "granite": "<|tool_call|>[" + each(JSON_CALL, ", ") + "]",
    "gigachat": each(lines("<|message_sep|>\n\nfunction call<|role_sep|>\n" + JSON_CALL)),
    "gigachat-3.1": each("<|function_call|>" + JSON_CALL),
    "cohere": lines("<|START_ACTION|>[\n")
    + each(
        '    {"tool_call_id": "{{ loop.index0 }}", "tool_name": "{{ c.name }}", "parameters": '
        "{{ c.arguments | tojson }}}",
        ",",
    )
    + lines("\n]<|END_ACTION|>"),
    "mistral-nemo": "[TOOL_CALLS]["
    + each(JSON_CALL[:-1] + ', "id": "{{ t.id }}"}', ", ")
    + "]{% if (m.tool_calls[0].id | length) != 9 %}{{ raise_exception('ids of 9') }}{% endif %}",
    "apertus": "<|tools_prefix|>["
    + each('{"{{ c.name }}": {{ c.arguments | tojson }}}', ", ")
    + "]<|tools_suffix|>",
    "mistral-id": each(
        "[TOOL_CALLS]{{ c.name }}[CALL_ID]{{ t.id }}[ARGS]{{ c.arguments | tojson }}"
    ),
    "mistral": each("[TOOL_CALLS]{{ c.name }}[ARGS]{{ c.arguments | tojson }}"),
    "deepseek-v3": DEEPSEEK.format(
        each(
            lines(
                "<｜tool▁call▁begin｜>function<｜tool▁sep｜>{{ c.name }}\n```json\n"
                "{{ c.arguments | tojson }}\n```<｜tool▁call▁end｜>\n"
            )
        )
    ),
    "deepseek-v3.1": DEEPSEEK.format(
        each(
            "<｜tool▁call▁begin｜>{{ c.name }}<｜tool▁sep｜>{{ c.arguments | tojson }}"
            "<｜tool▁call▁end｜>"
        )
    ),
    "kimi-k2": "<|tool_calls_section_begin|>"
    + each(
        "<|tool_call_begin|>functions.{{ c.name }}:{{ loop.index0 }}"
        "<|tool_call_argument_begin|>{{ c.arguments | tojson }}<|tool_call_end|>"
    )
    + "<|tool_calls_section_end|>",
    "solar": each(
        "<|tool_call:begin|>{{ t.id }}<|tool_call:name|>{{ c.name }}<|tool_call:args|>"
        "{{ c.arguments | tojson }}<|tool_call:end|>"
    ),
    "functionary-3.1": each("<function={{ c.name }}>{{ c.arguments | tojson }}</function>"),
    "qwen3-coder": each(lines("\n<tool_call>\n") + QWEN + lines("</function>\n</tool_call>")),
    "qwen3-coder-tight": each(
        lines("\n<tool_call>\n") + TIGHT + lines("</function>\n</tool_call>")
    ),
    "seed-oss": each(
        lines("\n<seed:tool_call>\n") + TIGHT + lines("</function>\n</seed:tool_call>")
    ),
    "glm": each(lines("\n<tool_call>{{ c.name }}\n") + GLM + "</tool_call>"),
    "hunyuan-3": lines("<tool_calls:opensource>\n")
    + each(
        lines("<tool_call:opensource>{{ c.name }}<tool_sep:opensource>\n")
        + GLM.replace("arg_key>", "arg_key:opensource>").replace(
            "arg_value>", "arg_value:opensource>"
        )
        + lines("</tool_call:opensource>\n")
    )
    + "</tool_calls:opensource>",
    "minimax-m2": lines("\n<minimax:tool_call>\n")
    + each(
        lines('<invoke name="{{ c.name }}">\n')
        + parameters('<parameter name="{{ k }}">' + VALUE + "</parameter>\n")
        + lines("</invoke>\n")
    )
    + "</minimax:tool_call>",
    "minimax-m3": lines("]<]minimax[>[<tool_call>\n")
    + each(
        ']<]minimax[>[<invoke name="{{ c.name }}">'
        + parameters("]<]minimax[>[<{{ k }}>" + VALUE + "]<]minimax[>[</{{ k }}>")
        + lines("]<]minimax[>[</invoke>\n")
    )
    + "]<]minimax[>[</tool_call>",
    "minicpm5": each(
        '<function name="{{ c.name }}">'
        + parameters('<param name="{{ k }}">' + VALUE + "</param>")
        + "</function>"
    ),
    "deepseek-v3.2": lines("\n\n<｜DSML｜function_calls>\n")
    + each(DSML + lines("</｜DSML｜invoke>\n"))
    + "</｜DSML｜function_calls>",
    "deepseek-v4": lines("\n\n<｜DSML｜tool_calls>\n")
    + each(DSML + lines("</｜DSML｜invoke>\n"))
    + "</｜DSML｜tool_calls>",
    "gemma-4": each("<|tool_call>call:{{ c.name }}{{ bare(c.arguments) }}<tool_call|>"),
    "lfm-2": "<|tool_call_start|>["
    + each("{{ c.name }}(" + parameters("{{ k }}={{ v | tojson }}", ", ") + ")", ", ")
    + "]<|tool_call_end|>",
    "gpt-oss": each(
        "{% if not loop.first %}<|start|>assistant{% endif %} to=functions.{{ c.name }}"
        "<|channel|>commentary json<|message|>{{ c.arguments | tojson }}<|call|>"
    ),
    "llama-3": "{% if m.tool_calls | length > 1 %}{{ raise_exception('one call') }}{% endif %}"
    + each('{"name": "{{ c.name }}", "parameters": {{ c.arguments | tojson }}}'),
}


def template_of(name: str) -> str:
    chat = _CHAT.replace("CALLS", CALLS[name])
    return _BARE + chat.replace("<|assistant|>", opening_of(name))


def opening_of(name: str) -> str:
    """What the template writes before an answer."""
    return "<|start|>assistant" if name == "gpt-oss" else "<|assistant|>"


def chat_without_calls() -> str:
    """A template that shows tools and results, and leaves the calls out."""
    return _CHAT.replace("CALLS", "")

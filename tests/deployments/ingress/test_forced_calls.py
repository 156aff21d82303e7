"""Calls that must be made: every answer that the grammar allows is read back as valid calls."""

import json
import random
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from llguidance import LLMatcher, LLTokenizer
from tokenizers import AddedToken, Tokenizer

from deployments.config_sections import IngressSection
from deployments.ingress.structured.calls import CallableTool, ForcedCalls
from deployments.ingress.structured.constraint import (
    Constraint,
    ConstraintRefused,
    Framed,
    to_grammar,
)
from deployments.ingress.structured.thought import Thought
from deployments.text.answer_syntax import AnswerSyntax, find_syntax
from deployments.text.deltas import Reasoning
from deployments.text.tools.call import ToolCall
from deployments.text.tools.formats import FORMATS
from deployments.text.tools.pattern import literals_of
from deployments.text.vocabulary import Vocabulary
from tests.deployments.ingress.test_tool_calls import (
    ARGUMENTS,
    CALL,
    OTHER,
    THINKS,
    TOOLS,
    ask,
    called,
    ends,
    in_server,
    message_of,
    saying,
    tool,
)
from tests.deployments.support.fakes import EOS, Server, byte_tokenizer
from tests.deployments.support.tool_templates import CALLS, template_of

NODE = {
    "type": "object",
    "properties": {"next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]}},
    "additionalProperties": False,
}
RICH = {
    "type": "object",
    "properties": {
        "text": {"type": "string", "maxLength": 6},
        "code": {"type": "string", "pattern": "^[a-c<]{1,4}$"},
        "n": {"type": "integer", "minimum": 5, "maximum": 300},
        "maybe": {"anyOf": [{"type": "string", "maxLength": 4}, {"type": "null"}]},
        "either": {"type": ["number", "string"]},
        "flag": {"type": "boolean"},
        "items": {"type": "array", "items": {"type": "string"}, "minItems": 1, "maxItems": 2},
        "size": {"enum": ["s", "m", 3, "3", None, "null", [1, "a"], {"k": "é"}]},
        "more": {
            "type": "object",
            "properties": {"a": {"type": "number"}, "b": {"$ref": "#/$defs/node"}},
            "required": ["b"],
            "additionalProperties": False,
        },
    },
    "required": ["text", "code", "size"],
    "additionalProperties": False,
    "$defs": {"node": NODE},
}
NOTHING = {"type": "object", "properties": {}, "additionalProperties": False}
OPTIONAL = {
    "type": "object",
    "properties": {"a": {"const": 1}, "b": {"type": "null"}, "c": {"type": "boolean"}},
    "additionalProperties": False,
}
ANYTHING = {"type": "object", "properties": {"any": {}, "map": {"type": "object"}}}
SCHEMAS: dict[str, dict[str, Any]] = {
    "stock_of": RICH,
    "price-of": NOTHING,
    "f": OPTIONAL,
    "g": ANYTHING,
}
CALLABLE = [CallableTool(n, s, f"tools[{at}]") for at, (n, s) in enumerate(SCHEMAS.items())]
MARK = re.compile(r"<[^<>\s{}=]+>|\[[A-Z_]+\]|｜DSML｜|\]<\]minimax\[>\[")  # noqa: RUF001
LONGEST = 3000  # tokens of a walk: some nest free JSON ever deeper


@cache
def vocabulary_of(name: str, are_tokens: bool, thinks: str) -> tuple[Vocabulary, Tokenizer]:
    """Byte tokens, and the marks of a format, if they are tokens: control tokens or added ones."""
    tokenizer, template = byte_tokenizer(), thinks + template_of(name)
    if are_tokens:
        marks = sorted(set(MARK.findall(template)) - {"<|end|>"} if name != "gpt-oss" else {})
        marks = marks or ["<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|constrain|>"]
        tokenizer.add_special_tokens([AddedToken(mark, special=True) for mark in marks[::2]])
        tokenizer.add_tokens([AddedToken(mark, special=False) for mark in marks[1::2]])
    return Vocabulary(tokenizer, {"eos_token": "<eos>"}, template), tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tokenizers")


@cache
def table_of(folder: Path, name: str, are_tokens: bool, thinks: str) -> LLTokenizer:
    path = folder / "tokenizer.json"
    path.write_text(vocabulary_of(name, are_tokens, thinks)[1].to_str())
    return LLTokenizer(str(path), eos_token=EOS)


def walk(
    table: LLTokenizer, grammar: str, ends: Sequence[list[int]], dice: random.Random
) -> list[int] | None:
    """Draw tokens that the grammar allows; now and then, as far as it allows, what may end a part.

    With time this is done more often, so that free texts and values come to their ends.
    """
    matcher = LLMatcher(table, grammar, log_level=0)
    assert not matcher.is_error(), matcher.get_error()
    drawn: list[int] = []
    planned: list[int] = []
    while len(drawn) < LONGEST:
        mask = matcher.compute_bitmask()
        assert not matcher.is_error(), (matcher.get_error(), drawn)
        allowed = [i for i in range(8 * len(mask)) if mask[i // 8] >> i % 8 & 1]
        assert allowed, "there is always a way on"
        if EOS in allowed and (dice.random() < 0.6 or len(allowed) == 1):
            return drawn
        if not planned and dice.random() < len(drawn) / 100:
            planned = list(dice.choice(ends))
        others = [i for i in allowed if i != EOS]
        is_planned = bool(planned) and planned[0] in others
        drawn.append(planned.pop(0) if is_planned else dice.choice(others))
        planned = planned if is_planned else []
        assert matcher.consume_token(drawn[-1])
    return None


def check_walks(folder: Path, name: str, num: int) -> None:
    num_ended = 0
    for number in range(num):
        dice = random.Random(f"{name}{number}")
        are_tokens = number % 2 == 1
        thinks = THINKS if dice.random() < 0.5 and name != "gpt-oss" else ""
        vocabulary = vocabulary_of(name, are_tokens, thinks)[0]
        syntax = find_syntax(vocabulary, "m")
        assert syntax.tools.form is FORMATS[name]
        table = table_of(folder, name, are_tokens, thinks)
        num_ended += check_walk(table, vocabulary, syntax, dice)
    assert num_ended > 0.9 * num


def check_walk(
    table: LLTokenizer, vocabulary: Vocabulary, syntax: AnswerSyntax, dice: random.Random
) -> bool:
    """Tell whether the walk has ended; then what was said is right."""
    assert syntax.tools.form is not None
    is_inside = syntax.think_tags is not None and dice.random() < 0.5
    one_call = syntax.tools.has_one_call or dice.random() < 0.5
    tools = dice.sample(CALLABLE, dice.randint(1, len(CALLABLE)))
    channels = syntax.tools.form.has_channels
    thought = Thought(syntax.think_tags, is_inside, True, channels, syntax.mark_ids)
    forced = ForcedCalls(syntax.tools.form, tools, one_call, thought)
    may_answer = syntax.marks_calls and dice.random() < 0.5
    marks = literals_of(syntax.tools.form.call + syntax.tools.form.parameter)
    marks += [*(syntax.tools.form.section or ()), "</think>", '<|"|>', "<|end|>", "</parameter>"]
    ends = [vocabulary.encode(text, False) for text in (*marks, '"', "}", "]", '"', "}", "]")]
    wanted = Constraint("calls", forced, "tool_choice")
    if may_answer:
        answer = Constraint("json", RICH, "response_format")
        wanted = Constraint("framed", Framed(answer, thought, forced), "response_format")
    grammar = to_grammar(wanted).text
    drawn = walk(table, grammar, ends, dice)
    if drawn is None:
        return False
    detokenizer = vocabulary.detokenizer(True, (), syntax.shown_ids)
    text = detokenizer.push(drawn) + detokenizer.flush()
    parser = syntax.parser(SCHEMAS, is_inside, one_call, may_answer)
    cut = dice.randint(0, len(text))
    deltas = parser.push(text[:cut]) + parser.push(text[cut:]) + parser.flush()
    calls = [delta for delta in deltas if isinstance(delta, ToolCall)]
    if may_answer and not calls:
        said = "".join(delta for delta in deltas if isinstance(delta, str))
        jsonschema.validate(json.loads(said), RICH)
        return True
    assert calls and all(isinstance(d, ToolCall | Reasoning) for d in deltas), (text, deltas)
    assert not one_call or len(calls) == 1
    for call in calls:
        assert call.name in [tool.name for tool in tools]
        jsonschema.validate(json.loads(call.arguments), SCHEMAS[call.name])
    return True


@pytest.mark.parametrize("name", CALLS)
def test_what_the_grammar_allows_is_read_back_as_valid_calls(name: str, folder: Path) -> None:
    check_walks(folder, name, 2)


@pytest.mark.slow
@pytest.mark.parametrize("name", CALLS)
def test_many_walks_are_read_back_as_valid_calls(name: str, folder: Path) -> None:
    check_walks(folder, name, 300)


STRUCTURAL = {
    "format": {
        "type": "triggered_tags",
        "triggers": ["<n"],
        "tags": [
            {
                "type": "tag",
                "begin": "<n>",
                "content": {"type": "json_schema", "json_schema": {"type": "integer"}},
                "end": "</n>",
            }
        ],
    }
}


@pytest.mark.parametrize("name", ["hermes", "gpt-oss"])
@pytest.mark.parametrize("are_tokens", [False, True])
@pytest.mark.parametrize(
    ("answer", "pattern"),
    [
        (Constraint("json", {"type": "integer"}, "r"), "-?(0|[1-9][0-9]*)"),
        (Constraint("choice", ["a<", "</b>"], "r"), "a<|</b>"),
        (Constraint("regex", "[<>/a-c]{1,9}", "r"), "[<>/a-c]{1,9}"),
        (Constraint("grammar", "start: x+\nx: /[ab]/", "r"), "[ab]+"),
        (Constraint("structural_tag", STRUCTURAL, "r"), "((?!<n).)*(<n>-?[0-9]+</n>((?!<n).)*)*"),
    ],
    ids=lambda value: getattr(value, "kind", ""),
)
def test_reasoning_comes_before_an_answer_of_any_grammar(
    name: str, are_tokens: bool, answer: Constraint, pattern: str, folder: Path
) -> None:
    thinks = THINKS if name == "hermes" else ""
    vocabulary = vocabulary_of(name, are_tokens, thinks)[0]
    syntax = find_syntax(vocabulary, "m")
    table = table_of(folder, name, are_tokens, thinks)
    num_ended = 0
    for number in range(12):
        dice = random.Random(number)
        is_inside = name == "hermes" and number % 2 == 1
        thought = Thought(syntax.think_tags, is_inside, True, name == "gpt-oss", syntax.mark_ids)
        grammar = to_grammar(Constraint("framed", Framed(answer, thought), "r")).text
        closing = [vocabulary.encode(text, False) for text in ("</think>", "<|end|>", "</n>")]
        drawn = walk(table, grammar, closing, dice)
        if drawn is None:
            continue
        num_ended += 1
        detokenizer = vocabulary.detokenizer(True, (), syntax.shown_ids)
        text = detokenizer.push(drawn) + detokenizer.flush()
        parser = syntax.parser({}, is_inside, False, True)
        deltas = parser.push(text) + parser.flush()
        said = "".join(delta for delta in deltas if isinstance(delta, str))
        assert re.fullmatch(pattern, said, re.DOTALL), (text, deltas)
        assert not is_inside or "</think>" in text
    assert num_ended > 8


def grammar_of(name: str, **properties: Any) -> str:
    schema = {"type": "object", "properties": properties}
    tools = [CallableTool("f", schema, "tools[0].function.parameters")]
    forced = ForcedCalls(FORMATS[name], tools, False)
    return to_grammar(Constraint("calls", forced, "tool_choice")).text


@pytest.mark.parametrize("name", ["hermes", "glm", "gemma-4", "lfm-2"])
@pytest.mark.parametrize(
    ("schema", "reason"),
    [
        ({"not": {}}, "not at /properties/a"),
        ({"type": "array", "uniqueItems": True}, "uniqueItems at /properties/a"),
    ],
)
def test_what_cannot_be_enforced_is_refused_with_its_place(
    name: str, schema: Any, reason: str
) -> None:
    with pytest.raises(ConstraintRefused, match=reason) as caught:
        grammar_of(name, a=schema)
    assert caught.value.path == "tools[0].function.parameters"


@pytest.mark.parametrize(
    ("name", "properties", "reason"),
    [
        ("glm", {"a": {"allOf": [{"type": "string"}, {"maxLength": 3}]}}, "allOf at /properties/a"),
        ("glm", {"</arg_key>": {"type": "string"}}, "name '</arg_key>' cannot be written"),
        ("glm", {"a": {"enum": ["</arg_value>"]}}, "no value at /properties/a"),
        ("glm", {"a": {"type": "string", "$ref": "#"}}, "type at /properties/a"),
        ("gemma-4", {"a": {"type": "array", "prefixItems": [{}]}}, "prefixItems at /properties/a"),
        ("gemma-4", {"a": {"const": '<|"|>'}}, "cannot be written"),
        ("lfm-2", {"class": {"type": "string"}}, "'class' cannot be the name"),
        ("lfm-2", {"a": {"oneOf": [{}, {"type": "null"}]}}, "oneOf at /properties/a"),
    ],
)
def test_what_a_format_cannot_write_is_refused(name: str, properties: Any, reason: str) -> None:
    with pytest.raises(ConstraintRefused, match=re.escape(reason)):
        grammar_of(name, **properties)


# ---- over HTTP -----------------------------------------------------------------------------

NAMED = {"type": "function", "function": {"name": "stock_of"}}


def allowed(mode: str, *names: str) -> dict[str, Any]:
    tools = [{"type": "function", "function": {"name": name}} for name in names]
    return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": tools}}


def names_in(grammar: str | None) -> list[str]:
    assert grammar is not None
    lark = json.loads(grammar)["grammars"][0]["lark_grammar"]
    return sorted(set(re.findall(r"price_of|stock_of", lark)))


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("choice", "names", "reason"),
    [
        ("required", ["price_of", "stock_of"], "tool_calls"),
        ("any", ["price_of", "stock_of"], "tool_calls"),
        (NAMED, ["stock_of"], "stop"),
        (allowed("required", "price_of"), ["price_of"], "tool_calls"),
    ],
    ids=str,
)
def test_the_engine_is_told_what_must_be_called(
    choice: Any, names: list[str], reason: str, stream: bool
) -> None:
    async def test(server: Server) -> None:
        answer = await ask(server, tool_choice=choice, stream=stream)
        assert called(message_of(answer)) == [("stock_of", ARGUMENTS)]
        assert message_of(answer)["content"] is None and ends(answer) == [reason]
        assert names_in(server.engine.requests[-1].sampling.grammar) == names

    in_server(test, saying(CALL))


def test_a_named_tool_is_called_once_and_others_as_often_as_wanted() -> None:
    async def test(server: Server) -> None:
        for fields, one in (
            ({"tool_choice": NAMED}, True),
            ({"tool_choice": "required"}, False),
            ({"tool_choice": "required", "parallel_tool_calls": False}, True),
        ):
            await ask(server, **fields)
            grammar = server.engine.requests[-1].sampling.grammar
            assert grammar is not None and ("{1,128}" in grammar) is not one

    in_server(test, saying(CALL))


def test_under_auto_the_model_is_told_about_allowed_tools_alone() -> None:
    async def test(server: Server) -> None:
        await ask(server, tool_choice=allowed("auto", "price_of"))
        request = server.engine.requests[-1]
        prompt = bytes(i for i in request.prompt_token_ids if i < 256).decode()
        assert request.sampling.grammar is None
        assert "price_of" in prompt and "stock_of" not in prompt

    in_server(test, saying(OTHER))


@pytest.mark.parametrize(
    ("fields", "param", "reason"),
    [
        ({"tool_choice": "required", "tools": []}, "tool_choice", "only possible with tools"),
        ({"tool_choice": allowed("auto", "x")}, "tool_choice", "no tool is called 'x'"),
        ({"tool_choice": allowed("none", "x")}, "tool_choice.allowed_tools.mode", "'required'"),
        ({"tool_choice": allowed("auto")}, "tool_choice.allowed_tools.tools", "1 to 128"),
        ({"tool_choice": {"type": "custom"}}, "tool_choice", "'allowed_tools'"),
        ({"tool_choice": "required", "ignore_eos": True}, "ignore_eos", "not allowed"),
        (
            {"tool_choice": "required", "tools": [TOOLS[1], tool("f", a={"not": {}})]},
            "tools[1].function.parameters",
            "not at /properties/a cannot be enforced",
        ),
    ],
    ids=str,
)
def test_what_cannot_be_forced_is_refused_with_its_place(
    fields: dict[str, Any], param: str, reason: str
) -> None:
    async def test(server: Server) -> None:
        answer = await ask(server, **fields)
        assert (answer.status, answer.error["param"]) == (400, param)
        assert reason in answer.error["message"]

    in_server(test, saying("x"))


def test_what_a_lenient_server_does_not_enforce_is_named() -> None:
    async def test(server: Server) -> None:
        fields = {"tools": [tool("f", a={"not": {}})], "tool_choice": "required"}
        answer = await ask(server, **fields)
        place = "tools%5B0%5D.function.parameters%3A not at /properties/a"
        assert (answer.status, answer.headers["x-reef-not-enforced"]) == (200, place)

    settings = IngressSection(max_body_bytes=2**20, lenient_schemas=True)
    in_server(test, saying("x"), ingress_settings=settings)


@pytest.mark.parametrize(
    ("name", "listed"),
    [("glm", True), ("deepseek-v4", True), ("gemma-4", True), ("lfm-2", True), ("hermes", False)],
)
def test_formats_that_texts_are_not_held_to_are_listed(name: str, listed: bool) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "string", "format": "date"}}}
    forced = ForcedCalls(FORMATS[name], [CallableTool("f", schema, "t")], True)
    grammar = to_grammar(Constraint("calls", forced, "tool_choice"))
    assert grammar.not_enforced == (("format at t/properties/a",) if listed else ())


JSON_FORMAT = {"response_format": {"type": "json_object"}}


@pytest.mark.parametrize("stream", [False, True])
def test_beside_tools_an_answer_is_either_calls_or_json(stream: bool) -> None:
    said = json.dumps({"not a call": CALL})

    async def test(server: Server) -> None:
        fields = {**JSON_FORMAT, "stream": stream}
        answers = [await ask(server, seed=seed, **fields) for seed in (3, 4, 5)]
        assert [ends(answer) for answer in answers] == [["stop"], ["tool_calls"], ["stop"]]
        first, second, third = map(message_of, answers)
        assert (first["content"], third["content"]) == (said, said)
        assert called(second) == [("stock_of", ARGUMENTS)] * 2 and not second["content"]
        assert third["reasoning"] == "Hm."
        grammar = json.loads(server.engine.requests[-1].sampling.grammar or "")
        assert {"answer", "json_0", "json_1"} <= {g.get("name") for g in grammar["grammars"]}

    engine = saying(said, f"{CALL}\n{CALL}", f"<think>Hm.</think>\n{said}")
    in_server(test, engine, THINKS + template_of("hermes"))


@pytest.mark.parametrize(
    ("template", "fields", "reason"),
    [
        ("hermes", {"guided_regex": "a"}, "from whose calls only JSON can be told"),
        ("llama-3", JSON_FORMAT, "whose calls are JSON without marks"),
        ("hermes", {**JSON_FORMAT, "tool_choice": "required"}, "a forced tool_choice"),
    ],
)
def test_what_cannot_be_told_from_calls_is_refused_beside_tools(
    template: str, fields: dict[str, Any], reason: str
) -> None:
    async def test(server: Server) -> None:
        answer = await ask(server, **fields)
        path = "guided_regex" if "guided_regex" in fields else "response_format"
        assert (answer.status, answer.error["param"]) == (400, path)
        assert reason in answer.error["message"]
        none = await ask(server, **{**fields, "tool_choice": "none"})
        assert none.status == 200

    in_server(test, saying("{}"), template_of(template))


@pytest.mark.parametrize(
    ("ending", "fields", "has_room"),
    [
        ("", {}, True),
        ("<think>", {}, True),
        ("<think>\n\n</think>\n\n", {}, False),
        ("", {"continue_final_message": True}, False),
        ("", {"response_format": None, "guided_regex": "(<think>a+</think>)?b"}, False),
    ],
    ids=str,
)
def test_answers_of_a_grammar_have_room_for_reasoning_unless_it_has_been(
    ending: str, fields: dict[str, Any], has_room: bool
) -> None:
    template = "{% if add_generation_prompt %}" + ending + "{% endif %}"

    async def test(server: Server) -> None:
        assert (await ask(server, **{"tools": [], **JSON_FORMAT, **fields})).status == 200
        grammar = json.loads(server.engine.requests[-1].sampling.grammar or "")
        assert (grammar["grammars"][-1].get("name") == "answer") is has_room

    in_server(test, saying("{}"), THINKS + template_of("hermes") + template)


@pytest.mark.parametrize("opens", [False, True])
def test_reasoning_may_come_before_a_forced_call(opens: bool) -> None:
    opening = "{% if add_generation_prompt %}<think>\n{% endif %}" if opens else ""

    async def test(server: Server) -> None:
        message = message_of(await ask(server, tool_choice="required"))
        assert message["reasoning"] == "Hm." and called(message) == [("stock_of", ARGUMENTS)]
        grammar = server.engine.requests[-1].sampling.grammar
        assert grammar is not None and ("<think>" in grammar) is not opens

    thought = f"{'' if opens else '<think>'}Hm.</think>\n\n{CALL}"
    in_server(test, saying(thought), THINKS + template_of("hermes") + opening)

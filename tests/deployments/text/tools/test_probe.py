"""The format is found by what a template renders, and what a template leaves out is noticed."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from tokenizers import AddedToken

from deployments.text.answer_syntax import find_syntax
from deployments.text.chat_template import ChatTemplate
from deployments.text.tools.probe import LONG_ID, SHORT_ID, CallStyle, ToolSupport, probe_tools
from deployments.text.vocabulary import Vocabulary
from tests.deployments.support.fakes import byte_tokenizer, byte_vocabulary
from tests.deployments.support.tool_templates import CALLS, chat_without_calls, template_of


def probe(template: str) -> ToolSupport:
    return probe_tools(ChatTemplate(template, {}).render)


@pytest.mark.parametrize("name", CALLS)
def test_each_format_is_found_in_a_template_that_writes_it(name: str) -> None:
    found = probe(template_of(name))
    assert found.form is not None and found.form.name == name
    assert found.has_one_call == (name == "llama-3")
    assert found.style == CallStyle(has_short_ids=name == "mistral-nemo")


def test_the_examples_that_a_template_shows_of_calls_are_no_calls() -> None:
    example = '<tool_call>{"name": "probe_alpha", "arguments": {}}</tool_call><function=f>{}'
    found = probe(example + template_of("glm"))
    assert found.form is not None and found.form.name == "glm"


def test_values_may_be_trimmed_by_a_template() -> None:
    template = template_of("qwen3-coder").replace("v if v is string", "v | trim if v is string")
    found = probe(template)
    assert found.form is not None and found.form.name.startswith("qwen3-coder")


def test_a_template_may_want_content_beside_calls() -> None:
    template = template_of("hermes").replace(
        "{%- if m.content %}{{ m.content }}{% endif %}", "{{ m.content + '' }}"
    )
    assert probe(template).style == CallStyle(fills_content=True)


TOOLS_PART = "TOOLS:{% for t in tools %}{{ t | tojson }}{% endfor %}<|end|>"


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (chat_without_calls(), "writes no calls"),
        (template_of("hermes").replace("tool_call>", "strange>"), "not known"),
        (template_of("hermes").replace(TOOLS_PART, ""), "does not show tools"),
        (
            template_of("hermes").replace("<|tool|>{{ m.content }}", "<|tool|>"),
            "what a tool has returned",
        ),
        ("{{ raise_exception('no roles at all') }}", "no roles at all"),
        ("nothing", "user's message"),
    ],
)
def test_templates_that_cannot_be_used_with_tools_are_named(template: str, reason: str) -> None:
    found = probe(template)
    assert found.form is None and reason in found.refusal


def test_ids_are_those_that_answers_have() -> None:
    """As long as what the server makes, so that what was probed is what will come."""
    assert len(LONG_ID) == len("call_" + "0" * 24) and len(SHORT_ID) == 9


def test_what_is_found_is_logged_at_load(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        assert find_syntax(byte_vocabulary(chat_without_calls()), "mine").tools.form is None
        find_syntax(byte_vocabulary(template_of("glm") + "{# </think> #}"), "yours")
    assert "mine: requests with tools are refused: the chat template writes no calls" in caplog.text
    assert "yours: tools are called in the format glm" in caplog.text
    assert "yours: reasoning stands between <think> and </think>" in caplog.text


def test_a_format_may_be_named_or_switched_off() -> None:
    vocabulary = byte_vocabulary(template_of("glm"))
    named = find_syntax(vocabulary, "m", "hermes", "mistral")
    assert named.tools.form is not None and named.tools.form.name == "hermes"
    assert named.think_tags is not None and named.think_tags.opening == "[THINK]"
    off = find_syntax(vocabulary, "m", "none", "none")
    assert off.tools.form is None and off.think_tags is None
    assert find_syntax(byte_vocabulary(None), "m").tools.refusal == "its base has no chat template"


def test_variables_of_a_template_are_seen() -> None:
    both = byte_vocabulary("{{ reasoning_effort }}{% if enable_thinking is false %}{% endif %}")
    found = find_syntax(both, "m")
    assert found.takes_effort and found.takes_thinking
    found = find_syntax(byte_vocabulary("{% set reasoning_effort = 1 %}"), "m")
    assert not found.takes_effort and not found.takes_thinking


def test_control_tokens_of_a_format_are_part_of_the_text() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens([AddedToken("<tool_call>", special=True), "<other>"])
    vocabulary = Vocabulary(tokenizer, {"eos_token": "<eos>"}, template_of("hermes"))
    shown = find_syntax(vocabulary, "m").shown_ids
    assert shown == {vocabulary.encode("<tool_call>", False)[0]}
    ids = vocabulary.encode("a<tool_call>b<other>c<eos>", False)
    for shown_ids, text in ((shown, "a<tool_call>bc"), (frozenset[int](), "abc")):
        detokenizer = vocabulary.detokenizer(True, (), shown_ids)
        assert detokenizer.push(ids) + detokenizer.flush() == text
    assert vocabulary.detokenizer(False).push(ids) == "a<tool_call>b<other>c<eos>"


def test_the_probe_hands_templates_nothing_that_they_must_not_change() -> None:
    seen: list[Any] = []

    def render(
        messages: Sequence[Mapping[str, Any]], opens_answer: bool, extra: Mapping[str, Any]
    ) -> str:
        seen.append((messages, extra))
        return ""

    assert probe_tools(render).form is None
    assert len(seen) == 8

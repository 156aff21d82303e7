"""Reasoning is parted from the answer, however the text is cut."""

from collections.abc import Iterator, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deployments.text.answer_parser import AnswerParser
from deployments.text.channels import ChannelParser
from deployments.text.deltas import Delta, Reasoning
from deployments.text.reasoning import (
    THINK_TAGS,
    ReasoningSplitter,
    find_think_tags,
    is_reasoning,
)
from deployments.text.tools.call import ToolCall
from deployments.text.tools.call_parser import CallParser
from deployments.text.tools.formats import FORMATS

TAGS = THINK_TAGS["think"]
PIECES = ["<", "<th", "</", "think>", " ", "\n", "a", "b.", "<tool_call>"]
TEXT = st.lists(st.sampled_from(PIECES), max_size=8).map("".join)


def joined(deltas: Sequence[Delta]) -> tuple[str, str, list[ToolCall]]:
    return (
        "".join(delta.text for delta in deltas if isinstance(delta, Reasoning)),
        "".join(delta for delta in deltas if isinstance(delta, str)),
        [delta for delta in deltas if isinstance(delta, ToolCall)],
    )


def parted(parts: Sequence[str], is_inside: bool = False, name: str = "think") -> tuple[str, str]:
    parser = AnswerParser(ReasoningSplitter(THINK_TAGS[name], is_inside), None)
    deltas = [delta for part in parts for delta in parser.push(part)]
    reasoning, answer, calls = joined(deltas + parser.flush())
    assert not calls
    return reasoning, answer


def cuts(text: str) -> Iterator[list[str]]:
    yield [text]
    yield list(text)
    for at in range(1, len(text)):
        yield [text[:at], text[at:]]


@pytest.mark.parametrize(
    ("text", "is_inside", "wanted"),
    [
        ("<think>\nhm, <b>\n\nso\n</think>\n\nYes. ", False, ("hm, <b>\n\nso", "Yes. ")),
        ("\n <think></think>Yes", False, ("", "Yes")),
        ("hm\n</think>\n\nYes\n", True, ("hm", "Yes\n")),
        (" Yes </think> <think>", False, ("", " Yes </think> <think>")),
        ("<think>hm</think>a <think>b</think>", False, ("hm", "a <think>b</think>")),
        ("<think>cut of", False, ("cut of", "")),
        ("hm </thin", True, ("hm </thin", "")),
        ("<thin", False, ("", "<thin")),
        ("", True, ("", "")),
        ("", False, ("", "")),
        ("</think>", True, ("", "")),
    ],
)
def test_reasoning_is_what_stands_between_the_tags(
    text: str, is_inside: bool, wanted: tuple[str, str]
) -> None:
    for parts in cuts(text):
        assert parted(parts, is_inside) == wanted, parts


@pytest.mark.parametrize("name", THINK_TAGS)
def test_every_pair_of_tags_is_read(name: str) -> None:
    tags = THINK_TAGS[name]
    for parts in cuts(f"{tags.opening}hm{tags.closing}Yes"):
        assert parted(parts, name=name) == ("hm", "Yes"), parts


@given(TEXT, st.booleans(), st.integers(1, 4))
@settings(max_examples=200, deadline=None)
def test_cuts_make_no_difference_and_nothing_is_lost(
    text: str, is_inside: bool, length: int
) -> None:
    reasoning, answer = parted([text], is_inside)
    parts = [text[at : at + length] for at in range(0, len(text), length)]
    assert parted(parts, is_inside) == (reasoning, answer)
    kept = "".join((reasoning + answer).split())
    given_text = "".join(text.split())
    assert kept in (
        given_text,
        given_text.replace("<think>", "", 1).replace("</think>", "", 1),
        given_text.replace("<think>", "", 1),
        given_text.replace("</think>", "", 1),
    )


def test_calls_inside_reasoning_are_part_of_it() -> None:
    call = '<tool_call>{"name": "f", "arguments": {}}</tool_call>'
    for parts in cuts(f"<think>I might {call}</think>\nNow: {call}\n"):
        parser = AnswerParser(
            ReasoningSplitter(TAGS, False), CallParser(FORMATS["hermes"], {"f": {}})
        )
        deltas = [delta for part in parts for delta in parser.push(part)] + parser.flush()
        assert joined(deltas) == (f"I might {call}", "Now:", [ToolCall("f", "{}")]), parts


def test_a_parser_of_one_call_takes_nothing_behind_it() -> None:
    call = '<tool_call>{"name": "f", "arguments": {}}</tool_call>'
    parser = AnswerParser(None, CallParser(FORMATS["hermes"], {"f": {}}), one_call=True)
    assert parser.push(call + call) == [ToolCall("f", "{}")]
    assert parser.is_done and parser.push("more") == [] and parser.flush() == []


# ---- where it begins -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "wanted"),
    [
        ("<|assistant|><think>\n", True),
        ("<|assistant|><think>", True),
        ("<|assistant|>\n", False),
        ("<|assistant|><think>\n\n</think>\n\n", False),
        ("<|user|>what is <think>?<|assistant|>", False),
        ("<think>old</think>x<|assistant|><think>", True),
    ],
)
def test_the_prompt_says_whether_the_answer_begins_inside(prompt: str, wanted: bool) -> None:
    assert is_reasoning(TAGS, prompt) == wanted


def test_an_answer_that_goes_on_may_begin_inside() -> None:
    assert is_reasoning(TAGS, "...<think>I was", "<think>I was")
    assert not is_reasoning(TAGS, "...<think>I was</think>So", "<think>I was</think>So")
    assert not is_reasoning(TAGS, "...So", "So")


def test_tags_are_found_in_the_template_or_else_in_the_vocabulary() -> None:
    assert find_think_tags("{{ m.split('</think>') }}", []) == TAGS
    assert find_think_tags("{{ m }}", ["<think>", "</think>", "<x>"]) == TAGS
    assert find_think_tags("{{ m }}[/THINK]", ["<think>", "</think>"]) == THINK_TAGS["mistral"]
    assert find_think_tags("{{ m }}", ["<think>"]) is None


# ---- channels ------------------------------------------------------------------------------

THOUGHT = "<|channel|>analysis<|message|>hm<|end|>"
FINAL = "<|start|>assistant<|channel|>final<|message|>Yes <b>.<|return|>"
CALL = (
    "<|start|>assistant<|channel|>commentary to=functions.f <|constrain|>json<|message|>"
    '{"a": "<|"}<|call|>'
)


def of_channels(parts: Sequence[str]) -> tuple[str, str, list[ToolCall]]:
    parser = ChannelParser()
    deltas = [delta for part in parts for delta in parser.push(part)]
    return joined(deltas + parser.flush())


def test_channels_are_parted() -> None:
    call = ToolCall("f", '{"a": "<|"}')
    for text, wanted in (
        (THOUGHT + FINAL, ("hm", "Yes <b>.", [])),
        (THOUGHT + CALL, ("hm", "", [call])),
        (THOUGHT + CALL.removesuffix("<|call|>"), ("hm", "", [call])),
        (CALL.removeprefix("<|start|>assistant") + CALL, ("", "", [call, call])),
        ("Yes, plain.", ("", "Yes, plain.", [])),
        ("to be or", ("", "to be or", [])),
        ("<|channel|>final<|mess", ("", "<|channel|>final<|mess", [])),
        (THOUGHT.removesuffix("<|end|>") + "<|e", ("hm<|e", "", [])),
    ):
        for parts in cuts(text):
            assert of_channels(parts) == wanted, parts


def test_a_call_in_a_channel_whose_arguments_are_no_object_is_text() -> None:
    broken = "<|channel|>commentary to=functions.f<|message|>[1]<|call|>"
    for parts in cuts(broken):
        assert of_channels(parts) == ("", broken.removesuffix("<|call|>"), []), parts

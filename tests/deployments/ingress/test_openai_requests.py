"""What the OpenAI interfaces accept, ignore and refuse, before any model is asked."""

from typing import Any

import pytest

from deployments.ingress.api.openai import (
    ChatCompletionRequest,
    CompletionRequest,
    parse_request,
)
from deployments.ingress.http_errors import ApiError

CHAT: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
COMPLETION: dict[str, Any] = {"model": "m", "prompt": "hi"}


def chat(**fields: Any) -> ChatCompletionRequest:
    return parse_request(ChatCompletionRequest, {**CHAT, **fields})


def completion(**fields: Any) -> CompletionRequest:
    return parse_request(CompletionRequest, {**COMPLETION, **fields})


@pytest.mark.parametrize(
    "fields",
    [
        {"user": "u", "metadata": {"a": "b"}, "store": True, "service_tier": "auto"},
        {"tools": None, "response_format": {"type": "text"}, "modalities": ["text"]},
        {"tool_choice": "none", "parallel_tool_calls": False},
        {"temperature": 0, "top_k": -1, "logit_bias": {"5": -100}},
        {"stream": True, "stream_options": {"include_usage": True}},
    ],
)
def test_fields_that_change_nothing_are_accepted(fields: dict[str, Any]) -> None:
    chat(**fields).sampling(5, 1)


@pytest.mark.parametrize(
    ("fields", "path"),
    [
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"functions": []}, "functions"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"audio": {"voice": "x"}}, "audio"),
        ({"modalities": ["text", "audio"]}, "modalities[1]"),
        ({"reasoning_effort": "high"}, "reasoning_effort"),
        ({"nonsense": 1}, "nonsense"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"nonsense": True}}, "stream_options.nonsense"),
        ({"n": 0}, "n"),
        ({"n": 129}, "n"),
        ({"n": "2"}, "n"),
        ({"n": 2.5}, "n"),
        ({"stream": 1}, "stream"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"max_tokens": 1, "max_completion_tokens": 1}, "max_tokens"),
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": "x", "mood": 1}]}, "messages[0].mood"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages[0].content",
        ),
        ({"stop": ["a", ""]}, "stop"),
        ({"stop": ["a"] * 17}, "stop"),
        ({"stop_token_ids": [5] * 129}, "stop_token_ids"),
        ({"logit_bias": {str(i): 1 for i in range(1025)}}, "logit_bias"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"1": "2"}}, "logit_bias"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": float("inf")}, "top_p"),
        ({"model": None}, "model"),
    ],
)
def test_a_bad_chat_field_is_refused_with_its_path(fields: dict[str, Any], path: str) -> None:
    with pytest.raises(ApiError) as caught:
        chat(**fields)
    assert (caught.value.status, caught.value.param) == (400, path)


@pytest.mark.parametrize(
    ("fields", "path"),
    [
        ({"temperature": -1}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"min_p": 1.5}, "min_p"),
        ({"presence_penalty": 3}, "presence_penalty"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"top_k": -2}, "top_k"),
        ({"min_tokens": 6}, "min_tokens"),
        ({"seed": 2**63}, "seed"),
        ({"logit_bias": {"5": 101}}, "logit_bias"),
    ],
)
def test_a_value_out_of_range_is_refused_with_the_range(fields: dict[str, Any], path: str) -> None:
    with pytest.raises(ApiError) as caught:
        chat(**fields).sampling(5, 1)
    assert (caught.value.status, caught.value.param) == (400, path)
    assert "must be in" in caught.value.message


@pytest.mark.parametrize(
    ("fields", "path"),
    [
        ({"prompt": []}, "prompt"),
        ({"prompt": ["a", 1]}, "prompt"),
        ({"prompt": [[1], ["a"]]}, "prompt"),
        ({"prompt": {"text": "a"}}, "prompt"),
        ({"prompt": [True]}, "prompt"),
        ({"suffix": "end"}, "suffix"),
        ({"best_of": 2}, "best_of"),
        ({"logprobs": 21}, "logprobs"),
        ({"logprobs": True}, "logprobs"),
        ({"max_tokens": 0}, "max_tokens"),
    ],
)
def test_a_bad_completion_field_is_refused_with_its_path(fields: dict[str, Any], path: str) -> None:
    with pytest.raises(ApiError) as caught:
        completion(**fields)
    assert (caught.value.status, caught.value.param) == (400, path)


@pytest.mark.parametrize(
    ("prompt", "wanted"),
    [
        ("a", ["a"]),
        (["a", "b"], ["a", "b"]),
        ([1, 2], [[1, 2]]),
        ([[1], [2, 3]], [[1], [2, 3]]),
    ],
)
def test_a_prompt_may_be_text_or_tokens_one_or_many(prompt: object, wanted: object) -> None:
    assert completion(prompt=prompt).prompt == wanted


def test_sampling_is_what_was_asked_for() -> None:
    sampling = completion(
        temperature=0.5, top_k=3, seed=-7, logprobs=2, echo=True, stop_token_ids=[4], min_p=0.1
    ).sampling(9, seed=1)
    assert (sampling.temperature, sampling.top_k, sampling.seed) == (0.5, 3, -7)
    assert (sampling.max_tokens, sampling.logprobs, sampling.prompt_logprobs) == (9, 2, 2)
    assert (sampling.stop_token_ids, sampling.min_p, sampling.top_p) == ((4,), 0.1, 1.0)


def test_a_missing_seed_is_the_one_that_was_drawn() -> None:
    assert chat().sampling(5, seed=11).seed == 11


def test_parts_of_a_message_are_one_text() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    message = chat(messages=[{"role": "developer", "content": parts}]).messages[0]
    assert message.document() == {"role": "system", "content": "ab"}


@pytest.mark.parametrize("document", [[], "text", None, 5])
def test_a_body_that_is_no_object_is_refused(document: object) -> None:
    with pytest.raises(ApiError, match="JSON object"):
        parse_request(ChatCompletionRequest, document)

"""The official OpenAI client against a running server, sync and async.

    python tests/clients/openai_client.py <base url> <base model> <adapter>

Runs in an environment of its own (requirements.txt); ends with 0 if everything held.
"""

import asyncio
import sys
from typing import Literal

import openai
from openai import AsyncOpenAI, OpenAI
from pydantic import BaseModel, Field

MESSAGES = [{"role": "user", "content": "Hello!"}]
GREEDY = {"temperature": 0, "max_tokens": 12, "extra_body": {"ignore_eos": True}}


def check_chat(client: OpenAI, base: str, adapter: str) -> None:
    texts = {}
    for model in (base, adapter):
        whole = client.chat.completions.create(model=model, messages=MESSAGES, **GREEDY)
        assert whole.model == model and whole.choices[0].finish_reason == "length"
        assert whole.usage.completion_tokens == 12
        stream = client.chat.completions.create(
            model=model,
            messages=MESSAGES,
            stream=True,
            stream_options={"include_usage": True},
            **GREEDY,
        )
        chunks = list(stream)
        text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
        assert text == whole.choices[0].message.content
        assert chunks[-1].usage == whole.usage or chunks[-1].usage.total_tokens > 0
        texts[model] = text
    assert texts[base] != texts[adapter], "the adapter must change what is said"


def check_options(client: OpenAI, base: str) -> None:
    several = client.chat.completions.create(
        model=base, messages=MESSAGES, n=3, seed=5, max_tokens=6, logprobs=True, top_logprobs=2
    )
    assert [c.index for c in several.choices] == [0, 1, 2]
    assert all(len(e.top_logprobs) == 2 for e in several.choices[0].logprobs.content)
    again = client.chat.completions.create(model=base, messages=MESSAGES, n=3, seed=5, max_tokens=6)
    texts = [[c.message.content for c in answer.choices] for answer in (several, again)]
    assert texts[0] == texts[1], "a seed must give the same answers"


def check_completions(client: OpenAI, adapter: str) -> None:
    whole = client.completions.create(
        model=adapter, prompt=["one", "two"], echo=True, logprobs=1, **GREEDY
    )
    assert [c.text[:3] for c in whole.choices] == ["one", "two"]
    assert len(whole.choices[0].logprobs.tokens) == 3 + 12
    assert whole.choices[0].logprobs.token_logprobs[0] is None
    stream = client.completions.create(model=adapter, prompt="one", stream=True, **GREEDY)
    text = "".join(chunk.choices[0].text for chunk in stream)
    assert "one" + text == whole.choices[0].text
    extra = {**GREEDY["extra_body"], "bad_words": [text[0]], "prompt_logprobs": 1}
    changed = client.completions.create(
        model=adapter, prompt="one", **{**GREEDY, "extra_body": extra}
    )
    assert text[0] not in changed.choices[0].text
    scored = changed.choices[0].prompt_logprobs
    assert scored[0] is None and len(scored) == 3
    best = client.completions.create(
        model=adapter, prompt="one", n=2, best_of=5, max_tokens=4, seed=1
    )
    assert len(best.choices) == 2 and best.usage.completion_tokens > 8
    stop = text[4]
    stopped = client.completions.create(model=adapter, prompt="one", stop=stop, **GREEDY)
    assert stopped.choices[0].text == text[: text.index(stop)]
    assert stopped.choices[0].finish_reason == "stop"


def check_embeddings(client: OpenAI, base: str, adapter: str) -> None:
    texts = ["one", "two and three", "one"]
    found = {}
    for model in (base, adapter):
        whole = client.embeddings.create(model=model, input=texts)  # the client asks for base64
        assert [item.index for item in whole.data] == [0, 1, 2]
        assert whole.usage.prompt_tokens == whole.usage.total_tokens > 0
        found[model] = [item.embedding for item in whole.data]
        as_numbers = client.embeddings.create(model=model, input=texts, encoding_format="float")
        for vector, item in zip(found[model], as_numbers.data, strict=True):
            assert max(abs(a - b) for a, b in zip(vector, item.embedding, strict=True)) < 1e-6
            assert abs(sum(value * value for value in vector) - 1) < 1e-5
        assert max(abs(a - b) for a, b in zip(found[model][0], found[model][2], strict=True)) < 1e-5
        short = client.embeddings.create(model=model, input="one", dimensions=8).data[0].embedding
        assert len(short) == 8 and abs(sum(value * value for value in short) - 1) < 1e-5
        assert short[0] * found[model][0][0] > 0
    assert found[base] != found[adapter], "the adapter must change the vectors"
    try:
        client.embeddings.create(model=base, input="one", dimensions=10**6)
    except openai.BadRequestError as caught:
        assert caught.param == "dimensions", caught
    else:
        raise AssertionError("more dimensions than there are were accepted")


class Answer(BaseModel):
    is_good: bool
    count: Literal[1, 22, 333]
    words: list[Literal["ja", "nein"]] = Field(max_length=2)


def check_structured(client: OpenAI, base: str, adapter: str) -> None:
    for model in (base, adapter):
        answer = client.chat.completions.parse(
            model=model, messages=MESSAGES, response_format=Answer, max_tokens=200, temperature=0
        )
        assert isinstance(answer.choices[0].message.parsed, Answer)
        with client.chat.completions.stream(
            model=model, messages=MESSAGES, response_format=Answer, max_tokens=200, n=1, seed=3
        ) as stream:
            final = stream.get_final_completion()
        assert isinstance(final.choices[0].message.parsed, Answer)
    chosen = client.completions.create(
        model=base,
        prompt="one",
        n=4,
        extra_body={"structured_outputs": {"choice": ["yes", "no"]}},
    )
    assert {c.text for c in chosen.choices} <= {"yes", "no"}
    schema = {"type": "object", "properties": {"a": {"not": {}}}}
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    try:
        client.chat.completions.create(model=base, messages=MESSAGES, response_format=wanted)
    except openai.BadRequestError as caught:
        assert "not at /properties/a" in str(caught), caught
    else:
        raise AssertionError("a schema that cannot be enforced was accepted")


class Weather(BaseModel):
    """Tell the weather."""

    city: Literal["Bern", "Oslo"]
    days: list[Literal[1, 7]] = Field(max_length=2)


class Clock(BaseModel):
    """Tell the time."""

    is_utc: bool


def check_tools(client: OpenAI, base: str, adapter: str) -> None:
    tools = [openai.pydantic_function_tool(Weather), openai.pydantic_function_tool(Clock)]
    named = {"type": "function", "function": {"name": "Weather"}}
    for model in (base, adapter):
        given = {"model": model, "tools": tools, "max_tokens": 400, "seed": 5}
        answer = client.chat.completions.parse(messages=MESSAGES, tool_choice=named, **given)
        [choice] = answer.choices
        assert choice.finish_reason == "stop" and choice.message.content is None
        [call] = choice.message.tool_calls
        assert isinstance(call.function.parsed_arguments, Weather)
        results = [{"role": "tool", "tool_call_id": call.id, "content": "rain"}]
        again = client.chat.completions.create(
            messages=[*MESSAGES, choice.message, *results],
            **{**given, "max_tokens": 5},
        )
        assert again.usage.prompt_tokens > answer.usage.prompt_tokens
        check_streamed_call(client, given)


def check_streamed_call(client: OpenAI, given: dict) -> None:
    with client.chat.completions.stream(
        messages=MESSAGES, tool_choice="required", parallel_tool_calls=False, **given
    ) as stream:
        kinds = [event.type for event in stream]
        [choice] = stream.get_final_completion().choices
    assert "tool_calls.function.arguments.delta" in kinds
    assert "tool_calls.function.arguments.done" in kinds
    [call] = choice.message.tool_calls
    assert isinstance(call.function.parsed_arguments, Weather | Clock)
    assert choice.finish_reason == "tool_calls"


def check_responses(client: OpenAI, base: str, adapter: str) -> None:
    fields = {"input": "Hello!", "temperature": 0, "max_output_tokens": 12}
    texts = set()
    for model in (base, adapter):
        whole = client.responses.create(model=model, **fields)
        assert whole.model == model and whole.usage.output_tokens <= 12
        with client.responses.stream(model=model, **fields) as stream:
            *_, last = stream
        assert last.type == f"response.{whole.status}"
        assert last.response.output_text == whole.output_text
        texts.add(whole.output_text)
        parsed = client.responses.parse(
            model=model, input="Hello!", text_format=Answer, max_output_tokens=200, temperature=0
        )
        assert isinstance(parsed.output_parsed, Answer)
    assert len(texts) == 2, "the adapter must change what is said"


def check_models_and_errors(client: OpenAI, base: str, adapter: str) -> None:
    parents = {model.id: model.parent for model in client.models.list()}
    assert parents[base] is None and parents[adapter] == base
    assert client.models.retrieve(adapter).id == adapter
    for call, error, code in (
        ({"model": "nobody"}, openai.NotFoundError, "model_not_found"),
        ({"model": base, "temperature": -1}, openai.BadRequestError, None),
        ({"model": base, "tools": [{"type": "function"}]}, openai.BadRequestError, None),
        ({"model": base, "extra_body": {"nonsense": 1}}, openai.BadRequestError, "unknown_field"),
    ):
        try:
            client.chat.completions.create(messages=MESSAGES, **call)
        except error as caught:
            assert code is None or caught.code == code, caught
        else:
            raise AssertionError(f"{call} was accepted")


async def check_async(url: str, base: str, adapter: str) -> None:
    async with AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as client:

        async def one(model: str) -> str:
            stream = await client.chat.completions.create(
                model=model, messages=MESSAGES, stream=True, **GREEDY
            )
            return "".join([c.choices[0].delta.content or "" async for c in stream])

        texts = await asyncio.gather(*(one(model) for model in (base, adapter) * 4))
        assert len(set(texts[::2])) == len(set(texts[1::2])) == 1, "concurrency changed an answer"


def main() -> None:
    url, base, adapter = f"{sys.argv[1]}/v1", *sys.argv[2:]
    with OpenAI(base_url=url, api_key="none", max_retries=0) as client:
        check_chat(client, base, adapter)
        check_options(client, base)
        check_completions(client, adapter)
        check_embeddings(client, base, adapter)
        check_structured(client, base, adapter)
        check_tools(client, base, adapter)
        check_responses(client, base, adapter)
        check_models_and_errors(client, base, adapter)
    asyncio.run(check_async(url, base, adapter))


if __name__ == "__main__":
    main()

"""pydantic-ai's agents against a running server, by way of chat and of responses.

check.py <url> <base model> <adapter>
"""

import asyncio
import sys
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field
from pydantic_ai import Agent, NativeOutput, ToolOutput
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider

ENDLESS = {"extra_body": {"ignore_eos": True}}
ROOM = 3000  # tokens: random weights write as many spaces between JSON's tokens as they may


class Answer(BaseModel):
    """What a customer wants. Random weights would add fields without end if they might."""

    model_config = ConfigDict(extra="forbid")

    is_good: bool
    count: Literal[1, 22, 333]
    words: list[Literal["ja", "nein"]] = Field(max_length=2)


async def check_text(kind: type, provider: OpenAIProvider, base: str, adapter: str) -> None:
    texts = {}
    for model in (base, adapter):
        agent = Agent(
            kind(model, provider=provider), system_prompt="Be brief.", instructions="Be kind."
        )
        settings = {"temperature": 0, "max_tokens": 16, **ENDLESS}
        whole = await agent.run("Hello!", model_settings=settings)
        assert whole.output and whole.usage.output_tokens == 16
        async with agent.run_stream("Hello!", model_settings=settings) as stream:
            parts = [part async for part in stream.stream_text(delta=True, debounce_by=None)]
        assert "".join(parts) == whole.output and len(parts) > 1
        texts[model] = whole.output
    assert texts[base] != texts[adapter], "the adapter must change what is said"


async def check_outputs(kind: type, provider: OpenAIProvider, model: str) -> None:
    settings = {"temperature": 0, "max_tokens": ROOM}
    for output in (Answer, ToolOutput(Answer), NativeOutput(Answer)):
        agent = Agent(kind(model, provider=provider), output_type=output, retries=0)
        whole = await agent.run("Is it good?", model_settings=settings)
        assert isinstance(whole.output, Answer), output
        async with agent.run_stream("Is it good?", model_settings=settings) as stream:
            assert await stream.get_output() == whole.output, output


async def check_tools(kind: type, provider: OpenAIProvider, model: str) -> None:
    """The model must call one tool or the other; the run goes on until it is the output's."""
    cities = []
    agent = Agent(kind(model, provider=provider), output_type=Answer, retries=0)

    @agent.tool_plain
    def weather(city: Literal["Rome", "Oslo"]) -> str:
        """Forecast the weather."""
        cities.append(city)
        return f"sun in {city}"

    for seed in range(20):
        settings = {"temperature": 1, "seed": seed, "max_tokens": ROOM}
        result = await agent.run("What is the weather?", model_settings=settings)
        assert isinstance(result.output, Answer)
        if cities:
            return
    raise AssertionError("the tool was never called")


async def main() -> None:
    url, base, adapter = f"{sys.argv[1]}/v1", *sys.argv[2:]
    provider = OpenAIProvider(base_url=url, api_key="none")
    await check_text(OpenAIChatModel, provider, base, adapter)
    for kind in (OpenAIChatModel, OpenAIResponsesModel):
        for model in (base, adapter):
            await check_outputs(kind, provider, model)
            await check_tools(kind, provider, model)


if __name__ == "__main__":
    asyncio.run(main())

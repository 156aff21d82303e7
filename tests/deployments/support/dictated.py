"""A model that answers what it is told to: what stands behind the last `SAY:` of its prompt."""

import json
from dataclasses import replace
from typing import Any

from deployments.config_sections import IngressSection
from engine.messages import GenerateRequest
from tests.deployments.support.fakes import EOS, INFO, Answered, FakeEngine, encode
from tests.deployments.support.tool_templates import template_of

SAY = "SAY:"
END = "<|end|>"  # of a message in the templates
# The template shows what it is told of reasoning, and its tags say how reasoning is written.
THINKING = (
    "{# <think> </think> #}"
    "{% if enable_thinking is defined %}[thinking {{ enable_thinking }}]{% endif %}"
    + template_of("hermes").replace(
        "<|assistant|>\n", "<|assistant|>{{ m.reasoning_content or '' }}|", 1
    )
)
SETTINGS = IngressSection(max_body_bytes=2**20)
CALL = '<tool_call>\n{"name": "stock_of", "arguments": {"item": "te\\"a", "n": 3}}\n</tool_call>'
OTHER = '<tool_call>\n{"name": "price_of", "arguments": {}}\n</tool_call>'


def say(request: GenerateRequest) -> list[int]:
    prompt = bytes(i for i in request.prompt_token_ids if i < 256).decode()
    return [*encode(prompt.rpartition(SAY)[2].partition(END)[0]), EOS]


class Mortal(FakeEngine):
    """Dies at the end of an answer that has a certain word in it."""

    def __init__(self, word: str) -> None:
        super().__init__(say)
        self._word = word

    def step(self) -> None:
        super().step()
        for request in self.requests[-1:]:
            answer = bytes(say(request)[:-1]).decode()
            live = self._live.get(request.request_id)
            if live is not None and self._word in answer[: live.num_sent]:
                self.die()


def dictated(dies_at: str | None = None) -> FakeEngine:
    engine = FakeEngine(say) if dies_at is None else Mortal(dies_at)
    engine.info = replace(INFO, max_model_len=8192, vocab_size=300)
    return engine


def prompt_of(request: GenerateRequest) -> str:
    return bytes(i for i in request.prompt_token_ids if i < 256).decode()


def named_events(answer: Answered) -> list[tuple[str, Any]]:
    """The events of a stream as (name, data). Comments are left out."""
    found: list[tuple[str, Any]] = []
    *parts, rest = answer.body.decode().split("\n\n")
    assert rest == ""
    for part in parts:
        if part.startswith(":"):
            continue
        name, data = part.split("\n")
        found.append((name.removeprefix("event: "), json.loads(data.removeprefix("data: "))))
    return found

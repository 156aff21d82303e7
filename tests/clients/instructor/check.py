"""instructor in three of its modes against a running server.

check.py <url> <base model> <adapter>
"""

import sys
from typing import Literal

import instructor
from openai import OpenAI
from pydantic import BaseModel, ConfigDict, Field

# What forces the answer's form. The others only ask for it, which random weights do not heed.
FORCED = (instructor.Mode.TOOLS, instructor.Mode.JSON_SCHEMA)
# Random weights would write spaces, texts and, where a schema allows any, fields without end. Their
# tokens are bytes: these biases leave out the spaces, and end the texts and objects.
TERSE = {"9": -100, "10": -100, "13": -100, "32": -100, "34": 100, "125": 90}
QUESTION = [{"role": "user", "content": "Is it good?"}]


class Answer(BaseModel):
    """What a customer wants. Random weights would add fields without end if they might."""

    model_config = ConfigDict(extra="forbid")

    is_good: bool
    count: Literal[1, 22, 333]
    words: list[Literal["ja", "nein"]] = Field(max_length=2)


def check_forced(url: str, model: str, mode: instructor.Mode) -> None:
    client = instructor.from_openai(OpenAI(base_url=url, api_key="none", max_retries=0), mode=mode)
    fixed = {"model": model, "messages": QUESTION, "temperature": 0, "max_tokens": 400}
    fixed["logit_bias"] = TERSE
    answer, completion = client.chat.completions.create_with_completion(
        response_model=Answer, max_retries=0, **fixed
    )
    assert isinstance(answer, Answer) and completion.usage.completion_tokens > 5
    *_, last = client.chat.completions.create_partial(response_model=Answer, max_retries=0, **fixed)
    Answer.model_validate(last.model_dump())  # it may differ: a schema of its own was asked for


def check_asked(url: str, model: str) -> None:
    """MD_JSON is a prompt, and JSON in a fence: held to it by a grammar of the caller's."""
    client = instructor.from_openai(
        OpenAI(base_url=url, api_key="none", max_retries=0), mode=instructor.Mode.MD_JSON
    )
    fence = r'\{"is_good": (true|false), "count": (1|22|333), "words": \[("ja", )?"nein"\]\}\n'
    answer = client.chat.completions.create(
        model=model,
        messages=QUESTION,
        temperature=0,
        max_tokens=400,
        max_retries=0,
        response_model=Answer,
        extra_body={"structured_outputs": {"regex": fence + "```"}},
    )
    assert isinstance(answer, Answer)


def main() -> None:
    url, *models = f"{sys.argv[1]}/v1", *sys.argv[2:]
    for model in models:
        for mode in FORCED:
            check_forced(url, model, mode)
        check_asked(url, model)


if __name__ == "__main__":
    main()

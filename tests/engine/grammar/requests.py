"""Makes requests under grammars, whose answers two ways of computing must agree on."""

import random
from typing import Any

from engine.messages import GenerateRequest
from engine.scheduler.request import SamplingParams
from tests.engine.grammar.test_random_schemas import random_schema
from tests.engine.support.driver import prompt_of
from tests.engine.support.grammars import of_schema

NAME = "a_name_that_is_long"


def random_request(number: int, dice: random.Random, longest: int) -> GenerateRequest:
    """Make a request of at most so many tokens, whose grammar forces long names, and that any rule
    may end or steer."""
    schema = random_schema(dice)
    if dice.random() < 0.5:
        schema = {"type": "object", "properties": {NAME: schema}, "required": [NAME]}
        schema["additionalProperties"] = False
    max_tokens = dice.choice([4, 12, 25, longest])
    rules: dict[str, Any] = {}
    for chance, rule in (
        (0.3, {"temperature": 0.0}),
        (0.2, {"stop_token_ids": (ord(dice.choice("_lg,]0")),)}),
        (0.2, {"min_tokens": dice.randint(0, max_tokens)}),
        (0.2, {"logprobs": 2}),
        (0.2, {"repetition_penalty": 1.3, "frequency_penalty": 0.5}),
        (0.2, {"logit_bias": ((ord("_"), -100.0), (ord("a"), 5.0))}),
        (0.2, {"bad_words": ((ord("_"),), tuple(b"tha"))}),
    ):
        rules |= rule if dice.random() < chance else {}
    sampling = SamplingParams(
        max_tokens=max_tokens, seed=number, grammar=of_schema(schema), **rules
    )
    return GenerateRequest(f"r{number}", prompt_of(3 + number % 9), sampling, n=1 + number % 2)

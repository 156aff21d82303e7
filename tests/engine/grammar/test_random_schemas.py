"""Random schemas, of several adapters in one batch: jsonschema judges every output."""

import json
import random
from pathlib import Path
from typing import Any

import jsonschema

from engine.engine import Engine
from engine.messages import GenerateRequest
from engine.scheduler.request import SamplingParams
from tests.engine.grammar.test_grammar_engine import text_of
from tests.engine.support.driver import prompt_of, write_mixed_adapters
from tests.engine.support.grammars import of_schema, run_all

NUM_SCHEMAS = 40
FORMATS = ("date", "time", "ipv4", "uuid", "email")
WORDS = ("name", "na", "me", "é", 'quo"te', "new\nline", "12")


def random_schema(dice: random.Random, depth: int = 0) -> dict[str, Any]:
    """Make a schema whose values are short, so that a random model comes to their end."""
    leaves = [_enum, _integer, _number, _string, _formatted, _plain]
    inner = [_array, _tuple, _object, _any_of, _all_of]
    return dice.choice(leaves if depth > 2 else [*leaves, *inner, *inner])(dice, depth + 1)


def _enum(dice: random.Random, depth: int) -> dict[str, Any]:
    values: list[Any] = [*WORDS, None, True, 0, -1.5, [], {"a": [1]}]
    if dice.random() < 0.3:
        return {"const": dice.choice(values)}
    return {"enum": dice.sample(values, dice.randint(1, 4))}


def _integer(dice: random.Random, depth: int) -> dict[str, Any]:
    low = dice.randint(-200, 200)
    schema: dict[str, Any] = {"type": "integer", "minimum": low, "exclusiveMaximum": low + 99}
    return schema | ({"multipleOf": dice.choice([2, 3, 7])} if dice.random() < 0.5 else {})


def _number(dice: random.Random, depth: int) -> dict[str, Any]:
    low = dice.choice([-1.5, 0, 0.25, 10])
    return {"type": "number", "minimum": low, "maximum": low + 1, "multipleOf": 0.25}


def _string(dice: random.Random, depth: int) -> dict[str, Any]:
    if dice.random() < 0.5:
        return {"type": "string", "pattern": dice.choice(["^[a-c]{1,4}$", r"^\d{2}[^\d]é?$"])}
    least = dice.randint(0, 3)
    return {"type": "string", "minLength": least, "maxLength": least + dice.randint(0, 4)}


def _formatted(dice: random.Random, depth: int) -> dict[str, Any]:
    return {"type": "string", "format": dice.choice(FORMATS), "maxLength": 40}


def _plain(dice: random.Random, depth: int) -> dict[str, Any]:
    return {"type": dice.choice([["boolean", "null"], "boolean", "null"])}


def _array(dice: random.Random, depth: int) -> dict[str, Any]:
    least = dice.randint(0, 1)
    schema = {"type": "array", "items": random_schema(dice, depth)}
    return schema | {"minItems": least, "maxItems": least + dice.randint(0, 2)}


def _tuple(dice: random.Random, depth: int) -> dict[str, Any]:
    parts = [random_schema(dice, depth) for _ in range(dice.randint(1, 3))]
    return {"type": "array", "prefixItems": parts, "items": False, "minItems": len(parts) - 1}


def _object(dice: random.Random, depth: int) -> dict[str, Any]:
    names = dice.sample(WORDS, dice.randint(0, 3))
    return {
        "type": "object",
        "properties": {name: random_schema(dice, depth) for name in names},
        "required": [name for name in names if dice.random() < 0.6],
        "additionalProperties": False,
    }


def _any_of(dice: random.Random, depth: int) -> dict[str, Any]:
    return {"anyOf": [random_schema(dice, depth), random_schema(dice, depth)]}


def _all_of(dice: random.Random, depth: int) -> dict[str, Any]:
    low = dice.randint(0, 20)
    return {"allOf": [{"type": "integer", "minimum": low}, {"maximum": low + 30, "minimum": 5}]}


def test_outputs_of_random_schemas_are_valid(engine: Engine, tmp_path: Path) -> None:
    dice = random.Random(5)
    schemas = [random_schema(dice) for _ in range(NUM_SCHEMAS)]
    adapters = [None, *write_mixed_adapters(Path(engine.config.source), tmp_path)]
    requests = [
        GenerateRequest(
            f"r{i}",
            prompt_of(4 + i % 9, i),
            SamplingParams(max_tokens=400, temperature=1.2, seed=i, grammar=of_schema(schema)),
            adapter_folder=adapters[i % len(adapters)],
        )
        for i, schema in enumerate(schemas)
    ]
    results = run_all(engine, requests)
    for i, schema in enumerate(schemas):
        last = results[f"r{i}", 0].last
        assert last is not None and last.finish_reason == "stop", (schema, last)
        jsonschema.validate(
            json.loads(text_of(results[f"r{i}", 0])),
            schema,
            format_checker=jsonschema.FormatChecker(),
        )

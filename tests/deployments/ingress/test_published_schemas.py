"""Schemas that others have published: whatever their grammar allows, jsonschema calls valid.

They are those of Kubernetes' API, as the package `kubernetes-validate` ships them.
"""

import json
import random
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
from llguidance import LLMatcher, LLTokenizer

from deployments.ingress.structured.constraint import Constraint, ConstraintRefused, to_grammar
from tests.deployments.ingress.test_forced_calls import walk
from tests.deployments.ingress.test_structured_output import byte_table

FOLDER = Path(kubernetes_validate.__file__).parent / "kubernetes-json-schema"
VERSION = "v1.37.0-local-strict"
DEFINITIONS = "_definitions.json"
FEW = 60
ENDS = [[byte] for byte in b'"}]"}]']


@cache
def definitions() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((FOLDER / VERSION / DEFINITIONS).read_text())
    return found["$defs"]


def names() -> list[str]:
    paths = sorted((FOLDER / VERSION).glob("*-v1.json"))
    return [path.name for path in paths]


def refs_in(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        if isinstance(value.get("$ref"), str):
            yield value["$ref"].rpartition("/")[2]
        for inner in value.values():
            yield from refs_in(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from refs_in(inner)


def whole(name: str) -> dict[str, Any]:
    """Bring what a schema refers to in other files into it."""
    schema: dict[str, Any] = json.loads((FOLDER / VERSION / name).read_text())
    needed: dict[str, Any] = {}
    waiting = list(refs_in(schema))
    while waiting:
        each = waiting.pop()
        if each not in needed:
            needed[each] = definitions()[each]
            waiting.extend(refs_in(needed[each]))
    text = json.dumps({**schema, "$defs": needed})
    return json.loads(text.replace(f"/api/{DEFINITIONS}#", "#"))


def check(table: LLTokenizer, name: str, num_walks: int) -> int | None:
    """Count the walks that have ended, all right. None if the schema is refused."""
    schema = whole(name)
    try:
        grammar = to_grammar(Constraint("json", schema, "s")).text
    except ConstraintRefused as error:
        assert "cannot be enforced" in str(error) or "at most" in str(error), error
        return None
    error = LLMatcher(table, grammar, log_level=0).get_error()
    if error:
        assert "oneOf" in error, error  # its parts do not exclude each other
        return None
    num_ended = 0
    for number in range(num_walks):
        drawn = walk(table, grammar, ENDS, random.Random(f"{name}{number}"))
        if drawn is not None:
            num_ended += 1
            document = json.loads(bytes(drawn).decode())
            jsonschema.Draft202012Validator(schema).validate(document)
    return num_ended


def judge(chosen: list[str], num_walks: int) -> None:
    table = byte_table()
    found = [check(table, name, num_walks) for name in chosen]
    taken = [ended for ended in found if ended is not None]
    print(f"{len(taken)} of {len(found)} schemas, {sum(taken)} of {len(taken) * num_walks} walks")
    assert len(taken) > 0.3 * len(found)
    assert sum(taken) > 0.3 * len(taken) * num_walks


def test_walks_through_some_published_schemas_are_valid() -> None:
    judge(random.Random(1).sample(names(), FEW), 1)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_walks_through_all_published_schemas_are_valid() -> None:
    judge(names(), 3)

"""Makes grammars, and runs engines on requests that have some."""

import json
import time
from typing import Any

from engine.engine import Engine
from engine.messages import GenerateRequest
from tests.engine.support.driver import Result, finish

SPACES = {"whitespace_pattern": "[ ]{0,1}"}


def of_schema(schema: dict[str, Any]) -> str:
    return json.dumps({"grammars": [{"json_schema": {"x-guidance": SPACES, **schema}}]})


def of_lark(lark: str) -> str:
    return json.dumps({"grammars": [{"lark_grammar": lark}]})


def of_choices(*choices: str) -> str:
    return of_lark("start: " + " | ".join(json.dumps(choice) for choice in choices))


def of_regex(regex: str) -> str:
    return of_lark(f"start: /{regex}/")


def run_all(engine: Engine, requests: list[GenerateRequest]) -> dict[tuple[str, int], Result]:
    """Run requests whose grammars may have to be compiled first."""
    for request in requests:
        engine.add_request(request)
    wait_for_grammars(engine)
    return finish(engine)


def wait_for_grammars(engine: Engine, timeout_s: float = 60.0) -> None:
    """Wait, without a step, until every grammar that was asked for is ready or refused."""
    assert engine.grammars is not None
    deadline_s = time.monotonic() + timeout_s
    cache = engine.grammars._cache
    while any(e.verdict is None for e in cache._entries.values()):
        assert time.monotonic() < deadline_s, "a grammar is never compiled"
        time.sleep(0.002)
        engine._poll_grammars(engine.grammars)

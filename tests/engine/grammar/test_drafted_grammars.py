"""Drafts under a grammar: the answers are those of sampling each token."""

import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from engine.config import SpeculationConfig
from engine.engine import Engine
from engine.scheduler.request import Request
from tests.engine.grammar.requests import random_request
from tests.engine.support.byte_model import EOS, byte_tokenizer, write_byte_model
from tests.engine.support.drafters import Seer, eager
from tests.engine.support.driver import Result, make_engine
from tests.engine.support.grammars import run_all

END: int = byte_tokenizer().token_to_id(EOS)  # type: ignore[assignment]
NGRAM = SpeculationConfig("ngram", 8)
FORMS: dict[str, dict[str, Any]] = {
    "torch": {},
    "native": {"dtype": "bfloat16", "block_size": 16, "memory_bytes": 2**21},
}


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Engine]]:
    """Make engines of a model with two end tokens; they are closed in the end."""
    folder = write_byte_model(tmp_path_factory.mktemp("two"), eos_token_id=[END, END + 2]).folder
    engines: list[Engine] = []

    def make(**changes: Any) -> Engine:
        engines.append(make_engine(folder, **{"max_model_len": 64, **changes}))
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()


def answers(results: dict[tuple[str, int], Result]) -> dict[tuple[str, int], tuple[Any, ...]]:
    """Return tokens and how they ended; errors are those of requests whose rules leave nothing."""
    found: dict[tuple[str, int], tuple[Any, ...]] = {}
    for key, result in results.items():
        last = result.last
        assert last is not None and len(result.logprobs) in (0, len(result.token_ids))
        found[key] = (result.token_ids, last.finish_reason, last.stop_token_id, last.error)
    return found


def compare(plain: Engine, drafting: Engine, seed: int, num: int) -> None:
    dice = random.Random(seed)
    requests = [random_request(number, dice, 50) for number in range(num)]
    expected = run_all(plain, requests)

    def known(request: Request) -> list[int]:
        return expected[request.key].token_ids

    drafting.scheduler.speculation = eager(Seer(known, 7), 8, 64)
    before = drafting.stats
    assert answers(run_all(drafting, requests)) == answers(expected)
    assert drafting.stats.total_accepted_tokens > before.total_accepted_tokens


def test_drafts_change_no_structured_answer(make: Callable[..., Engine]) -> None:
    """With few tokens in a step, and too little memory for all."""
    tight = {"max_num_batched_tokens": 32, "memory_bytes": 80_000}
    drafting = make(speculation=NGRAM, **tight)
    compare(make(), drafting, 7, 16)


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_drafts_change_none_of_many_structured_answers(
    make: Callable[..., Engine], form: str
) -> None:
    plain, drafting = make(**FORMS[form]), make(speculation=NGRAM, **FORMS[form])
    for seed in range(12):
        compare(plain, drafting, seed, 32)

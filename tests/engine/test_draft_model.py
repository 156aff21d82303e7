"""A smaller model guesses: the answers are those without it."""

import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from engine.config import ConfigError, SpeculationConfig
from engine.engine import Engine
from engine.messages import AdapterFolder, GenerateRequest
from engine.scheduler.request import SamplingParams
from tests.engine.support.byte_model import write_byte_model
from tests.engine.support.drafters import eager
from tests.engine.support.driver import make_engine, prompt_of, run, write_mixed_adapters

FORMS: dict[str, dict[str, Any]] = {
    "torch": {},
    "native": {"dtype": "bfloat16", "block_size": 16, "memory_bytes": 2**21},
    "tight": {"max_num_batched_tokens": 16, "memory_bytes": 300_000},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two models, the second with random weights of its own."""
    root = tmp_path_factory.mktemp("models")
    return write_byte_model(root / "a").folder, write_byte_model(root / "b", seed=7).folder


@pytest.fixture
def make(folders: tuple[Path, Path]) -> Iterator[Callable[..., Engine]]:
    engines: list[Engine] = []

    def make(draft: Path | None = None, **changes: Any) -> Engine:
        if draft is not None:
            changes["speculation"] = SpeculationConfig("draft", 5, model=str(draft))
        engines.append(make_engine(folders[0], **{"max_model_len": 96, **changes}))
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()


def requests_of(adapters: list[AdapterFolder], num: int) -> list[GenerateRequest]:
    dice, own = random.Random(3), [None, *adapters]
    rules: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"logprobs": 2, "top_p": 0.9},
        {"repetition_penalty": 1.2, "min_tokens": 1},
    ]
    return [
        GenerateRequest(
            f"r{i}",
            prompt_of(3 + dice.randrange(40), i),
            SamplingParams(max_tokens=dice.choice([1, 7, 30]), seed=i, **rules[i % 3]),
            adapter_folder=own[i % len(own)],
            n=1 + i % 2,
        )
        for i in range(num)
    ]


def use_all_drafts(engine: Engine) -> None:
    assert engine.draft_model is not None
    engine.scheduler.speculation = eager(engine.draft_model, 5, engine.settled.max_model_len)


@pytest.mark.parametrize(
    ("form", "number"),
    [
        pytest.param(
            form,
            number,
            id=f"{form}-{'another' if number else 'itself'}",
            marks=() if (form, number) in (("native", 0), ("tight", 1)) else pytest.mark.slow,
        )
        for form in FORMS
        for number in (0, 1)
    ],
)
def test_a_draft_model_changes_no_token(
    folders: tuple[Path, Path], make: Callable[..., Engine], tmp_path: Path, form: str, number: int
) -> None:
    requests = requests_of(write_mixed_adapters(folders[0], tmp_path / "adapters"), 9)
    plain = make(**{k: v for k, v in FORMS[form].items() if k != "memory_bytes"})
    expected = run(plain, requests)
    engine = make(folders[number], **FORMS[form])
    use_all_drafts(engine)
    found = run(engine, requests)
    for key, result in expected.items():
        assert found[key].token_ids == result.token_ids, key
    stats, draft = engine.stats, engine.draft_model
    assert stats.total_drafted_tokens > 50
    assert draft is not None and (number or stats.total_accepted_tokens > 10)
    assert draft.draft([]) == [] and len(draft._free) == len(set(draft._free))
    assert not draft._known, "blocks of ended requests are held"


def test_what_is_guessed_greedily_by_the_same_model_is_all_right(
    folders: tuple[Path, Path], make: Callable[..., Engine]
) -> None:
    """Over a prompt of several pieces; all in one batch."""
    engine = make(folders[0], max_num_batched_tokens=16)
    use_all_drafts(engine)
    sampling = SamplingParams(max_tokens=30, temperature=0.0, ignore_eos=True)
    run(engine, [GenerateRequest(f"{i}", prompt_of(20 + 9 * i, i), sampling) for i in range(4)])
    stats = engine.stats
    assert stats.total_accepted_tokens == stats.total_drafted_tokens > 60


def test_memory_is_divided_such_that_both_hold_as_many_tokens(
    folders: tuple[Path, Path], make: Callable[..., Engine]
) -> None:
    engine, plain = make(folders[1], memory_bytes=400_000), make(memory_bytes=400_000)
    assert engine.draft_model is not None
    num_draft_blocks = len(engine.draft_model._free)
    assert abs(engine.info.num_blocks - num_draft_blocks) <= 1
    assert engine.info.num_blocks <= plain.info.num_blocks // 2
    assert engine.info.weight_bytes == 2 * plain.info.weight_bytes


def test_both_models_compute_with_the_same_threads(
    make: Callable[..., Engine], folders: tuple[Path, Path]
) -> None:
    def added(draft: Path | None) -> int:
        before = len(os.listdir("/proc/self/task"))
        make(draft, num_threads=4, **FORMS["native"])
        return len(os.listdir("/proc/self/task")) - before

    assert added(folders[1]) == added(None) >= 3


def test_a_draft_model_with_another_vocabulary_is_refused(
    folders: tuple[Path, Path], make: Callable[..., Engine], tmp_path: Path
) -> None:
    other = write_byte_model(tmp_path).folder
    path = other / "tokenizer.json"
    text = path.read_text()
    path.write_text(text.replace('"null"', '"nil"'))
    with pytest.raises(ConfigError, match=r"vocabularies differ: token 'n(ul|i)l' is"):
        make(other)
    path.unlink()
    with pytest.raises(ConfigError, match=r"tokenizer.json' is not there"):
        make(other)


def test_a_draft_model_and_its_method_belong_together() -> None:
    for method, model in (("draft", None), ("ngram", "folder")):
        with pytest.raises(ConfigError, match=r"speculation\.model="):
            SpeculationConfig(method, model=model)

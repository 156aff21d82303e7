"""Tests outputs without bad words, and of allowed tokens alone, against transformers."""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from engine.messages import GenerateRequest
from engine.scheduler.request import SamplingParams
from tests.engine.support.driver import (
    generate,
    greedy,
    make_engine,
    prompt_of,
    run,
    texts,
    write_adapter,
)
from tests.engine.support.tiny import Tiny

LENGTHS = (3, 17, 30)


@pytest.fixture(scope="module")
def tiny(tiny_model: Callable[..., Tiny]) -> Tiny:
    return tiny_model()


@torch.inference_mode()
def constrained(model: PreTrainedModel, prompt: list[int], **how: object) -> list[int]:
    output = model.generate(
        input_ids=torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        max_new_tokens=24,
        do_sample=False,
        **how,
    )
    return output[0, len(prompt) :].tolist()


def bad_words_of(tiny: Tiny, prompt: list[int]) -> tuple[tuple[int, ...], ...]:
    """Take words of one to four tokens from what is said without any."""
    words: list[tuple[int, ...]] = []
    for length in (1, 2, 3, 4):
        start = 3 * length - 2
        said = constrained(tiny.reference, prompt, bad_words_ids=[*map(list, words)] or None)
        words.append(tuple(said[start : start + length]))
    return tuple(words)


def test_greedy_text_without_bad_words_is_that_of_transformers(tiny: Tiny) -> None:
    assert tiny.reference.generation_config is not None
    tiny.reference.generation_config.eos_token_id = None
    prompts = {f"r{n}": prompt_of(n, seed=n) for n in LENGTHS}
    words = {name: bad_words_of(tiny, prompt) for name, prompt in prompts.items()}
    requests = [
        GenerateRequest(name, prompt, greedy(24, bad_words=words[name]))
        for name, prompt in prompts.items()
    ]
    free = [GenerateRequest(f"free{n}", prompt_of(n, seed=n), greedy(24)) for n in LENGTHS]
    found = texts(run(make_engine(tiny.folder), [*requests, *free]))
    for name, prompt in prompts.items():
        said = found[name, 0]
        asked = [list(word) for word in words[name]]
        assert said == constrained(tiny.reference, prompt, bad_words_ids=asked)
        assert said != generate(tiny.reference, prompt, 24) == found[name.replace("r", "free"), 0]


def test_greedy_text_of_allowed_tokens_is_that_of_transformers(tiny: Tiny) -> None:
    assert tiny.reference.generation_config is not None
    tiny.reference.generation_config.eos_token_id = None
    allowed = tuple(range(7, 200, 11))
    sampling = greedy(24, allowed_token_ids=allowed)
    requests = [GenerateRequest(f"r{n}", prompt_of(n, seed=n), sampling) for n in LENGTHS]
    found = texts(run(make_engine(tiny.folder), requests))
    for request in requests:
        assert found[request.request_id, 0] == constrained(
            tiny.reference,
            request.prompt_token_ids,
            prefix_allowed_tokens_fn=lambda *_: list(allowed),
        )


def test_sampled_answers_obey_them_too_with_an_adapter_and_several_choices(
    tiny: Tiny, tmp_path: Path
) -> None:
    allowed, words = (5, 6, 7, 8), ((5,), (6, 7), (7, 7, 8))
    adapter = write_adapter(tiny.folder, tmp_path / "a")
    sampling = SamplingParams(
        max_tokens=60, temperature=3.0, allowed_token_ids=allowed, bad_words=words, ignore_eos=True
    )
    request = GenerateRequest("r", prompt_of(9), sampling, n=4, adapter_folder=adapter)
    found = texts(run(make_engine(tiny.folder, max_num_batched_tokens=16), [request]))
    assert len({tuple(said) for said in found.values()}) == 4
    for said in found.values():
        assert set(said) == {6, 7, 8}
        assert (6, 7) not in pairwise(said)
        assert (7, 7, 8) not in zip(said, said[1:], said[2:], strict=False)


def test_logprobs_are_those_before_tokens_were_forbidden(tiny: Tiny) -> None:
    prompt = prompt_of(12)
    [first, *_] = generate(tiny.reference, prompt, 1)
    request = GenerateRequest("r", prompt, greedy(1, bad_words=((first,),), logprobs=1))
    allowed = GenerateRequest("a", prompt, greedy(1, allowed_token_ids=(3, 4), logprobs=1))
    results = run(make_engine(tiny.folder), [request, allowed])
    for name in "ra":
        [entry] = results[name, 0].logprobs
        assert entry.top[0][0] == first and entry.logprob < entry.top[0][1]

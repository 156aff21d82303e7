"""Tests adapters that are more than A and B on native kernels against peft, in mixed batches."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.backends.native import load
from engine.backends.native.library import Context
from engine.messages import AdapterFolder, GenerateRequest
from tests.engine.support.driver import Result, greedy, make_engine, prompt_of, run
from tests.engine.support.kinds import load_with_peft, write_kinds
from tests.engine.support.tiny import VOCAB_SIZE, write_tiny
from tests.engine.test_kinds_against_peft import KINDS, VOCABULARY

ROWS, FEWER = VOCAB_SIZE + 5, VOCAB_SIZE - 37
# One of each way to change the embedding and the output layer; in the default run, of untied ones.
OF_VOCABULARY = {
    name: VOCABULARY[name]
    for name in ("dora-on-both", "bias-on-head", "saved-head", "saved-embedding", "tokens")
} | {
    "resized": {
        "vocab_size": ROWS,
        "target_modules": ["embed_tokens", "lm_head"],
        "use_dora": True,
    },
    "smaller": {"vocab_size": FEWER, "target_modules": ["embed_tokens", "lm_head"]},
}
OF_HEAD = {name: OF_VOCABULARY[name] for name in ("dora-on-both", "saved-head", "smaller")}
CASES: dict[str, tuple[dict[str, dict[str, Any]], dict[str, Any]]] = {
    "layers": (KINDS, {"model_type": "qwen2"}),
    "vocabulary": (OF_VOCABULARY, {}),
    "tied": (VOCABULARY, {"tie_word_embeddings": True}),
}
PARAMS = ["layers", "vocabulary", pytest.param("tied", marks=pytest.mark.slow)]
Results = dict[tuple[str, int], Result]


class Case:
    """A base, an adapter of each kind, and requests for all of them."""

    def __init__(self, folder: Path, kinds: dict[str, dict[str, Any]], **base: Any) -> None:
        self.base = write_tiny(folder / "base", **base).folder
        self.adapters = write_kinds(self.base, folder, kinds)
        self.requests = [
            GenerateRequest(
                name,
                prompt_for(adapter, 89 + 5 * i, seed=i),
                greedy(20, logprobs=1, prompt_logprobs=0),
                adapter_folder=adapter,
            )
            for i, (name, adapter) in enumerate(self.adapters.items())
        ]

    def run(self, times: int = 1, **changes: Any) -> Results:
        engine = make_engine(self.base, dtype="bfloat16", block_size=16, **changes)
        assert engine.info.kernels.startswith(("native-", changes.get("kernels", "native-")))
        for _ in range(times):
            results = run(engine, self.requests)
        return results

    @torch.inference_mode()
    def error(self, results: Results, name: str) -> float:
        """Return the root of the mean square error of the prompt's log probabilities."""
        (request,) = (r for r in self.requests if r.request_id == name)
        prompt, first = request.prompt_token_ids, results[name, 0].first
        assert first is not None and first.prompt_logprobs is not None, first
        model = load_with_peft(self.base, self.adapters[name])
        exact = model(torch.tensor([prompt])).logits[0].log_softmax(-1)
        wanted = exact[torch.arange(len(prompt) - 1), prompt[1:]]
        found = torch.tensor([entry.logprob for entry in first.prompt_logprobs[1:] if entry])
        return float((found - wanted).square().mean().sqrt())


def prompt_for(adapter: AdapterFolder | None, length: int, seed: int) -> list[int]:
    """Make a prompt that ends with the last token of an adapter that has another number of them."""
    if adapter is None or not adapter.vocab_size:
        return [*prompt_of(length, seed=seed), 7]
    last = adapter.vocab_size - 1
    return [*(min(token_id, last) for token_id in prompt_of(length, seed=seed)), last]


@pytest.fixture(scope="module", params=PARAMS)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    kinds, base = CASES[request.param]
    return Case(tmp_path_factory.mktemp(request.param), kinds, **base)


@pytest.fixture(scope="module")
def by_torch(case: Case) -> Results:
    return case.run(kernels="torch")


@pytest.fixture(autouse=True)
def only_this_isa(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "Context", partial(Context, isa))


def test_each_kind_is_as_accurate_as_torchs_bfloat16(case: Case, by_torch: Results) -> None:
    """Over all kinds; of one, the roundings of a hundred tokens make more of a difference."""
    results = case.run()
    native = torch.tensor([case.error(results, name) for name in case.adapters])
    torchs = torch.tensor([case.error(by_torch, name) for name in case.adapters])
    assert native.norm() < 1.25 * torchs.norm() + 1e-3
    assert (native < 2 * torchs + 1e-3).all(), (native, torchs)


def test_no_kinds_bits_depend_on_batch_mates_steps_or_the_prefix_cache(case: Case) -> None:
    wanted = answers(case.run(max_num_seqs=1, enable_prefix_caching=False))
    assert answers(case.run(times=2)) == wanted
    assert answers(case.run(times=2, max_num_batched_tokens=16)) == wanted


@pytest.mark.parametrize("head", [{"tie_word_embeddings": True}, {}], ids=["tied", "untied"])
def test_adapters_change_an_int8_output_layer_as_they_do_the_bases_own(
    head: dict[str, Any], tmp_path: Path
) -> None:
    case = Case(tmp_path, OF_HEAD, **head)
    wanted = answers(case.run(output_layer="int8", max_num_seqs=1, enable_prefix_caching=False))
    results = case.run(times=2, output_layer="int8", max_num_batched_tokens=16)
    assert answers(results) == wanted
    own = case.run()
    assert answers(own)["dora-on-both", 0] != wanted["dora-on-both", 0]
    for name in case.adapters:
        rounded, exact = case.error(results, name), case.error(own, name)
        assert rounded < 2 * exact + 0.02, (name, rounded, exact)


def answers(results: Results) -> dict[tuple[str, int], object]:
    return {key: (result.token_ids, result.logprobs) for key, result in results.items()}

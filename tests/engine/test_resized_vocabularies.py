"""Tests adapters with more or fewer token ids than their base, against peft, in batches with
plain ones."""

import shutil
from array import array
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from adapter_store.errors import AdapterInvalid
from adapter_store.layout import WEIGHTS_NAME
from adapter_store.store import AdapterStore
from engine.backends.sampler import SampledToken, sample
from engine.backends.torch import overlays
from engine.engine import Engine
from engine.grammar.mask_memory import MaskMemory
from engine.messages import AdapterFolder, GenerateRequest
from engine.scheduler.batch import ScheduledRequest
from engine.scheduler.request import InvalidRequest
from engine.validate import validate
from tests.engine.support.driver import Result, greedy, make_engine, prompt_of, run
from tests.engine.support.kinds import load_with_peft, write_kind
from tests.engine.support.tiny import VOCAB_SIZE, write_tiny

NEW = 5  # token ids that only the adapter has
LAST = VOCAB_SIZE + NEW - 1
KINDS: dict[str, dict[str, Any]] = {
    "saved": {"vocab_size": VOCAB_SIZE + NEW, "modules_to_save": ["embed_tokens", "lm_head"]},
    "untrained": {"vocab_size": VOCAB_SIZE + 2},
    "tokens": {"vocab_size": VOCAB_SIZE + 7, "trainable_token_indices": [9, VOCAB_SIZE + 6]},
    "factors": {
        "vocab_size": VOCAB_SIZE + NEW,
        "target_modules": ["q_proj", "embed_tokens", "lm_head"],
    },
    "plain": {},
    "fewer": {"vocab_size": 200, "modules_to_save": ["embed_tokens", "lm_head"]},
    "fewer-untrained": {"vocab_size": 190},
    "fewer-factors": {
        "vocab_size": 180,
        "target_modules": ["embed_tokens", "lm_head"],
        "use_dora": True,
    },
    "more-and-scaled": {
        "vocab_size": VOCAB_SIZE + 2,
        "target_modules": ["embed_tokens", "lm_head"],
        "use_dora": True,
    },
    "more-and-shifted": {
        "vocab_size": VOCAB_SIZE + 2,
        "target_modules": ["lm_head"],
        "modules_to_save": ["embed_tokens"],
        "lora_bias": True,
    },
}


class Case:
    def __init__(self, folder: Path, kinds: dict[str, dict[str, Any]], **base: Any) -> None:
        self.base = write_tiny(folder / "base", **base).folder
        self.adapters = {
            name: write_kind(self.base, folder / name, seed, **config)
            for seed, (name, config) in enumerate(kinds.items())
        }
        self.requests = [self.ask(name, i) for i, name in enumerate(self.adapters)]

    def ask(self, name: str, seed: int = 0, **sampling: Any) -> GenerateRequest:
        """Ask with the adapter's new tokens in the prompt, and for one of them as output."""
        adapter, prompt = self.adapters[name], prompt_of(7 + 3 * seed, seed=seed)
        if adapter.vocab_size:
            last = adapter.vocab_size - 1
            prompt = [min(token_id, last) for token_id in prompt]
            prompt[3], prompt[-1] = min(VOCAB_SIZE, last), last
            sampling = {"logit_bias": ((last, 100.0),), "max_tokens": 1} | sampling
        sampling = {"logprobs": 20, "prompt_logprobs": 3, "max_tokens": 3} | sampling
        return GenerateRequest(name, prompt, replace(greedy(1), **sampling), adapter_folder=adapter)

    @torch.inference_mode()
    def check(self, request: GenerateRequest, result: Result) -> None:
        """Compare all log probabilities with those of peft."""
        adapter = request.adapter_folder
        assert adapter is not None and result.last and result.first and result.last.error is None, (
            result.last
        )
        if adapter.vocab_size:
            assert result.token_ids == [adapter.vocab_size - 1]
        token_ids = request.prompt_token_ids + result.token_ids
        expected = load_with_peft(self.base, adapter)(torch.tensor([token_ids])).logits[0]
        expected = expected.log_softmax(-1)
        got = [*(result.first.prompt_logprobs or [])[1:], *result.logprobs]
        assert len(got) == len(token_ids) - 1
        for i, entry in enumerate(got):
            assert entry is not None
            pairs = [(token_ids[i + 1], entry.logprob), *entry.top]
            wanted = expected[i, [token_id for token_id, _ in pairs]]
            values = torch.tensor([value for _, value in pairs])
            torch.testing.assert_close(values, wanted, rtol=0, atol=1e-4)


def finish_of(engine: Engine, request: GenerateRequest) -> Result:
    return run(engine, [request])[request.request_id, 0]


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(tmp_path_factory.mktemp("untied"), KINDS)


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Case:
    kinds = {name: KINDS[name] for name in ("untrained", "tokens", "plain", "fewer-untrained")}
    return Case(tmp_path_factory.mktemp("tied"), kinds, tie_word_embeddings=True)


@pytest.mark.parametrize("ties", ["untied", "tied"])
def test_new_token_ids_have_pefts_logits_and_other_requests_never_see_them(
    ties: str, request: pytest.FixtureRequest
) -> None:
    case: Case = request.getfixturevalue(ties)
    engine = make_engine(case.base)
    results = run(engine, case.requests)
    for asked in case.requests:
        case.check(asked, results[asked.request_id, 0])
        assert engine.proofs and asked.adapter_folder
        proof = engine.proofs.find(asked.adapter_folder.digest)
        assert proof and not proof.failure and not proof.warning and proof.effect < 100, proof


@pytest.mark.slow
@pytest.mark.parametrize("ties", ["untied", "tied"])
def test_published_folders_are_served_as_those_of_peft(
    ties: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    case: Case = request.getfixturevalue(ties)
    store = AdapterStore(f"file://{tmp_path}/store", tmp_path / "cache", 2**30)
    store.register_base(case.base)
    for asked in case.requests:
        assert asked.adapter_folder
        ref = store.publish(Path(asked.adapter_folder.path), "public", asked.request_id)
        assert ref.vocab_size == asked.adapter_folder.vocab_size
        folder = AdapterFolder(ref.digest, str(store.ensure_local(ref)), ref.vocab_size)
        result = finish_of(make_engine(case.base), replace(asked, adapter_folder=folder))
        case.check(asked, result)


def test_a_proof_needs_the_new_rows(untied: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overlays, "_embed", lambda overlay, token_ids, x: x)
    result = finish_of(make_engine(untied.base), untied.ask("untrained"))
    assert result.last and result.last.error and "does not act" in result.last.error.message


def test_validation_knows_which_adapter_has_which_token_ids(untied: Case) -> None:
    engine = make_engine(untied.base)
    saved = untied.ask("saved", max_tokens=2, stop_token_ids=(LAST,), bad_words=((4, LAST - 1),))
    assert finish_of(engine, saved).token_ids == [LAST]
    for changes in (
        {"adapter_folder": untied.adapters["plain"]},
        {"adapter_folder": None},
        {"prompt_token_ids": [LAST + 1]},
        {"adapter_folder": untied.adapters["fewer"], "prompt_token_ids": [200]},
    ):
        with pytest.raises(InvalidRequest, match=r"prompt: token id 2.* is outside"):
            engine.add_request(replace(saved, **changes))


def test_an_interrupted_answer_resumes_after_new_tokens(untied: Case) -> None:
    allowed = {"allowed_token_ids": (5, 6, LAST - 1, LAST), "repetition_penalty": 1.5}
    asked = untied.ask("saved", max_tokens=12, logit_bias=(), **allowed)
    whole = finish_of(make_engine(untied.base), asked)
    assert {LAST - 1, LAST} & {*whole.token_ids[:8]} and len({*whole.token_ids}) > 2, whole
    resumed = replace(asked, output_token_ids=whole.token_ids[:8])
    resumed = replace(resumed, sampling=replace(asked.sampling, prompt_logprobs=None))
    assert finish_of(make_engine(untied.base), resumed).token_ids == whole.token_ids[8:]


def test_ids_that_only_an_adapter_has_are_no_part_of_a_grammar() -> None:
    memory = MaskMemory.create(1, 42)  # not whole words, nor whole bytes
    memory.write(0, b"\xff" * 8)
    bits = np.unpackbits(np.frombuffer(memory.bytes, np.uint8), bitorder="little")
    assert bits.tolist() == [1] * 42 + [0] * 22
    mask = np.frombuffer(memory.bytes, np.uint32)
    forbidden = array("i", [41, 70])  # 70: an end token of the adapter's own
    row = ScheduledRequest("r", 0, [1], 0, (0,), 1, greedy(1), True, forbidden)
    [token] = sample([row], torch.arange(80.0)[None], allowed={0: mask})
    assert isinstance(token, SampledToken) and token.token_id == 40


@pytest.mark.parametrize(
    ("name", "vocab_size"), [("saved", LAST + 2), ("fewer", 0), ("fewer-factors", 181)]
)
def test_an_adapter_that_has_fewer_ids_than_its_record_says_is_refused(
    name: str, vocab_size: int, untied: Case
) -> None:
    wrong = replace(untied.adapters[name], vocab_size=vocab_size)
    result = finish_of(make_engine(untied.base), replace(untied.ask(name), adapter_folder=wrong))
    assert result.last and result.last.error and "should have" in result.last.error.message


def test_embedding_and_output_layer_must_have_the_same_ids(untied: Case, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    shutil.copytree(untied.adapters["fewer"].path, folder)
    tensors = load_file(folder / WEIGHTS_NAME)
    cut = "base_model.model.lm_head.weight"
    save_file(tensors | {cut: tensors[cut][:-9].contiguous()}, folder / WEIGHTS_NAME)
    request = replace(untied.ask("fewer"), adapter_folder=AdapterFolder("cut", str(folder), 200))
    result = finish_of(make_engine(untied.base), request)
    assert result.last and result.last.error and "191 rows" in result.last.error.message
    store = AdapterStore(f"file://{tmp_path}/store", tmp_path / "cache", 2**30)
    store.register_base(untied.base)
    with pytest.raises(AdapterInvalid, match=r"191 rows of token ids and .*embed_tokens.* 200"):
        store.publish(folder, "public", "cut")


def test_a_grammar_needs_an_end_token_that_the_adapter_has(untied: Case) -> None:
    info = replace(make_engine(untied.base).info, grammar_refusal="")
    asked = untied.ask("fewer", grammar='start: "a"', logit_bias=(), ignore_eos=False)
    validate(asked, info)
    with pytest.raises(InvalidRequest, match="none is 200, 255"):
        validate(asked, replace(info, eos_token_ids=(200, 255)))

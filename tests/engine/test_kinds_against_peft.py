"""Tests adapters that are more than A and B against peft, in batches with plain ones."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.tuners.lora import BdLoraConfig, Linear, LoraConfig
from peft.tuners.lora.variants import QALoraLinearVariant
from safetensors.torch import load_file

from engine.messages import GenerateRequest
from tests.engine.support.driver import Result, greedy, make_engine, prompt_of, run
from tests.engine.support.kinds import load_with_peft, write_kinds
from tests.engine.support.tiny import write_tiny

KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "dora": {"use_dora": True, "lora_alpha": 16},
    "dora-and-biases": {"use_dora": True, "bias": "all", "use_rslora": True},
    "lora-bias": {"lora_bias": True, "lora_alpha": 12},
    "biases-of-targets": {"bias": "lora_only"},
    "norms": {"modules_to_save": ["norm", "input_layernorm"], "use_rslora": True},
    "all-biases": {"bias": "all", "target_modules": ["down_proj"]},
}
COMPACT: dict[str, dict[str, Any]] = {
    "blocks": {
        "r": 6,
        "bias": "lora_only",
        "use_bdlora": BdLoraConfig(["o_proj"], ["layers.0.self_attn.q_proj", "up_"], 2, False),
    },
    "groups": {"use_qalora": True, "qalora_group_size": 8, "use_rslora": True},
    "groups-of-no-layer": {"use_qalora": True, "qalora_group_size": 8},
    "transposed": {"fan_in_fan_out": True, "target_modules": ["embed_tokens"]},
    "plain": {},
}
VOCABULARY: dict[str, dict[str, Any]] = {
    "lora-on-embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "lora-on-head": {"target_modules": ["lm_head", "q_proj"], "lora_alpha": 16},
    "lora-on-both": {"target_modules": ["lm_head", "embed_tokens", "q_proj"]},
    "lora-on-tied": {"target_modules": ["embed_tokens", "v_proj"], "ensure_weight_tying": True},
    "dora-on-both": {"target_modules": ["lm_head", "embed_tokens", "q_proj"], "use_dora": True},
    "dora-on-tied": {
        "target_modules": ["embed_tokens"],
        "ensure_weight_tying": True,
        "use_dora": True,
        "lora_alpha": 16,
    },
    "bias-on-head": {"target_modules": ["lm_head", "q_proj"], "lora_bias": True, "lora_alpha": 12},
    "saved-head": {"modules_to_save": ["lm_head"]},
    "saved-embedding": {"modules_to_save": ["embed_tokens"]},
    "saved-and-tied": {"modules_to_save": ["lm_head"], "ensure_weight_tying": True},
    "tokens": {"trainable_token_indices": [200, 7, 9, *range(20, 60)]},
    "tokens-of-each": {
        "trainable_token_indices": {"embed_tokens": [*range(3, 99)], "lm_head": [5, 4]}
    },
    "plain": {"use_dora": True},
}
Q0 = "model.layers.0.self_attn.q_proj"
Results = dict[tuple[str, int], Result]


class Case:
    """One base, an adapter of each kind, and one run of all of them together."""

    def __init__(self, folder: Path, kinds: dict[str, dict[str, Any]], **base: Any) -> None:
        self.base = write_tiny(folder / "base", **base).folder
        self.adapters = write_kinds(self.base, folder, kinds)
        self.requests = {
            name: GenerateRequest(
                name, prompt_of(6 + 5 * i, seed=i), greedy(6, logprobs=20), adapter_folder=adapter
            )
            for i, (name, adapter) in enumerate(self.adapters.items())
        }
        self.results: Results = run(make_engine(self.base), list(self.requests.values()))

    @torch.inference_mode()
    def check(self, name: str) -> None:
        """Compare the log probabilities of all outputs with those of peft."""
        prompt, result = self.requests[name].prompt_token_ids, self.results[name, 0]
        assert result.last is not None and result.last.error is None, result.last
        model = load_with_peft(self.base, self.adapters[name])
        logits = model(torch.tensor([prompt + result.token_ids])).logits[0]
        expected = logits.log_softmax(-1)
        for i, got in enumerate(result.logprobs, len(prompt)):
            values = torch.tensor([value for _, value in got.top])
            wanted = expected[i - 1, [token_id for token_id, _ in got.top]]
            torch.testing.assert_close(values, wanted, rtol=0, atol=1e-4)


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(tmp_path_factory.mktemp("untied"), VOCABULARY)


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(tmp_path_factory.mktemp("tied"), VOCABULARY, tie_word_embeddings=True)


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(tmp_path_factory.mktemp("qwen"), KINDS, model_type="qwen2")


@pytest.mark.parametrize("name", [*KINDS, "base"])
def test_in_a_mixed_batch_each_kind_gives_pefts_own_logits(qwen: Case, name: str) -> None:
    qwen.check(name)


FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3": {"model_type": "qwen3"},
    "gemma3_text": {"model_type": "gemma3_text", "tie_word_embeddings": True},
    "gemma2": {"model_type": "gemma2", "tie_word_embeddings": True},
    "granite": {"model_type": "granite"},
    "phi3": {"model_type": "phi3"},
}
IN_FAMILIES: dict[str, dict[str, Any]] = {
    "dora": {"use_dora": True},
    "norms": {"modules_to_save": ["norm"]},
    "tokens": {"trainable_token_indices": [*range(20, 80)]},
    "embedding": {"target_modules": ["embed_tokens"]},
    "scaled-embedding": {"target_modules": ["embed_tokens"], "use_dora": True},
    "head": {"target_modules": ["lm_head"]},
    "saved": {"modules_to_save": ["lm_head", "embed_tokens"]},
}


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_scales_offsets_and_caps_of_a_family_apply_to_what_is_changed(
    family: str, tmp_path: Path
) -> None:
    linear = {"target_modules": ["o_proj", "down_proj"]}
    kinds = {name: linear | config for name, config in IN_FAMILIES.items()}
    case = Case(tmp_path, kinds, **FAMILIES[family])
    for name in case.adapters:
        case.check(name)


def test_requests_of_changed_models_survive_preemption_and_share_prefixes(
    untied: Case,
) -> None:
    names = ["tokens", "lora-on-both", "plain", "saved-head"]
    requests = [
        replace(untied.requests[name], request_id=f"{name}-{i}", sampling=greedy(24))
        for i in range(3)
        for name in names
    ]
    roomy = make_engine(untied.base)
    expected = {k: r.token_ids for k, r in run(roomy, requests).items()}
    tight = make_engine(untied.base, memory_bytes=2**18, max_model_len=96)
    assert {k: r.token_ids for k, r in run(tight, requests).items()} == expected
    assert tight.stats.total_preemptions and roomy.stats.total_cached_tokens, tight.stats


ELSEWHERE = {  # by the fixture of their base
    "untied": ["lora-on-both", "dora-on-both", "saved-head", "tokens"],
    "qwen": ["dora-and-biases", "norms", "lora-bias"],
}


@pytest.mark.parametrize("of", ["untied", pytest.param("qwen", marks=pytest.mark.slow)])
def test_answers_that_are_aborted_go_on_elsewhere(of: str, request: pytest.FixtureRequest) -> None:
    case: Case = request.getfixturevalue(of)
    requests = [replace(case.requests[name], sampling=greedy(24)) for name in ELSEWHERE[of]]
    engine = make_engine(case.base)
    expected = {k: r.token_ids for k, r in run(engine, requests).items()}

    for asked in requests:
        engine.add_request(asked)
    begun: dict[str, list[int]] = {asked.request_id: [] for asked in requests}
    while min(len(token_ids) for token_ids in begun.values()) < 5:
        for output in engine.step():
            begun[output.request_id] += output.token_ids
    for asked in requests:
        engine.abort(asked.request_id)
    assert max(len(token_ids) for token_ids in begun.values()) < 24

    elsewhere = make_engine(case.base, memory_bytes=2**18, max_model_len=96)
    resumed = [replace(r, output_token_ids=begun[r.request_id]) for r in requests]
    for _ in range(2):  # the second time from the prefix cache
        for (name, index), result in run(elsewhere, resumed).items():
            assert begun[name] + result.token_ids == expected[name, index], name
    assert elsewhere.stats.total_cached_tokens, elsewhere.stats


def test_output_layers_of_their_own_alone_need_nothing_of_the_bases(
    untied: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = untied.requests["saved-head"]
    engine = make_engine(untied.base, adapter_proof="off")
    runner: Any = engine.runner
    monkeypatch.setattr(runner.model._decoder.head, "multiply", None)
    [result] = run(engine, [request]).values()
    assert result.token_ids == untied.results["saved-head", 0].token_ids


@pytest.mark.parametrize("name", [*VOCABULARY, "base"])
@pytest.mark.parametrize("ties", ["untied", "tied"])
def test_changed_embeddings_and_output_layers_are_those_of_peft(
    ties: str, name: str, request: pytest.FixtureRequest
) -> None:
    case: Case = request.getfixturevalue(ties)
    case.check(name)


@pytest.fixture
def pooling_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let PEFT's plain layers average inputs, as its GPTQ layers do, where groups are wanted."""
    resolve = Linear.resolve_lora_variant

    def resolved(self: Linear, *, config: LoraConfig, **named: Any) -> object:
        if config.use_qalora and config.use_rslora:
            return QALoraLinearVariant()
        return resolve(self, config=config, **named)

    monkeypatch.setattr(Linear, "resolve_lora_variant", resolved)


@pytest.mark.usefixtures("pooling_peft")
def test_what_is_stored_in_groups_or_blocks_gives_pefts_own_logits(tmp_path: Path) -> None:
    case = Case(tmp_path, COMPACT)
    for name, shape in (("groups", (4, 8)), ("groups-of-no-layer", (4, 64)), ("blocks", (6, 64))):
        folder = case.adapters[name]
        assert folder is not None
        tensors = load_file(Path(folder.path) / "adapter_model.safetensors")
        assert tensors[f"base_model.model.{Q0}.lora_A.weight"].shape == shape
    for name in case.adapters:
        case.check(name)

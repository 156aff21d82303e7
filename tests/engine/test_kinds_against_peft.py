"""Tests adapters that are more than A and B against peft, in batches with plain ones."""

from pathlib import Path
from typing import Any

import pytest
import torch

from engine.messages import AdapterFolder, GenerateRequest
from tests.engine.support.driver import Result, greedy, make_engine, prompt_of, run
from tests.engine.support.kinds import load_with_peft, write_kind
from tests.engine.support.tiny import write_tiny

KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "dora": {"use_dora": True, "lora_alpha": 16},
    "dora-and-biases": {"use_dora": True, "bias": "all", "use_rslora": True},
    "lora-bias": {"lora_bias": True, "lora_alpha": 12},
    "biases-of-targets": {"bias": "lora_only"},
    "all-biases": {"bias": "all", "target_modules": ["down_proj"]},
}
Results = dict[tuple[str, int], Result]


class Case:
    """One base, an adapter of each kind, and one run of all of them together."""

    def __init__(self, folder: Path, kinds: dict[str, dict[str, Any]], **base: Any) -> None:
        self.base = write_tiny(folder / "base", **base).folder
        self.adapters: dict[str, AdapterFolder | None] = {
            name: write_kind(self.base, folder / name, seed, **config)
            for seed, (name, config) in enumerate(kinds.items())
        }
        self.adapters["base"] = None
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
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(tmp_path_factory.mktemp("qwen"), KINDS, model_type="qwen2")


@pytest.mark.parametrize("name", [*KINDS, "base"])
def test_in_a_mixed_batch_each_kind_gives_pefts_own_logits(qwen: Case, name: str) -> None:
    qwen.check(name)

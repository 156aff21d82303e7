"""Test combined adapters in the engine against peft's add_weighted_adapter."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora.layer import LoraLayer
from peft.utils import merge_utils
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM

from adapter_store.errors import AdapterInvalid
from adapter_store.layout import WEIGHTS_NAME, read_lora_layout
from adapter_store.merged_folder import MergedAdapter
from adapter_store.merging import random_mask
from adapter_store.recipes import Recipe, make_recipe
from engine.messages import AdapterFolder, GenerateRequest
from tests.engine.support.driver import greedy, make_engine, prompt_of, run, write_adapters
from tests.engine.support.kinds import write_kind
from tests.engine.support.tiny import Tiny, write_tiny

BASE = "b" * 64
CONFIGS: dict[str, dict[str, Any]] = {
    "a": {"r": 4, "lora_alpha": 8},
    "b": {"r": 4, "lora_alpha": 24, "target_modules": ["q_proj", "down_proj"]},
    "c": {"r": 4, "lora_alpha": 2, "lora_dropout": 0.3},
    "wide": {"r": 7, "target_modules": ["q_proj", "k_proj", "up_proj"]},
    "rslora": {"r": 4, "lora_alpha": 4, "use_rslora": True},
    "patterns": {"r": 5, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"down_proj": 20}},
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return write_tiny(tmp_path_factory.mktemp("base"), "qwen2")


@pytest.fixture(scope="module")
def adapters(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> dict[str, AdapterFolder]:
    return write_adapters(tiny.folder, tmp_path_factory.mktemp("adapters"), CONFIGS)


def combine(recipe: Recipe, adapters: dict[str, AdapterFolder], folder: Path) -> AdapterFolder:
    by_digest = {each.digest: Path(each.path) for each in adapters.values()}
    folder.mkdir()
    merged = MergedAdapter(recipe, BASE, [by_digest[digest] for digest in recipe.members])
    merged.write(folder)
    assert sum(path.stat().st_size for path in folder.iterdir()) == merged.nbytes
    return AdapterFolder(recipe.digest(BASE), str(folder))


def pefts_own(
    tiny: Tiny, chosen: list[AdapterFolder], weights: list[float], **how: Any
) -> torch.nn.Module:
    """Load all into one model, and let peft combine them."""
    base = AutoModelForCausalLM.from_pretrained(tiny.folder, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, chosen[0].path, adapter_name="m0")
    for number, adapter in enumerate(chosen[1:], 1):
        model.load_adapter(adapter.path, adapter_name=f"m{number}")
    names = [f"m{number}" for number in range(len(chosen))]
    model.base_model.add_weighted_adapter(names, weights, "merged", **how)
    model.set_adapter("merged")
    for module in model.modules():
        if isinstance(module, LoraLayer) and "merged" in module.scaling:
            # With rsLoRA in the first adapter's config peft would add a factor of sqrt(r), although
            # the weights have the scaling in them already.
            module.scaling["merged"] = 1.0
    return model.eval()


def assert_same_logits(tiny: Tiny, adapter: AdapterFolder, model: torch.nn.Module) -> None:
    request = GenerateRequest(
        "r", prompt_of(9, seed=1), greedy(8, logprobs=20), adapter_folder=adapter
    )
    result = run(make_engine(tiny.folder), [request])["r", 0]
    tokens = request.prompt_token_ids + result.token_ids
    with torch.inference_mode():
        expected = model(torch.tensor([tokens])).logits[0].log_softmax(-1)
    for at, got in enumerate(result.logprobs, len(request.prompt_token_ids)):
        for token_id, value in got.top:
            assert value == pytest.approx(expected[at - 1, token_id].item(), abs=1e-4)


@pytest.fixture
def same_draws(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[bytes, str]]:
    """Let peft drop the elements that we drop: seeds by the tensors' bytes."""
    seeds: dict[bytes, str] = {}

    def prune(tensor: torch.Tensor, density: float, rescale: bool) -> torch.Tensor:
        assert rescale
        seed = seeds[tensor.numpy().tobytes()]
        return tensor * torch.from_numpy(random_mask(tuple(tensor.shape), density, seed)) / density

    monkeypatch.setattr(merge_utils, "random_pruning", prune)
    yield seeds


def seeds_of(recipe: Recipe, folders: dict[str, Path]) -> dict[bytes, str]:
    seeds: dict[bytes, str] = {}
    for at, digest in enumerate(recipe.members):
        tensors = load_file(folders[digest] / WEIGHTS_NAME)
        for name, module in read_lora_layout(folders[digest]).modules.items():
            for side, tensor in (("A", module.lora_a), ("B", module.lora_b)):
                seed = f"{recipe.digest(BASE)} {at} {digest} {name} {side}"
                seeds[tensors[tensor].tobytes()] = seed
    return seeds


@pytest.mark.parametrize(
    ("names", "weights"),
    [
        ("a", [0.7]),
        ("a b", [0.7, 0.3]),
        ("a wide rslora patterns", [0.5, -0.25, 1.5, 0.0]),
        ("rslora a", [1.0, 1.0]),
    ],
)
def test_a_weighted_set_gives_the_logits_of_pefts_cat(
    tiny: Tiny,
    adapters: dict[str, AdapterFolder],
    names: str,
    weights: list[float],
    tmp_path: Path,
) -> None:
    chosen = [adapters[name] for name in names.split()]
    recipe = make_recipe([each.digest for each in chosen], weights)
    model = pefts_own(tiny, chosen, weights, combination_type="cat")
    assert_same_logits(tiny, combine(recipe, adapters, tmp_path / "merged"), model)


@pytest.mark.parametrize(
    ("method", "density", "sign"),
    [
        ("linear", 1.0, "total"),
        ("ties", 0.3, "total"),
        ("ties", 0.3, "frequency"),
        ("ties", 1.0, "total"),
        ("dare_linear", 0.4, "total"),
        ("dare_ties", 0.4, "total"),
        ("dare_ties", 0.4, "frequency"),
    ],
)
@pytest.mark.filterwarnings("ignore:The density 1.0 is greater")
def test_merged_adapters_give_the_logits_of_pefts(
    tiny: Tiny,
    adapters: dict[str, AdapterFolder],
    same_draws: dict[bytes, str],
    method: Any,
    density: float,
    sign: Any,
    tmp_path: Path,
) -> None:
    chosen, weights = [adapters[name] for name in ("a", "b", "c", "rslora")], [0.7, 0.5, -0.4, 1.1]
    recipe = make_recipe([each.digest for each in chosen], weights, method, density, sign)
    same_draws |= seeds_of(recipe, {a.digest: Path(a.path) for a in chosen})
    how = {"combination_type": method, "density": density, "majority_sign_method": sign}
    model = pefts_own(tiny, chosen, weights, **how)
    assert_same_logits(tiny, combine(recipe, adapters, tmp_path / "merged"), model)


def test_pefts_factor_for_rslora_is_what_the_tests_take_away(
    tiny: Tiny, adapters: dict[str, AdapterFolder]
) -> None:
    base = AutoModelForCausalLM.from_pretrained(tiny.folder, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, adapters["rslora"].path, adapter_name="m0")
    model.base_model.add_weighted_adapter(["m0"], [1.0], "merged", combination_type="linear")
    layers = [m for m in model.modules() if isinstance(m, LoraLayer)]
    assert {layer.scaling["merged"] for layer in layers} == {math.sqrt(4)}


def test_an_adapter_that_is_more_than_a_and_b_is_not_combined(tiny: Tiny, tmp_path: Path) -> None:
    dora = write_kind(tiny.folder, tmp_path / "dora", use_dora=True)
    with pytest.raises(AdapterInvalid, match=rf"{dora.digest} cannot be combined"):
        combine(make_recipe([dora.digest], [0.5]), {"dora": dora}, tmp_path / "merged")


def test_an_activated_adapter_is_not_combined(tiny: Tiny, tmp_path: Path) -> None:
    config = {"r": 4, "alora_invocation_tokens": [5], "task_type": "CAUSAL_LM"}
    activated = write_adapters(tiny.folder, tmp_path, {"activated": config})
    recipe = make_recipe([activated["activated"].digest], [0.5])
    with pytest.raises(AdapterInvalid, match="digest-of-activated is an activated LoRA"):
        combine(recipe, activated, tmp_path / "merged")

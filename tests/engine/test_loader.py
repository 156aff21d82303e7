"""Tests loading: every tensor is used exactly once, and errors name their cause."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from engine.announcer import SILENT, Announcer
from engine.backends.torch.ops import torch_build
from engine.model.decoder import Decoder
from engine.model.loader import load_decoder, weight_bytes
from engine.model.spec import ModelError
from tests.engine.support.tiny import (
    Tiny,
    load_reference,
    logits_in_chunks,
    random_prompt,
    reference_logits,
)

MakeTiny = Callable[..., Tiny]
Tensors = dict[str, torch.Tensor]


def load(folder: Path, announcer: Announcer = SILENT) -> Decoder:
    return load_decoder(
        folder,
        torch_build(torch.device("cpu"), torch.float32),
        max_model_len=256,
        announcer=announcer,
    )


def shard(tiny: Tiny, folder: Path, num_shards: int) -> list[Path]:
    """Split a checkpoint into several files, its tensors distributed in turn."""
    tensors = load_file(tiny.folder / "model.safetensors")
    shutil.copy(tiny.folder / "config.json", folder)
    paths = [folder / f"model-{i}.safetensors" for i in range(num_shards)]
    weight_map: dict[str, str] = {}
    for i, path in enumerate(paths):
        keys = list(tensors)[i::num_shards]
        save_file({key: tensors[key] for key in keys}, path)
        weight_map |= dict.fromkeys(keys, path.name)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return paths


def rewritten(tiny: Tiny, folder: Path, change: Callable[[Tensors], None]) -> Path:
    tensors = load_file(tiny.folder / "model.safetensors")
    change(tensors)
    shutil.copy(tiny.folder / "config.json", folder)
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("num_shards", [2, 5])
def test_a_sharded_checkpoint_is_the_same_model(
    num_shards: int, tiny_model: MakeTiny, tmp_path: Path
) -> None:
    tiny, prompt = tiny_model("qwen2"), random_prompt(9)
    shard(tiny, tmp_path, num_shards)
    expected = logits_in_chunks(load(tiny.folder), prompt, 9)
    assert torch.equal(logits_in_chunks(load(tmp_path), prompt, 9), expected)


def test_progress_is_shown_per_tensor_and_only_when_asked_for(
    tiny_model: MakeTiny, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny = tiny_model()
    capsys.readouterr()
    load(tiny.folder)
    assert capsys.readouterr().err == ""
    load(tiny.folder, Announcer(shows_bars=True))
    num_tensors = len(load_file(tiny.folder / "model.safetensors"))
    assert f"{num_tensors}/{num_tensors}" in capsys.readouterr().err


@pytest.mark.parametrize("tied", [False, True])
def test_weight_bytes_equal_those_of_the_parameters(tied: bool, tiny_model: MakeTiny) -> None:
    tiny = tiny_model("llama", tie_word_embeddings=tied)
    expected = sum(p.numel() for p in tiny.reference.parameters())
    assert weight_bytes(load(tiny.folder), torch.float32) == 4 * expected
    assert weight_bytes(load(tiny.folder), torch.bfloat16) == 2 * expected


def test_weights_of_another_dtype_are_converted(tiny_model: MakeTiny) -> None:
    tiny, prompt = tiny_model("llama", dtype=torch.bfloat16), random_prompt(9)
    expected = reference_logits(load_reference(tiny.folder, torch.float32), prompt)
    found = logits_in_chunks(load(tiny.folder), prompt, 9)
    torch.testing.assert_close(found, expected, rtol=0.0, atol=1e-4)


# ==== Refusals ====


def _drop(tensors: Tensors) -> None:
    del tensors["model.layers.1.mlp.up_proj.weight"]


def _add(tensors: Tensors) -> None:
    tensors["model.layers.1.mlp.up_proj.bias"] = torch.zeros(96)


def _transpose(tensors: Tensors) -> None:
    key = "model.layers.1.mlp.up_proj.weight"
    tensors[key] = tensors[key].T.contiguous()


def _quantize(tensors: Tensors) -> None:
    key = "model.layers.1.mlp.up_proj.weight"
    tensors[key] = tensors[key].to(torch.int8)


REFUSED = [
    (_drop, r"lacks model\.layers\.1\.mlp\.up_proj\.weight \(1 weights"),
    (_add, r"model\.layers\.1\.mlp\.up_proj\.bias is not a weight of this architecture"),
    (_transpose, r"model\.layers\.1\.mlp\.up_proj\.weight has shape \[64, 96\].*\[96, 64\]"),
    (_quantize, r"model\.layers\.1\.mlp\.up_proj\.weight is torch\.int8"),
]


@pytest.mark.parametrize(("change", "message"), REFUSED)
def test_a_tensor_that_does_not_fit_is_refused_by_name(
    change: Callable[[Tensors], None], message: str, tiny_model: MakeTiny, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match=message):
        load(rewritten(tiny_model(), tmp_path, change))


def test_an_untied_model_without_an_output_layer_is_refused(
    tiny_model: MakeTiny, tmp_path: Path
) -> None:
    folder = rewritten(tiny_model(), tmp_path, lambda tensors: tensors.pop("lm_head.weight"))
    with pytest.raises(ModelError, match=r"lacks lm_head\.weight"):
        load(folder)


def test_a_copy_of_a_tied_output_layer_is_accepted_if_equal(
    tiny_model: MakeTiny, tmp_path: Path
) -> None:
    tiny, prompt = tiny_model("llama", tie_word_embeddings=True), random_prompt(9)

    def copy(tensors: Tensors) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    def other(tensors: Tensors) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1

    expected = logits_in_chunks(load(tiny.folder), prompt, 9)
    assert torch.equal(logits_in_chunks(load(rewritten(tiny, tmp_path, copy)), prompt, 9), expected)
    with pytest.raises(ModelError, match="differs from the embedding"):
        load(rewritten(tiny, tmp_path, other))


def test_stored_rotary_frequencies_of_old_checkpoints_are_ignored(
    tiny_model: MakeTiny, tmp_path: Path
) -> None:
    def add(tensors: Tensors) -> None:
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)

    load(rewritten(tiny_model(), tmp_path, add))


@pytest.mark.parametrize("kept_share", [0.0, 0.01, 0.5, 0.999])
def test_a_truncated_file_is_refused_by_name(
    kept_share: float, tiny_model: MakeTiny, tmp_path: Path
) -> None:
    broken = shard(tiny_model(), tmp_path, 2)[1]
    content = broken.read_bytes()
    broken.write_bytes(content[: int(len(content) * kept_share)])
    with pytest.raises(ModelError, match=r"model-1\.safetensors cannot be read"):
        load(tmp_path)


def test_a_missing_shard_is_refused_by_name(tiny_model: MakeTiny, tmp_path: Path) -> None:
    shard(tiny_model(), tmp_path, 3)[2].unlink()
    with pytest.raises(ModelError, match=r"model-2\.safetensors cannot be read"):
        load(tmp_path)


def test_a_tensor_in_two_shards_is_refused_by_name(tiny_model: MakeTiny, tmp_path: Path) -> None:
    first, second = shard(tiny_model(), tmp_path, 2)
    tensors, key = load_file(second), "model.norm.weight"
    save_file(tensors | {key: torch.ones(64)}, second)
    save_file(load_file(first) | {key: torch.ones(64)}, first)
    with pytest.raises(ModelError, match=r"model\.norm\.weight is also in"):
        load(tmp_path)


@pytest.mark.parametrize("has_shards", [False, True])
def test_an_index_that_was_left_beside_the_whole_file_is_ignored(
    has_shards: bool, tiny_model: MakeTiny, tmp_path: Path
) -> None:
    """As transformers does, and as the folder's fingerprint does."""
    paths = shard(tiny_model(), tmp_path, 2)
    for path in paths:
        if has_shards:
            save_file({key: torch.zeros_like(t) for key, t in load_file(path).items()}, path)
        else:
            path.unlink()
    shutil.copy(tiny_model().folder / "model.safetensors", tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path).model.embed_tokens.weight
    assert torch.equal(load(tmp_path).embedding.weight, theirs)


@pytest.mark.parametrize("index", ["", "{}", "[]", '{"weight_map": {"a": 1}}'])
def test_a_broken_index_is_refused_by_name(
    index: str, tiny_model: MakeTiny, tmp_path: Path
) -> None:
    shutil.copy(tiny_model().folder / "config.json", tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ModelError, match=r"index\.json"):
        load(tmp_path)


def test_an_index_cannot_reach_outside_its_folder(tiny_model: MakeTiny, tmp_path: Path) -> None:
    shutil.copy(tiny_model().folder / "config.json", tmp_path)
    index = {"weight_map": {"model.norm.weight": "../model.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match="not a file beside it"):
        load(tmp_path)


def test_a_folder_without_safetensors_is_refused(tiny_model: MakeTiny, tmp_path: Path) -> None:
    shutil.copy(tiny_model().folder / "config.json", tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(ModelError, match=r"neither model\.safetensors nor"):
        load(tmp_path)

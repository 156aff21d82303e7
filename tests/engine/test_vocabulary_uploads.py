"""Factors of embeddings and output layers from MLX and llama.cpp change what they do there."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from adapter_store.conversion.convert import open_upload
from adapter_store.conversion.options import ConversionOptions
from adapter_store.errors import AdapterInvalid
from adapter_store.layout import read_lora_layout
from tests.adapter_store.conversion.test_uploads import write_gguf
from tests.engine.support.extracted import check, extract
from tests.engine.support.kinds import load_plain
from tests.engine.support.tiny import SIZES, VOCAB_SIZE, write_tiny
from tests.engine.test_extracted_adapters import EMBEDDING, HEAD

RANK, HIDDEN = 3, int(SIZES["hidden_size"])
Q = "model.layers.1.self_attn.q_proj"


def factors(*shapes: tuple[int, ...]) -> list[np.ndarray]:
    random = np.random.default_rng(0)
    return [0.3 * random.standard_normal(shape).astype(np.float32) for shape in shapes]


def write_mlx(folder: Path, tensors: dict[str, np.ndarray]) -> Path:
    folder.mkdir()
    config = {"fine_tune_type": "lora", "lora_parameters": {"rank": RANK, "scale": 2.0}}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "adapters.safetensors")
    return folder


def changed_model(base: Path, changes: dict[str, np.ndarray]) -> torch.nn.Module:
    model = load_plain(base)
    with torch.no_grad():
        for name, change in changes.items():
            model.get_submodule(name).weight.add_(torch.from_numpy(change))
    return model


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_mlxs_factors_of_an_embedding_also_change_a_tied_output_layer(
    tied: bool, tmp_path: Path
) -> None:
    base = write_tiny(tmp_path / "base", "qwen2", tie_word_embeddings=tied).folder
    a, b, head_a, head_b = factors(
        (VOCAB_SIZE, RANK), (RANK, HIDDEN), (HIDDEN, RANK), (RANK, VOCAB_SIZE)
    )
    tensors = {f"{EMBEDDING}.lora_a": a, f"{EMBEDDING}.lora_b": b}
    changes = {EMBEDDING: 2.0 * a @ b}
    if not tied:
        tensors |= {f"{HEAD}.lora_a": head_a, f"{HEAD}.lora_b": head_b}
        changes[HEAD] = 2.0 * (head_a @ head_b).T
    folder = write_mlx(tmp_path / "mlx", tensors)
    _, adapter = extract(folder, base, tmp_path / "adapter")
    assert set(read_lora_layout(Path(adapter.path)).modules) == {EMBEDDING, HEAD}
    check(base, adapter, changed_model(base, changes), VOCAB_SIZE)
    with pytest.raises(AdapterInvalid, match="name the base by its folder"):
        open_upload(folder, ConversionOptions())


def test_llama_cpps_factors_of_both_are_converted(tmp_path: Path) -> None:
    base = write_tiny(tmp_path / "base", "qwen2").folder
    a, b, head_a, head_b = factors(
        (VOCAB_SIZE, RANK), (HIDDEN, RANK), (RANK, HIDDEN), (VOCAB_SIZE, RANK)
    )
    tensors = {
        "token_embd.weight.lora_a": a,  # a row for each token
        "token_embd.weight.lora_b": b,
        "output.weight.lora_a": head_a,
        "output.weight.lora_b": head_b,
    }
    path = write_gguf(tmp_path / "a.gguf", tensors, "qwen2", alpha=6.0)
    _, adapter = extract(path, base, tmp_path / "adapter")
    changes = {EMBEDDING: 2.0 * a @ b.T, HEAD: 2.0 * head_b @ head_a}
    check(base, adapter, changed_model(base, changes), VOCAB_SIZE)

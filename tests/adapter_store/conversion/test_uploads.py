"""Adapters of MLX, of llama.cpp and with a subtracted start, and whole models, become PEFT's."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.numpy import load_file, save_file
from transformers import LlamaForCausalLM

from adapter_store.bases import BaseModel
from adapter_store.conversion.convert import open_upload
from adapter_store.conversion.model_configs import check_configs
from adapter_store.conversion.options import ConversionOptions
from adapter_store.errors import AdapterInvalid
from adapter_store.layout import WEIGHTS_NAME, read_lora_layout
from adapter_store.peft_config import CONFIG_NAME
from tests.adapter_store.adapters import changed, load_base, write_base
from tests.adapter_store.training import Deltas, add_noise, converted, distance, train

Q0, UP1 = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj"
K0 = "model.layers.0.self_attn.k_proj"
SHAPES = {Q0: (32, 32), K0: (16, 32), UP1: (48, 32)}  # out, in
NUM_HEADS = {Q0: 4, K0: 2}


@pytest.fixture
def factors() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """A [3, in] and B [out, 3] of three modules."""
    random = np.random.default_rng(0)
    return {
        name: (
            random.standard_normal((3, shape[1])).astype(np.float16),
            random.standard_normal((shape[0], 3)).astype(np.float32),
        )
        for name, shape in SHAPES.items()
    }


def deltas_of(factors: dict[str, tuple[np.ndarray, np.ndarray]], scaling: float) -> Deltas:
    return {
        name: torch.from_numpy(scaling * b @ a.astype(np.float32))
        for name, (a, b) in factors.items()
    }


def assert_exact(found: Deltas, expected: Deltas) -> None:
    assert set(found) == set(expected)
    for name, delta in expected.items():
        torch.testing.assert_close(found[name], delta, rtol=1e-6, atol=1e-6)


def refused(folder: Path, base: BaseModel, tmp_path: Path, **options: Any) -> str:
    with pytest.raises(AdapterInvalid) as error:
        converted(folder, tmp_path / f"refused{len([*tmp_path.iterdir()])}", base, **options)
    return str(error.value)


# ---- MLX ---------------------------------------------------------------------------------------


def write_mlx(folder: Path, tensors: dict[str, np.ndarray], **changes: Any) -> Path:
    """Write what mlx_lm.lora writes."""
    folder.mkdir()
    config = {
        "adapter_path": "adapters",
        "batch_size": 4,
        "fine_tune_type": "lora",
        "lora_parameters": {"rank": 3, "dropout": 0.0, "scale": 20.0},
        "num_layers": 2,
        "optimizer_config": {"adam": {}},
    }
    (folder / CONFIG_NAME).write_text(json.dumps(config | changes))
    save_file(tensors, folder / "adapters.safetensors")
    return folder


def mlx_tensors(factors: dict[str, tuple[np.ndarray, np.ndarray]]) -> dict[str, np.ndarray]:
    tensors = {f"{name}.lora_a": a.T.copy() for name, (a, _) in factors.items()}
    return tensors | {f"{name}.lora_b": b.T.copy() for name, (_, b) in factors.items()}


def test_an_adapter_of_mlx_is_converted_exactly(
    factors: Any, base: BaseModel, tmp_path: Path
) -> None:
    folder = write_mlx(tmp_path / "a", mlx_tensors(factors))
    record, found = converted(folder, tmp_path / "b", base)
    assert record.source == "MLX" and record.residuals == {}
    assert_exact(found, deltas_of(factors, 20.0))
    tensors = load_file(tmp_path / "b" / WEIGHTS_NAME)
    for name, (a, b) in factors.items():
        np.testing.assert_array_equal(tensors[f"base_model.model.{name}.lora_A.weight"], a)
        np.testing.assert_array_equal(tensors[f"base_model.model.{name}.lora_B.weight"], b)


def test_dora_of_mlx_keeps_its_magnitudes(factors: Any, base: BaseModel, tmp_path: Path) -> None:
    magnitudes = {
        name: np.arange(1, shape[0] + 1, dtype=np.float32) for name, shape in SHAPES.items()
    }
    tensors = mlx_tensors(factors) | {f"{name}.m": m for name, m in magnitudes.items()}
    folder = write_mlx(tmp_path / "a", tensors, fine_tune_type="dora")
    _, found = converted(folder, tmp_path / "b", base)
    assert_exact(found, deltas_of(factors, 20.0))
    layout, saved = read_lora_layout(tmp_path / "b"), load_file(tmp_path / "b" / WEIGHTS_NAME)
    for name, module in layout.modules.items():
        assert module.magnitude is not None
        np.testing.assert_array_equal(saved[module.magnitude], magnitudes[name])


@pytest.mark.parametrize(
    ("changes", "extra", "reason"),
    [
        ({"fine_tune_type": "other"}, {}, "fine_tune_type='other'"),
        ({"fine_tune_type": "full"}, {}, "adapters.safetensors holds whole weights"),
        ({"fine_tune_type": "dora"}, {}, "'dora' of MLX needs lora_a, lora_b, m"),
        ({"lora_parameters": {"rank": 3}}, {}, "a number as its scale"),
        ({"lora_parameters": {"scale": "20"}}, {}, "a number as its scale"),
        ({}, {f"{Q0}.m": np.zeros(32, np.float32)}, "has lora_a, lora_b, m"),
        ({}, {f"{Q0}.weight": np.zeros(32, np.float32)}, f"{Q0}.weight is neither"),
        ({}, {f"{Q0[:-6]}v_proj.lora_a": np.zeros((32, 3), np.float32)}, "has lora_a, and"),
        ({}, {f"{Q0}.lora_b": np.zeros((2, 3, 32), np.float32)}, "must be matrices"),
    ],
)
def test_what_mlx_has_beside_lora_is_refused(
    changes: dict[str, Any],
    extra: dict[str, np.ndarray],
    reason: str,
    factors: Any,
    base: BaseModel,
    tmp_path: Path,
) -> None:
    folder = write_mlx(tmp_path / "a", mlx_tensors(factors) | extra, **changes)
    assert reason in refused(folder, base, tmp_path)


def test_weights_that_mlx_has_trained_as_a_whole_are_compared_with_the_base(
    base_folder: Path, base: BaseModel, tmp_path: Path
) -> None:
    """mlx_lm.lora --fine-tune-type full saves the last layers, and nothing of what is frozen."""
    expected = tuned(
        base_folder, tmp_path / "model", "1.mlp.up_proj.weight", "1.input_layernorm.weight"
    )
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    last = {name: tensor for name, tensor in tensors.items() if ".layers.1." in name}
    folder = write_mlx(tmp_path / "a", last, fine_tune_type="full")
    record, found = converted(folder, tmp_path / "b", base, base_folder=base_folder)
    assert record.source == "MLX" and set(found) == {UP1} == set(record.residuals)
    assert distance(found[UP1], expected[UP1]) < 1e-5
    norm = "model.layers.1.input_layernorm.weight"
    saved = read_lora_layout(tmp_path / "b").replaced
    assert set(saved) == {norm}
    kept = load_file(tmp_path / "b" / WEIGHTS_NAME)[saved[norm].tensor]
    np.testing.assert_array_equal(kept, tensors[norm])
    last["model.layers.1.adapter.weight"] = np.zeros((2, 2), np.float32)
    folder = write_mlx(tmp_path / "c", last, fine_tune_type="full")
    reason = refused(folder, base, tmp_path, base_folder=base_folder)
    assert "the base has no tensor model.layers.1.adapter.weight" in reason


# ---- llama.cpp ---------------------------------------------------------------------------------

GGUF_NAMES = {Q0: "blk.0.attn_q", K0: "blk.0.attn_k", UP1: "blk.1.ffn_up"}


def write_gguf(
    path: Path,
    tensors: dict[str, np.ndarray],
    architecture: str = "llama",
    alpha: float = 6.0,
    kind: str = "lora",
    quantized: gguf.GGMLQuantizationType | None = None,
) -> Path:
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_type("adapter")
    writer.add_string("adapter.type", kind)
    writer.add_float32("adapter.lora.alpha", alpha)
    for name, tensor in tensors.items():
        if quantized is None:
            writer.add_tensor(name, tensor)
        else:
            data = gguf.quants.quantize(tensor, quantized)
            writer.add_tensor(name, data, raw_dtype=quantized)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def permuted(b: np.ndarray, num_heads: int) -> np.ndarray:
    """Reorder rows as llama.cpp does when it converts q and k: by each head's pairs."""
    size = b.shape[0] // num_heads
    order = [
        head * size + half * size // 2 + pair
        for head in range(num_heads)
        for pair in range(size // 2)
        for half in range(2)
    ]
    return b[order]


def gguf_tensors(
    factors: dict[str, tuple[np.ndarray, np.ndarray]], is_permuted: bool
) -> dict[str, np.ndarray]:
    tensors: dict[str, np.ndarray] = {}
    for name, (a, b) in factors.items():
        rows = permuted(b, NUM_HEADS[name]) if is_permuted and name in NUM_HEADS else b
        tensors[f"{GGUF_NAMES[name]}.weight.lora_a"] = a
        tensors[f"{GGUF_NAMES[name]}.weight.lora_b"] = rows
    return tensors


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_an_adapter_of_llama_cpp_is_converted_exactly(
    architecture: str, factors: Any, base: BaseModel, base_folder: Path, tmp_path: Path
) -> None:
    tensors = gguf_tensors(factors, is_permuted=architecture == "llama")
    path = write_gguf(tmp_path / "a.gguf", tensors, architecture)
    record, found = converted(path, tmp_path / "b", base, base_folder=base_folder)
    assert record.source == "GGUF" and record.residuals == {}
    assert_exact(found, deltas_of(factors, 6.0 / 3))


@pytest.mark.parametrize("dtype", ["BF16", "Q8_0"])
def test_other_dtypes_of_llama_cpp_are_read_as_it_reads_them(
    dtype: str, base: BaseModel, tmp_path: Path
) -> None:
    kind = gguf.GGMLQuantizationType[dtype]
    random = np.random.default_rng(0)
    a, b = (random.standard_normal((32, 32)).astype(np.float32) for _ in range(2))
    tensors = {"blk.0.attn_v.weight.lora_a": a, "blk.0.attn_v.weight.lora_b": b[:16]}
    path = write_gguf(tmp_path / "a.gguf", tensors, "qwen2", 32.0, quantized=kind)
    _, found = converted(tmp_path, tmp_path / "b", base)
    read = {t.name: gguf.quants.dequantize(t.data, kind) for t in gguf.GGUFReader(path).tensors}
    expected = read["blk.0.attn_v.weight.lora_b"] @ read["blk.0.attn_v.weight.lora_a"]
    assert distance(found[f"{Q0[:-6]}v_proj"], torch.from_numpy(expected)) < 1e-6


def test_what_llama_cpp_has_beside_lora_is_refused(
    factors: Any, base: BaseModel, base_folder: Path, tmp_path: Path
) -> None:
    tensors = gguf_tensors(factors, is_permuted=True)
    path = write_gguf(tmp_path / "a.gguf", tensors)
    assert "--base path/to/model" in refused(path, base, tmp_path)
    path = write_gguf(tmp_path / "b.gguf", tensors, "bert")
    assert "general.architecture='bert'" in refused(path, base, tmp_path)
    path = write_gguf(tmp_path / "c.gguf", tensors, kind="control_vector")
    assert "no LoRA adapter" in refused(path, base, tmp_path)
    extra = {"blk.0.attn_norm.weight.lora_a": np.zeros((3, 32), np.float32)}
    path = write_gguf(tmp_path / "d.gguf", tensors | extra, "qwen2")
    assert "blk.0.attn_norm.weight.lora_a" in refused(path, base, tmp_path)
    (tmp_path / "e.gguf").write_bytes(path.read_bytes()[:600])
    assert "not a readable GGUF file" in refused(tmp_path / "e.gguf", base, tmp_path)


# ---- a start that was subtracted from the base -------------------------------------------------


@pytest.mark.filterwarnings("ignore:PiSSA changes the base weights")
@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}], ids=["plain", "rsLoRA"])
def test_an_adapter_with_a_subtracted_start_is_converted_as_peft_does(
    settings: dict[str, Any], base_folder: Path, base: BaseModel, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    targets = ["q_proj", "up_proj"]
    config = LoraConfig(
        task_type="CAUSAL_LM", r=3, init_lora_weights="pissa", target_modules=targets, **settings
    )
    model = get_peft_model(load_base(base_folder), config)
    config.init_lora_weights = True  # as PEFT asks for, to load it again
    model.save_pretrained(tmp_path / "initial")
    add_noise(model, 0.1)
    config.init_lora_weights = "pissa"
    model.save_pretrained(tmp_path / "trained")
    config.init_lora_weights = "pissa"
    assert "--initial-adapter" in refused(tmp_path / "trained", base, tmp_path)
    model.save_pretrained(
        tmp_path / "peft", path_initial_model_for_weight_conversion=str(tmp_path / "initial")
    )
    merged = PeftModel.from_pretrained(load_base(base_folder), str(tmp_path / "peft"))
    after = dict(merged.merge_and_unload().named_parameters())
    record, found = converted(
        tmp_path / "trained", tmp_path / "b", base, initial_folder=tmp_path / "initial"
    )
    assert record.source == "PISSA" and record.residuals == {} and len(found) == 4
    weights = dict(load_base(base_folder).named_parameters())
    for name, delta in found.items():
        expected = after[f"{name}.weight"] - weights[f"{name}.weight"]
        assert distance(delta, expected.detach()) < 1e-5, name


# ---- whole models ------------------------------------------------------------------------------


def tuned(base_folder: Path, folder: Path, *names: str, lora_rank: int = 4) -> Deltas:
    """Add changes of this rank to some parameters."""
    torch.manual_seed(0)
    model: LlamaForCausalLM = load_base(base_folder)
    deltas: Deltas = {}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(names):
                sizes = parameter.shape if parameter.ndim == 2 else (*parameter.shape, 1)
                delta = torch.randn(sizes[0], lora_rank) @ torch.randn(lora_rank, sizes[1])
                parameter.add_(delta.reshape(parameter.shape))
                deltas[name.removesuffix(".weight")] = delta
    model.save_pretrained(folder)
    return deltas


def test_a_model_that_was_trained_as_a_whole_becomes_an_adapter(
    base_folder: Path, base: BaseModel, tmp_path: Path
) -> None:
    expected = tuned(base_folder, tmp_path / "a", "q_proj.weight", "down_proj.weight")
    record, found = converted(
        tmp_path / "a", tmp_path / "b", base, base_folder=base_folder, lora_rank=4
    )
    assert record.source == "FINE_TUNE" and set(record.residuals) == set(expected) == set(found)
    assert all(distance(found[name], delta) < 1e-5 for name, delta in expected.items())
    wider = base_folder  # a change of full rank has no good factors
    tuned(wider, tmp_path / "c", "q_proj.weight", lora_rank=32)
    reason = refused(tmp_path / "c", base, tmp_path, base_folder=base_folder, lora_rank=4)
    assert "q_proj: factors of rank 4 miss 0." in reason and "--max-residual" in reason


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"rms_norm_eps": 1e-5}, "rms_norm_eps=1e-05, and that of the base 1e-06"),
        ({"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}, "rope_theta=500000.0"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, "rope=('linear'"),
        ({"num_attention_heads": 8}, "num_attention_heads=8"),
        ({"tie_word_embeddings": True}, "lm_head.weight differs"),
    ],
)
def test_a_model_that_computes_otherwise_is_refused(
    changes: dict[str, Any], reason: str, base_folder: Path, base: BaseModel, tmp_path: Path
) -> None:
    tuned(base_folder, tmp_path / "a", "q_proj.weight")
    path = tmp_path / "a" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    assert reason in refused(tmp_path / "a", base, tmp_path, base_folder=base_folder)


def test_configs_of_other_versions_of_transformers_say_the_same() -> None:
    config = {"rope_theta": 1e4, "torch_dtype": "float16", "rope_scaling": None, "a": 1}
    newer = {"rope_parameters": {"rope_theta": 1e4, "rope_type": "default"}, "dtype": "bfloat16"}
    check_configs(config, newer)
    scaling = {"factor": 8.0, "type": "llama3"}
    newer = {"rope_parameters": {"rope_theta": 1e4, "rope_type": "llama3", "factor": 8}}
    check_configs({"rope_theta": 1e4, "rope_scaling": scaling}, newer)


def test_what_else_a_model_has_changed_is_refused(
    base_folder: Path, base: BaseModel, tmp_path: Path
) -> None:
    """A matrix that is neither a linear layer's nor the vocabulary's, and a weight that is gone."""
    for name, change in {
        "model.layers.0.self_attn.rotary.weight": lambda t: t,
        "model.norm.weight": lambda t: None,
    }.items():
        folders = [tmp_path / f"{side}-{name}" for side in ("base", "tuned")]
        for at, folder in enumerate(folders):
            shutil.copytree(base_folder, folder)
            tensors = load_file(folder / "model.safetensors")
            tensors.setdefault(name, np.full((2, 2), at, np.float32))
            if at and change(tensors[name]) is None:
                del tensors[name]
            save_file(tensors, folder / "model.safetensors")
        assert name in refused(folders[1], base, tmp_path, base_folder=folders[0])


def test_a_model_without_its_base_or_without_a_change_is_refused(
    base_folder: Path, base: BaseModel, tmp_path: Path
) -> None:
    assert "--base path/to/model" in refused(base_folder, base, tmp_path)
    reason = refused(base_folder, base, tmp_path, base_folder=base_folder)
    assert "same weights" in reason
    other = write_base(tmp_path / "other", seed=1, max_shard_size="20KB")
    assert "factors of rank 4 miss" in refused(
        other, base, tmp_path, base_folder=base_folder, lora_rank=4
    )


# ---- other methods -----------------------------------------------------------------------------

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "prompts": ({"peft_type": "PROMPT_TUNING"}, "trains prompts, not weights"),
    "IA3": ({"peft_type": "IA3"}, "the base must be given by its folder"),
    "norms": ({"peft_type": "LN_TUNING"}, "is none of LN_TUNING's"),
    "tokens": ({"peft_type": "TRAINABLE_TOKENS"}, "token_indices is missing"),
    "unknown": ({"peft_type": "FOURIERFT"}, "only LOHA, LOKR, VERA"),
    "bias": ({"bias": "lora_only"}, "bias='lora_only' of LOHA"),
    "saved": ({"modules_to_save": ["lm_head"]}, "modules_to_save names 'lm_head', but no tensor"),
    "key": ({"use_new_thing": True}, "use_new_thing=True is not a key of LOHA"),
    "rank": ({"r": -1}, "r=-1"),
    "other rank": ({"r": 3}, "rank 2, and 3 in the config"),
    "pattern": ({"target_modules": r"(?=a).*"}, "lookaround"),
    "target": ({"target_modules": ["v_proj"]}, "does not select"),
}


@pytest.fixture(scope="module")
def loha_folder(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("loha")
    train(folder, base_folder, "LoHa", r=2)
    return folder


@pytest.mark.parametrize(("config", "reason"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_converted_is_refused_by_name(
    config: dict[str, Any], reason: str, loha_folder: Path, base: BaseModel, tmp_path: Path
) -> None:
    assert reason in refused(changed(loha_folder, tmp_path / "a", config), base, tmp_path)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda t: {n: v for n, v in t.items() if "hada_w2_b" not in n}, "do not fit"),
        (lambda t: {n: v[:1] if "w1_b" in n else v for n, v in t.items()}, "do not fit"),
        (lambda t: {n: v[:, :3] for n, v in t.items()}, "was made for"),
        (lambda t: {n: v * np.float32(np.nan) for n, v in t.items()}, "NaN"),
        (lambda t: {n.replace("hada_w1_a", "hada_t1"): v for n, v in t.items()}, "hada_t1"),
        (lambda t: {n.replace("layers.1", "layers.9"): v for n, v in t.items()}, "layers.9"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(
    change: Callable[[Any], Any], reason: str, loha_folder: Path, base: BaseModel, tmp_path: Path
) -> None:
    folder = changed(loha_folder, tmp_path / "a", tensors=change)
    assert reason in refused(folder, base, tmp_path)


def test_what_an_adapter_of_another_method_saves_as_a_whole_is_kept(
    base_folder: Path, base: BaseModel, tmp_path: Path
) -> None:
    saved = ["lm_head", "model.norm"]
    expected = train(tmp_path / "a", base_folder, "LoHa", r=2, modules_to_save=saved)
    _, found = converted(tmp_path / "a", tmp_path / "b", base, lora_rank=48)
    assert set(expected) - set(found) == set(saved) and len(found) == 6
    tensors, before = load_file(tmp_path / "b" / WEIGHTS_NAME), load_base(base_folder).state_dict()
    layout = read_lora_layout(tmp_path / "b")
    assert not layout.token_rows and not any(s.is_base for s in layout.replaced.values())
    for name in saved:
        change = (
            tensors[layout.replaced[f"{name}.weight"].tensor] - before[f"{name}.weight"].numpy()
        )
        np.testing.assert_allclose(change, expected[name].numpy(), atol=1e-6)


def test_a_method_that_multiplies_weights_asks_for_the_base(
    base_folder: Path, base: BaseModel, tmp_path: Path
) -> None:
    train(tmp_path / "a", base_folder, "OFT", oft_block_size=8)
    assert "--base path/to/model" in refused(tmp_path / "a", base, tmp_path)


def test_an_adapter_of_peft_is_left_as_it_is(peft_folder: Path) -> None:
    assert open_upload(peft_folder, ConversionOptions()) is None

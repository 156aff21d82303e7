"""Adapters are read as PEFT reads them, refused with a reason, and identified by a digest."""

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import BdLoraConfig
from safetensors.numpy import save_file
from safetensors.torch import load_file as load_torch
from safetensors.torch import save_file as save_torch
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from adapter_store.bases import describe_base
from adapter_store.errors import AdapterInvalid, StoreCorrupt
from adapter_store.layout import WEIGHTS_NAME, read_lora_layout
from adapter_store.manifest import CONFIG_NAME, PreparedAdapter, parse_manifest, prepare
from tests.adapter_store.adapters import PREFIX, changed, load_base, write_peft

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

Check = Callable[[Path], PreparedAdapter]
Q0 = "model.layers.0.self_attn.q_proj"
A0, B0 = f"{PREFIX}{Q0}.lora_A.weight", f"{PREFIX}{Q0}.lora_B.weight"
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


# ---- PEFT as the oracle ------------------------------------------------------------------------

SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "all linear layers": {"target_modules": "all-linear", "r": 3, "lora_alpha": 7},
    "rank-stabilised": {"use_rslora": True, "r": 5, "lora_alpha": 16},
    "patterns": {
        "target_modules": ALL,
        # In alphabetical order, in which PEFT saves them: the first that fits counts.
        "rank_pattern": {"1.self_attn.q_proj": 8, "down_proj": 2, r"layers.1\..*proj": 3},
        "alpha_pattern": {"model.layers.0.self_attn.q_proj": 1, "q_proj": 32},
    },
    "patterns and rank-stabilised": {
        "target_modules": ALL,
        "rank_pattern": {"^model.layers.0.mlp.(gate|up)_proj": 6},
        "alpha_pattern": {r"layers\.\d\.self_attn\.\w+": 5},
        "use_rslora": True,
    },
    "one layer": {"layers_to_transform": [1], "layers_pattern": "layers"},
    "a pattern of targets": {"target_modules": r".*layers\.0\..*(q|up)_proj"},
    "dora": {"use_dora": True, "r": 3},
    "blocks": {"use_bdlora": BdLoraConfig(["layers.1.self_attn.q"], ["layers.0"], 2, False)},
    "exclusions": {"target_modules": ALL, "exclude_modules": ["layers.0.mlp.up_proj", "o_proj"]},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_ranks_and_scalings_are_those_that_peft_uses(
    settings: dict[str, Any], base_folder: Path, tmp_path: Path, check: Check
) -> None:
    model = write_peft(tmp_path / "adapter", base_folder, **settings)
    expected = {
        name.removeprefix(PREFIX): (layer.r["default"], layer.scaling["default"])
        for name, layer in model.named_modules()
        if hasattr(layer, "lora_A")
    }
    layout = read_lora_layout(tmp_path / "adapter")
    assert {n: (m.lora_rank, m.scaling) for n, m in layout.modules.items()} == expected
    assert check(tmp_path / "adapter").manifest.modules == layout.modules
    assert layout.num_parameters == sum(
        p.numel() for n, p in model.named_parameters() if "lora" in n
    )


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_peft_computes_the_same_from_the_rewritten_config(
    settings: dict[str, Any], base_folder: Path, tmp_path: Path, check: Check
) -> None:
    model = write_peft(tmp_path / "adapter", base_folder, **settings)
    prepared = check(tmp_path / "adapter")
    (tmp_path / "adapter" / CONFIG_NAME).write_bytes(prepared.config)
    reloaded = PeftModel.from_pretrained(load_base(base_folder), str(tmp_path / "adapter")).eval()
    token_ids = torch.arange(20)[None]
    with torch.no_grad():
        torch.testing.assert_close(
            reloaded(token_ids).logits, model(token_ids).logits, rtol=0, atol=0
        )
    manifest = prepared.manifest
    assert check(tmp_path / "adapter").manifest == manifest
    assert parse_manifest(manifest.to_json(), manifest.digest) == manifest


@pytest.mark.parametrize("prefix", ["", PREFIX])
@pytest.mark.parametrize("suffix", [".weight", ".default.weight"])
def test_both_spellings_of_tensor_names_are_read(
    prefix: str, suffix: str, peft_folder: Path, tmp_path: Path, check: Check
) -> None:
    def rename(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {
            prefix + name.removeprefix(PREFIX).replace(".weight", suffix): tensor
            for name, tensor in tensors.items()
        }

    layout = check(changed(peft_folder, tmp_path / "a", tensors=rename)).manifest.modules
    original = read_lora_layout(peft_folder).modules
    assert list(layout) == list(original)
    assert layout[Q0].lora_a == f"{prefix}{Q0}.lora_A{suffix}"


@pytest.mark.parametrize("way", ["the base", "each layer"])
def test_an_adapter_of_a_compiled_model_is_read_as_peft_applies_it(
    way: str, base_folder: Path, tmp_path: Path, check: Check
) -> None:
    base = load_base(base_folder)
    if way == "each layer":
        for at, layer in enumerate(base.model.layers):
            base.model.layers[at] = torch.compile(layer, backend="eager")
    torch.manual_seed(3)
    settings: dict[str, Any] = {
        "target_modules": ["q_proj", "down_proj"],
        "rank_pattern": {"layers.1.*q_proj": 2},
        "alpha_pattern": {"down_proj": 5},
    }
    config = LoraConfig(task_type="CAUSAL_LM", r=4, init_lora_weights=False, **settings)
    model = get_peft_model(
        torch.compile(base, backend="eager") if way == "the base" else base, config
    )
    model.save_pretrained(tmp_path / "a")
    tensors = load_torch(tmp_path / "a" / WEIGHTS_NAME)
    assert all("_orig_mod." in name for name in tensors)
    expected = {
        name.removeprefix(PREFIX).replace("_orig_mod.", ""): layer.get_delta_weight("default")
        for name, layer in model.named_modules()
        if hasattr(layer, "lora_A")
    }
    modules = check(tmp_path / "a").manifest.modules
    assert set(modules) == set(expected)
    for name, module in modules.items():
        delta = module.scaling * tensors[module.lora_b] @ tensors[module.lora_a]
        torch.testing.assert_close(delta, expected[name])


def test_a_pattern_that_names_the_wrapper_of_a_compiled_model_is_refused(
    peft_folder: Path, tmp_path: Path, check: Check
) -> None:
    def compiled(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {
            name.replace("model.layers", "_orig_mod.model.layers"): t for name, t in tensors.items()
        }

    wrapped = {"alpha_pattern": {"_orig_mod.model.layers.1.self_attn.q_proj": 32}}
    folder = changed(peft_folder, tmp_path / "a", wrapped, compiled)
    refused(check, folder, "_orig_mod.model.layers.1.self_attn.q_proj", "torch.compile", "patterns")


@pytest.mark.parametrize("dtypes", [(np.float16, np.float32), (np.float32, np.float16)])
def test_a_and_b_may_differ_in_dtype(
    dtypes: tuple[type, type], peft_folder: Path, tmp_path: Path, check: Check
) -> None:
    def cast_each(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {n: t.astype(dtypes["lora_B" in n]) for n, t in tensors.items()}

    modules = check(changed(peft_folder, tmp_path / "a", tensors=cast_each)).manifest.modules
    assert {module.dtype for module in modules.values()} == {"F32"}
    assert {n: m.scaling for n, m in modules.items()} == {
        n: m.scaling for n, m in read_lora_layout(peft_folder).modules.items()
    }


# ---- refusals: the files -----------------------------------------------------------------------


def refused(check: Check, folder: Path, *parts: str) -> None:
    with pytest.raises(AdapterInvalid) as error:
        check(folder)
    for part in parts:
        assert part in str(error.value)


def test_a_folder_without_config_is_refused(
    peft_folder: Path, tmp_path: Path, check: Check
) -> None:
    folder = changed(peft_folder, tmp_path / "a")
    (folder / CONFIG_NAME).unlink()
    refused(check, folder, "has no adapter_config.json")


def test_a_folder_without_weights_is_refused(
    peft_folder: Path, tmp_path: Path, check: Check
) -> None:
    folder = changed(peft_folder, tmp_path / "a")
    (folder / WEIGHTS_NAME).unlink()
    refused(check, folder, "has no adapter_model.safetensors")


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter.pt", "weights.pth"])
def test_pickled_weights_are_refused_by_name(
    name: str, peft_folder: Path, tmp_path: Path, check: Check
) -> None:
    folder = changed(peft_folder, tmp_path / "a")
    (folder / WEIGHTS_NAME).rename(folder / name)
    refused(check, folder, name, "pickle")


def test_a_pickle_next_to_safetensors_is_ignored(
    peft_folder: Path, tmp_path: Path, check: Check
) -> None:
    folder = changed(peft_folder, tmp_path / "a")
    (folder / "training_args.bin").write_bytes(b"pickle")
    assert check(folder).manifest == check(peft_folder).manifest


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("{", "cannot be read"),
        ("[]", "not a JSON object"),
        ('{"r": 4, "r": 8}', "'r' appears twice"),
        ("[" * 100_000, "cannot be read"),
    ],
)
def test_a_config_that_is_no_object_is_refused(
    content: str, reason: str, peft_folder: Path, tmp_path: Path, check: Check
) -> None:
    folder = changed(peft_folder, tmp_path / "a")
    (folder / CONFIG_NAME).write_text(content)
    refused(check, folder, CONFIG_NAME, reason)


def test_a_folder_of_mlx_is_refused_with_the_way_to_peft(
    peft_folder: Path, tmp_path: Path, check: Check
) -> None:
    folder = changed(peft_folder, tmp_path / "a")
    lora = {"rank": 8, "scale": 20.0, "dropout": 0.0}
    config = {"fine_tune_type": "lora", "num_layers": 2, "lora_parameters": lora}
    (folder / CONFIG_NAME).write_text(json.dumps(config))
    (folder / WEIGHTS_NAME).rename(folder / "adapters.safetensors")
    refused(check, folder, "MLX", "transposed", "scale * rank")


def test_large_metadata_is_refused(peft_folder: Path, tmp_path: Path, check: Check) -> None:
    folder = changed(peft_folder, tmp_path / "a")
    tensors = load_torch(folder / WEIGHTS_NAME)
    for metadata, reason in (
        ({"a": "b" * 2**16}, "__metadata__ has 65537 characters, and 65536 are allowed"),
        ({f"{n:x}": "" for n in range(2**18)}, "and 2097152 are allowed"),
    ):
        save_torch(tensors, folder / WEIGHTS_NAME, metadata)
        refused(check, folder, WEIGHTS_NAME, reason)
    save_torch(tensors, folder / WEIGHTS_NAME, {"a": "b" * 2**15})
    assert check(folder).manifest.lora_rank == 4


def test_truncated_weights_are_refused(peft_folder: Path, tmp_path: Path, check: Check) -> None:
    folder = changed(peft_folder, tmp_path / "a")
    path = folder / WEIGHTS_NAME
    path.write_bytes(path.read_bytes()[:-1])
    refused(check, folder, WEIGHTS_NAME, "truncated")


# ---- refusals: the tensors ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("extra", "reasons"),
    [
        (f"{PREFIX}{Q0}.lora_magnitude_vector", [Q0, "lora_magnitude_vector", "use_dora=False"]),
        (f"{PREFIX}{Q0}.lora_B.bias", [Q0, "lora_B.bias", "lora_bias=False"]),
        (f"{PREFIX}{Q0}.base_layer.bias", [Q0, "bias='none'"]),
        (f"{PREFIX}lm_head.lora_A.weight", ["lm_head", "no lora_B"]),
        (f"{PREFIX}lm_head.weight", ["4 token ids, the base 64", "embed_tokens too"]),
        (f"{PREFIX}model.embed_tokens.lora_embedding_A", ["embed_tokens", "no lora_embedding_B"]),
        (f"{PREFIX}model.embed_tokens.weight", ["4 token ids, the base 64", "lm_head too"]),
        (f"{PREFIX}lm_head.base_layer.weight", ["4 token ids, the base 64", "embed_tokens too"]),
        (f"{PREFIX}model.embed_tokens.trainable_tokens_delta", ["trainable_token_indices"]),
        (f"{PREFIX}{Q0}.modules_to_save.weight", [f"replaces {Q0} as a whole"]),
        (
            f"{PREFIX}score.modules_to_save.weight",
            ["score", "replaces score as a whole", "merge_and_unload"],
        ),
        (f"{PREFIX}{Q0}.lora_A.other.weight", [Q0, "neither"]),
        (f"{PREFIX}{Q0}.lora_C.weight", [Q0, "neither"]),
        (f"{PREFIX}{Q0}.lora_A.default.weight", [Q0, "two tensors lora_A"]),
        (f"{PREFIX}model.layers.0.self_attn.k_proj.lora_A.weight", ["k_proj", "no lora_B"]),
    ],
)
def test_a_tensor_that_cannot_be_served_is_named(
    extra: str, reasons: list[str], peft_folder: Path, tmp_path: Path, check: Check
) -> None:
    zeros = np.zeros((4, 32), np.float32)
    folder = changed(peft_folder, tmp_path / "a", tensors=lambda t: t | {extra: zeros})
    refused(check, folder, *reasons)


@pytest.mark.parametrize(
    ("config", "extra", "reasons"),
    [
        ({"use_dora": True}, {}, ["no lora_magnitude_vector", "use_dora=True"]),
        ({"use_bdlora": {"nblocks": 2}}, {}, ["is in neither target_modules_bd_a nor"]),
        (
            {"use_bdlora": {"nblocks": 3, "target_modules_bd_b": ["_proj"]}},
            {},
            ["do not have the config's rank 4 in 3 blocks"],
        ),
        ({"lora_bias": True}, {}, ["no lora_B.bias", "lora_bias=True"]),
        ({"bias": "all"}, {f"{Q0}.bias": (32,)}, [f"{Q0}.bias", "the base does not have"]),
        ({"bias": "all"}, {f"{Q0}.bias": (32, 1)}, [f"{Q0}.bias", "(32, 1)", "a vector"]),
    ],
)
def test_vectors_that_do_not_fit_the_config_or_the_base_are_refused(
    config: dict[str, object],
    extra: dict[str, tuple[int, ...]],
    reasons: list[str],
    peft_folder: Path,
    tmp_path: Path,
    check: Check,
) -> None:
    vectors = {PREFIX + name: np.zeros(shape, np.float32) for name, shape in extra.items()}
    folder = changed(peft_folder, tmp_path / "a", config, lambda t: t | vectors)
    refused(check, folder, *reasons)


def test_norms_of_rows_and_biases_are_part_of_manifest_and_digest(
    base_folder: Path, tmp_path: Path
) -> None:
    """With a base that has biases, which are replaced."""
    write_peft(tmp_path / "a", base_folder, use_dora=True)
    bias = {f"{PREFIX}{Q0}.base_layer.bias": np.ones(32, np.float32)}
    folder = changed(tmp_path / "a", tmp_path / "b", {"bias": "lora_only"}, lambda t: t | bias)
    base = describe_base(base_folder, tmp_path, lambda _: None)
    biased = replace(base, parameters={**base.parameters, f"{Q0}.bias": (32,)})
    both = (tmp_path / "a", folder)
    plain, manifest = (prepare(each, biased, lambda _: None).manifest for each in both)
    assert manifest.modules[Q0].magnitude == f"{PREFIX}{Q0}.lora_magnitude_vector"
    assert manifest.replaced[f"{Q0}.bias"].shape == (32,)
    assert manifest.num_parameters == plain.num_parameters + 32
    assert manifest.digest != plain.digest
    assert parse_manifest(manifest.to_json(), manifest.digest) == manifest


def test_fan_in_fan_out_is_left_out_as_peft_sets_it_anew(
    base_folder: Path, peft_folder: Path, tmp_path: Path, check: Check
) -> None:
    folder = changed(peft_folder, tmp_path / "a", {"fan_in_fan_out": True})
    with pytest.warns(UserWarning, match="Setting fan_in_fan_out to False"):
        PeftModel.from_pretrained(load_base(base_folder), str(folder))
    assert check(folder).manifest.digest == check(peft_folder).manifest.digest


def test_inputs_in_groups_fit_the_base_by_their_size_which_is_in_the_digest(
    peft_folder: Path, tmp_path: Path, check: Check
) -> None:
    def pooled(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {n: t[:, :8].copy() if "lora_A" in n else t for n, t in tensors.items()}

    def of_size(size: int, narrow: bool) -> Path:
        config = {"use_qalora": True, "qalora_group_size": size}
        target = tmp_path / f"{size}-{narrow}"
        return changed(peft_folder, target, config, pooled if narrow else None)

    manifest = check(of_size(4, narrow=True)).manifest
    assert (manifest.modules[Q0].in_features, manifest.modules[Q0].group_size) == (8, 4)
    assert parse_manifest(manifest.to_json(), manifest.digest) == manifest
    refused(check, of_size(2, narrow=True), Q0, "32 x 32 in the base", "was made for 32 x 8")
    whole = [check(of_size(size, narrow=False)).manifest.digest for size in (2, 4)]
    assert len({*whole, check(peft_folder).manifest.digest}) == 3


@pytest.mark.parametrize(("missing", "side"), [(A0, "lora_A"), (B0, "lora_B")])
def test_lora_a_without_lora_b_is_refused_and_vice_versa(
    missing: str, side: str, peft_folder: Path, tmp_path: Path, check: Check
) -> None:
    def without(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        del tensors[missing]
        return tensors

    refused(check, changed(peft_folder, tmp_path / "a", tensors=without), Q0, f"no {side}")


def test_an_adapter_without_tensors_is_refused(
    peft_folder: Path, tmp_path: Path, check: Check
) -> None:
    refused(check, changed(peft_folder, tmp_path / "a", tensors=lambda _: {}), "holds no tensor")


def test_an_adapter_that_activation_checkpointing_emptied_is_refused_with_the_cause(
    base_folder: Path, tmp_path: Path, check: Check
) -> None:
    base = load_base(base_folder)
    for at, layer in enumerate(base.model.layers):
        base.model.layers[at] = checkpoint_wrapper(layer)
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])
    get_peft_model(base, config).save_pretrained(tmp_path / "a")
    refused(
        check, tmp_path / "a", "holds no tensor", "checkpoint_wrapper", "save the adapter again"
    )


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_weights_that_are_not_finite_are_refused(
    bad: float, dtype: torch.dtype, peft_folder: Path, tmp_path: Path, check: Check
) -> None:
    folder = changed(peft_folder, tmp_path / "a")
    tensors = {name: t.to(dtype) for name, t in load_torch(folder / WEIGHTS_NAME).items()}
    tensors[A0][0, 0] = torch.finfo(dtype).max  # finite, and as near as can be
    tensors[A0][1, 1] = torch.finfo(dtype).tiny
    save_torch(tensors, folder / WEIGHTS_NAME)
    assert check(folder).manifest.num_parameters == 4 * (2 * 64 + 2 * 48)
    tensors[B0][-1, -1] = bad
    save_torch(tensors, folder / WEIGHTS_NAME)
    refused(check, folder, B0, "NaN or an infinity")


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.float64, np.int64])
def test_quantised_and_other_number_formats_are_refused(
    dtype: type, peft_folder: Path, tmp_path: Path, check: Check
) -> None:
    folder = changed(
        peft_folder, tmp_path / "a", tensors=lambda t: {n: v.astype(dtype) for n, v in t.items()}
    )
    refused(check, folder, "dtype", "F32, F16, BF16")


def test_a_rank_that_differs_from_the_config_is_refused(
    peft_folder: Path, tmp_path: Path, check: Check
) -> None:
    refused(check, changed(peft_folder, tmp_path / "a", {"r": 8}), Q0, "rank 8")
    folder = changed(peft_folder, tmp_path / "b", {"rank_pattern": {"1.self_attn.v_proj": 2}})
    refused(check, folder, "model.layers.1.self_attn.v_proj", "rank 2")


def test_shapes_that_do_not_fit_the_base_are_refused(
    peft_folder: Path, tmp_path: Path, check: Check
) -> None:
    wide = np.zeros((4, 40), np.float32)
    folder = changed(peft_folder, tmp_path / "a", tensors=lambda t: t | {A0: wide})
    refused(check, folder, Q0, "32 x 32 in the base", "32 x 40")


def test_a_vector_in_place_of_a_matrix_is_refused(
    peft_folder: Path, tmp_path: Path, check: Check
) -> None:
    vector = np.zeros(4, np.float32)
    folder = changed(peft_folder, tmp_path / "a", tensors=lambda t: t | {A0: vector})
    refused(check, folder, Q0, "matrices")


def test_a_module_that_the_base_lacks_is_named(
    peft_folder: Path, tmp_path: Path, check: Check
) -> None:
    def deeper(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {name.replace("layers.1.", "layers.7."): t for name, t in tensors.items()}

    folder = changed(peft_folder, tmp_path / "a", tensors=deeper)
    refused(check, folder, "model.layers.7.self_attn.q_proj", "the base has 2 layers")


def test_a_module_that_the_config_does_not_target_is_refused(
    peft_folder: Path, tmp_path: Path, check: Check
) -> None:
    folder = changed(peft_folder, tmp_path / "a", {"target_modules": ["v_proj"]})
    refused(check, folder, Q0, "target_modules does not select it")


# ---- identity ----------------------------------------------------------------------------------

NOISE = {
    "lora_dropout": 0.3,
    "base_model_name_or_path": "/elsewhere",
    "peft_version": "0.1",
    "inference_mode": False,
    "task_type": None,
    "init_lora_weights": "gaussian",
    "target_modules": r".*\.(v|q)_proj",
    "rank_pattern": {"q_proj": 4, "k_proj": 99},
    "alpha_pattern": {"layers.1.self_attn.v_proj": 8.0},
    "lora_alpha": 8.0,
    "modules_to_save": [],
    "alora_invocation_tokens": [],
    "some_future_option": None,
}


@pytest.mark.parametrize(("key", "value"), NOISE.items(), ids=NOISE)
def test_a_setting_without_effect_does_not_change_the_digest(
    key: str, value: object, peft_folder: Path, tmp_path: Path, check: Check
) -> None:
    folder = changed(peft_folder, tmp_path / "a", {key: value})
    assert check(folder).manifest == check(peft_folder).manifest
    assert check(folder).config == check(peft_folder).config


EFFECTS: dict[str, dict[str, Any]] = {
    "lora_alpha": {"lora_alpha": 9},
    "use_rslora": {"use_rslora": True},
    "alpha_pattern": {"alpha_pattern": {"layers.1.self_attn.v_proj": 9}},
    "alora_invocation_tokens": {"alora_invocation_tokens": [5, 6]},
}


@pytest.mark.parametrize("settings", EFFECTS.values(), ids=EFFECTS)
def test_a_setting_with_an_effect_changes_the_digest(
    settings: dict[str, Any], peft_folder: Path, tmp_path: Path, check: Check
) -> None:
    folder = changed(peft_folder, tmp_path / "a", settings)
    assert check(folder).manifest.digest != check(peft_folder).manifest.digest


def test_one_bit_of_the_weights_changes_the_digest(
    peft_folder: Path, tmp_path: Path, check: Check
) -> None:
    folder = changed(peft_folder, tmp_path / "a")
    raw = bytearray((folder / WEIGHTS_NAME).read_bytes())
    raw[-4] ^= 1
    (folder / WEIGHTS_NAME).write_bytes(raw)
    assert check(folder).manifest.digest != check(peft_folder).manifest.digest


def test_another_base_of_the_same_shape_changes_the_digest(
    peft_folder: Path, base: Any, check: Check
) -> None:
    other = prepare(peft_folder, replace(base, fingerprint="0" * 64), lambda _: None)
    assert other.manifest.digest != check(peft_folder).manifest.digest


# ---- the manifest ------------------------------------------------------------------------------


def test_a_manifest_survives_its_json(peft_folder: Path, check: Check) -> None:
    manifest = check(peft_folder).manifest
    assert parse_manifest(manifest.to_json(), manifest.digest) == manifest
    assert manifest.target_modules == ("q_proj", "v_proj")
    assert manifest.lora_rank == 4
    assert manifest.nbytes == sum(entry.nbytes for entry in manifest.files.values())


def test_a_manifest_of_other_files_is_refused(peft_folder: Path, check: Check) -> None:
    manifest = check(peft_folder).manifest
    data = asdict(manifest)
    data["files"][WEIGHTS_NAME]["sha256"] = "0" * 64
    with pytest.raises(StoreCorrupt, match="describes other files"):
        parse_manifest(json.dumps(data).encode(), manifest.digest)
    for damaged in (b"", b"[]", b"{}", manifest.to_json()[:-1]):
        with pytest.raises(StoreCorrupt, match=manifest.digest):
            parse_manifest(damaged, manifest.digest)


def test_the_engine_reads_a_layout_without_reading_a_tensor(tmp_path: Path) -> None:
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 2, "target_modules": ["q_proj"]}
    (tmp_path / CONFIG_NAME).write_text(json.dumps(config))
    save_file(
        {A0: np.full((1, 8), np.nan, np.float32), B0: np.ones((6, 1), np.float32)},
        tmp_path / WEIGHTS_NAME,
    )
    module = read_lora_layout(tmp_path).modules[Q0]
    assert asdict(module) == {
        "lora_rank": 1,
        "scaling": 2.0,
        "in_features": 8,
        "out_features": 6,
        "dtype": "F32",
        "lora_a": A0,
        "lora_b": B0,
        "lora_b_bias": None,
        "magnitude": None,
        "group_size": None,
        "a_blocks": None,
        "b_blocks": None,
    }


@pytest.mark.parametrize("lost", ["layers.1.self_attn.q_proj", "layers.1.", "v_proj"])
def test_a_file_that_lost_modules_is_refused(
    peft_folder: Path, tmp_path: Path, check: Check, lost: str
) -> None:
    def cut(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {name: tensor for name, tensor in tensors.items() if lost not in name}

    refused(check, changed(peft_folder, tmp_path / "cut", {}, cut), "no tensor of", "of 4 such")

"""Every key of PEFT's configuration is classified, and patterns mean what they mean in PEFT."""

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key

from adapter_store.alora_config import WITHOUT_ALORA
from adapter_store.errors import AdapterInvalid
from adapter_store.peft_config import (
    CONFIG_NAME,
    IGNORED_KEYS,
    NEUTRAL_VALUES,
    UNDERSTOOD_KEYS,
    LoraSettings,
    read_settings,
)

PLAIN: dict[str, Any] = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
MODULES = [
    f"model.layers.{layer}.{name}"
    for layer in (0, 1, 2, 11)
    for name in ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj", "mlp.experts.1.up_proj")
]


def settings_of(folder: Path, **changes: Any) -> LoraSettings:
    (folder / CONFIG_NAME).write_text(json.dumps(PLAIN | changes))
    return read_settings(folder)


def test_every_key_of_the_installed_peft_is_classified_once() -> None:
    classified = [*UNDERSTOOD_KEYS, *IGNORED_KEYS, *NEUTRAL_VALUES]
    assert sorted(classified) == sorted(field.name for field in fields(LoraConfig))


def test_every_neutral_value_is_the_default_of_peft() -> None:
    defaults = LoraConfig()
    assert {k: v for k, (v, _) in NEUTRAL_VALUES.items()} == {
        k: getattr(defaults, k) for k in NEUTRAL_VALUES
    }


ACTIVE: dict[str, Any] = {
    "modules_to_save": ["score"],
    "trainable_token_indices": [1],
    "target_parameters": ["experts.gate_up_proj"],
    "layer_replication": [[0, 2], [1, 2]],
    "arrow_config": {"top_k": 1},
    "kasa_config": {},
    "monteclora_config": {"num_samples": 8},
    "velora_config": {},
    "megatron_config": {"tensor_model_parallel_size": 2},
}


@pytest.mark.parametrize("key", NEUTRAL_VALUES)
def test_a_key_that_changes_the_mathematics_is_refused_by_name(key: str, tmp_path: Path) -> None:
    settings_of(tmp_path, **{key: NEUTRAL_VALUES[key][0]})
    with pytest.raises(AdapterInvalid, match=rf"^{key}=.*not served yet"):
        settings_of(tmp_path, **{key: ACTIVE[key]})


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"peft_type": "IA3"}, "peft_type='IA3'"),
        ({"peft_type": None}, "peft_type=None"),
        ({"r": 0}, "r=0 must be a whole number in 1..1024"),
        ({"r": -4}, "r=-4"),
        ({"r": 1025}, "r=1025"),
        ({"r": 4.0}, "r=4.0"),
        ({"r": True}, "r=True"),
        ({"lora_alpha": "8"}, "lora_alpha='8'"),
        ({"lora_alpha": float("nan")}, "lora_alpha=nan"),
        ({"lora_alpha": 10**400}, "lora_alpha=1000"),
        ({"rank_pattern": {"q_proj": 0}}, r"rank_pattern\['q_proj'\]=0"),
        ({"rank_pattern": ["q_proj"]}, "rank_pattern="),
        ({"alpha_pattern": {"q_proj": None}}, r"alpha_pattern\['q_proj'\]=None"),
        ({"rank_pattern": {"q(": 4}}, "rank_pattern: .* not a valid pattern"),
        ({"rank_pattern": {"(?=a)q": 4}}, "rank_pattern: .* lookaround"),
        ({"target_modules": "(q)\\1_proj"}, "target_modules: .* backreference"),
        ({"target_modules": "a" * 5000}, "target_modules: .* at most 4096"),
        ({"target_modules": None}, "target_modules is missing"),
        ({"target_modules": [1]}, "target_modules="),
        ({"target_modules": "q_proj", "layers_to_transform": [1]}, "layers_to_transform"),
        ({"layers_to_transform": ["1"]}, "layers_to_transform="),
        ({"layers_pattern": 3, "layers_to_transform": 1}, "layers_pattern"),
        ({"use_rslora": "yes"}, "use_rslora='yes'"),
        ({"use_dora": 1}, "use_dora=1"),
        ({"bias": "some"}, "bias='some' must be one of none, all, lora_only"),
        ({"fan_in_fan_out": 1}, "fan_in_fan_out=1 must be true or false"),
        ({"use_qalora": 1}, "use_qalora=1 must be true or false"),
        ({"use_qalora": True, "qalora_group_size": 1}, r"qalora_group_size=1 .* in 2\.\.65536"),
        ({"use_qalora": True, "use_dora": True}, "use_qalora and use_dora=True are not served"),
        ({"use_qalora": True, "use_bdlora": {}}, "use_qalora and use_bdlora are not served"),
        ({"use_bdlora": True}, "use_bdlora=True must be an object"),
        ({"use_bdlora": {"nblocks": 0}}, r"nblocks of use_bdlora=0 .* in 1\.\.1024"),
        ({"use_bdlora": {"n": 2}}, "use_bdlora has a key 'n'"),
        ({"use_bdlora": {"match_strict": 1}}, "match_strict=1 of use_bdlora"),
        ({"use_bdlora": {"target_modules_bd_a": "q"}}, "target_modules_bd_a='q' of use_bdlora"),
        ({"use_bdlora": {}, "lora_bias": True}, "use_bdlora and lora_bias=True are not served"),
        ({"target_parameters": ["a.b"]}, "target_parameters.*: name linear layers in target_mod"),
        ({"layer_replication": [[0, 2]]}, "layer_replication.*: save the model with its stacked"),
        ({"use_dora": True, "lora_bias": True}, "use_dora=True with lora_bias=True"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights='pissa_niter_4'"),
        ({"init_lora_weights": "olora"}, "init_lora_weights='olora'"),
        ({"init_lora_weights": "loftq"}, "init_lora_weights='loftq'"),
        ({"quantum_lora": True}, "quantum_lora=True is not a key"),
        (
            {"alora_invocation_tokens": 5},
            "alora_invocation_tokens=5 must be a list of at most 1024",
        ),
        ({"alora_invocation_tokens": "ab"}, "alora_invocation_tokens='ab' must be a list"),
        (
            {"alora_invocation_tokens": [5] * 1025},
            r"=\[5, 5.*\.\.\. must be a list of at most 1024",
        ),
        ({"alora_invocation_tokens": [5, -1]}, "alora_invocation_tokens: -1 is no token id"),
        ({"alora_invocation_tokens": [True]}, "alora_invocation_tokens: True is no token id"),
        ({"alora_invocation_tokens": [2**31]}, "2147483648 is no token id"),
    ],
)
def test_a_value_out_of_range_is_refused_with_its_key(
    changes: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    with pytest.raises(AdapterInvalid, match=reason):
        settings_of(tmp_path, **changes)


@pytest.mark.parametrize("key", WITHOUT_ALORA)
def test_what_would_act_before_the_invocation_is_refused_with_alora(
    key: str, tmp_path: Path
) -> None:
    value = "all" if key == "bias" else True
    with pytest.raises(AdapterInvalid, match=key):
        settings_of(tmp_path, **{"alora_invocation_tokens": [5], key: value})


@pytest.mark.parametrize(("value", "tokens"), [([5, 6], (5, 6)), ([], ()), (None, ())])
def test_invocation_tokens_are_read_and_an_empty_list_is_none(
    value: list[int] | None, tokens: tuple[int, ...], tmp_path: Path
) -> None:
    settings = settings_of(tmp_path, alora_invocation_tokens=value)
    assert settings.invocation_token_ids == tokens


def test_an_unknown_key_without_a_value_is_harmless(tmp_path: Path) -> None:
    assert settings_of(tmp_path, quantum_lora=None, other=False, third={}).r == 4


def test_a_pattern_as_training_tools_write_them_is_accepted(tmp_path: Path) -> None:
    pattern = (
        r"(?:.*?(?:language|text).*?(?:self_attn|mlp).*?(?:q_proj|v_proj).*?)"
        r"|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|mlp)\.(?:(?:q_proj|v_proj)))"
    )
    targets = settings_of(tmp_path, target_modules=pattern).targets
    assert targets.include("model.layers.0.self_attn.q_proj")
    assert not targets.include("model.layers.0.mlp.up_proj")


# ---- PEFT as the oracle ------------------------------------------------------------------------

keys = st.sampled_from(
    [
        *("q_proj", "proj", "self_attn.q_proj", "layers.1.self_attn.q_proj", "up_proj", "experts"),
        *("model.layers.1.mlp.up_proj", "1.mlp.up_proj", "11.mlp.up_proj", "^model", "mlp"),
        *(r"layers\.\d+\.mlp\.up_proj", r".*\.1\..*", "(q|v)_proj", "^.*q_proj", r"\w*_proj", ""),
        *(
            r"(?:.*\.)*(q|v)_proj",
            r"(?:model\.|layers\.|\d+\.)+mlp\.(?:\w+\.)*up_proj",
        ),
    ]
)
literal_keys = st.sampled_from(["q_proj", "mlp.up_proj", "1.self_attn.v_proj", "", *MODULES])
patterns = st.dictionaries(keys, st.integers(1, 64), max_size=5)


@given(rank_pattern=patterns, alpha_pattern=patterns)
def test_the_first_pattern_that_fits_counts_as_in_peft(
    rank_pattern: dict[str, int],
    alpha_pattern: dict[str, int],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder = tmp_path_factory.getbasetemp()
    settings = settings_of(folder, rank_pattern=rank_pattern, alpha_pattern=alpha_pattern)
    for module in MODULES:
        assert settings.lora_rank(module) == rank_pattern.get(
            get_pattern_key(list(rank_pattern), module), 4
        )
        assert settings.alpha(module) == alpha_pattern.get(
            get_pattern_key(list(alpha_pattern), module), 8
        )


@given(
    targets=st.lists(literal_keys, max_size=4) | keys,
    excluded=st.none() | st.lists(literal_keys, max_size=2) | keys,
    layers=st.none() | st.integers(0, 12) | st.lists(st.integers(0, 12), max_size=3),
    layers_pattern=st.sampled_from([None, "layers", "experts", ["h", "layers"], []]),
)
def test_the_modules_that_peft_wraps_are_the_targets(
    targets: Any,
    excluded: Any,
    layers: Any,
    layers_pattern: Any,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    changes = {
        "target_modules": targets,
        "exclude_modules": excluded,
        "layers_to_transform": None if isinstance(targets, str) else layers,
        "layers_pattern": None if isinstance(targets, str) or layers is None else layers_pattern,
    }
    settings = settings_of(tmp_path_factory.getbasetemp(), **changes)
    config = LoraConfig(**changes)
    for module in MODULES:
        wrapped = check_target_module_exists(config, module)
        included = bool(wrapped) and type(wrapped).__name__ != "_ExcludedModule"
        assert settings.targets.include(module) == included, module

"""Reads each family's config.json into a ModelSpec. The only file that names a family.

Every key of a config is read into the ModelSpec, or allowed only with values that change nothing,
or known to have no effect on a forward pass. Any other key or value is an error that names it, so
that a model is never served with different results than intended. Opens config.json, never the
weights.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from engine.model.config_keys import IRRELEVANT, NEUTRAL, ConfigKeys
from engine.model.quantized_checkpoint import Scheme, parse_scheme
from engine.model.rope_keys import RopeReader
from engine.model.spec import ModelError, ModelSpec

ACTIVATIONS = {"silu": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh"}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, slots=True)
class _Family:
    """The reader of one model_type, its causal model's class, and its keys with neutral values."""

    read: Callable[[ConfigKeys, int | None], ModelSpec]
    architecture: str
    neutral: dict[str, tuple[Any, ...]] = field(default_factory=dict[str, tuple[Any, ...]])


def read_spec(folder: Path, max_model_len: int | None) -> ModelSpec:
    """Read the checkpoint's architecture, for sequences of up to `max_model_len` tokens."""
    config = _config(folder)
    model_type = config.text("model_type")
    if model_type not in FAMILIES:
        raise config.error("model_type", model_type, f"one of {', '.join(FAMILIES)}")
    family = FAMILIES[model_type]
    architectures = config.take("architectures", None)
    if architectures not in (None, [family.architecture]):
        raise config.error("architectures", architectures, f"[{family.architecture!r}]")
    spec = family.read(config, max_model_len)
    parse_scheme(config)  # checked only: the storage of weights is no part of the architecture
    config.finish(NEUTRAL | family.neutral, IRRELEVANT)
    if max_model_len is not None and not 1 <= max_model_len <= spec.max_position:
        raise ModelError(f"max_model_len={max_model_len} is outside 1..{spec.max_position}")
    return spec


def read_scheme(folder: Path) -> Scheme | None:
    """Read how the checkpoint in `folder` stores its linear layers; None: dense."""
    return parse_scheme(_config(folder))


def read_dtype(folder: Path) -> torch.dtype:
    """Read the dtype that config.json names. Raises ModelError if it is missing or unknown."""
    raw = read_json(folder / "config.json")
    name = raw.get("dtype", raw.get("torch_dtype"))
    if name not in DTYPES:
        raise ModelError(
            f"{folder / 'config.json'}: dtype={name!r} is not one of {', '.join(DTYPES)}; "
            "say which to use with the engine's own dtype setting"
        )
    return DTYPES[name]


def _config(folder: Path) -> ConfigKeys:
    return ConfigKeys(read_json(folder / "config.json"), str(folder / "config.json"))


def read_json(path: Path) -> dict[str, Any]:
    """Read a file that holds an object. Raises ModelError."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ModelError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path} holds a {type(content).__name__}, not an object")
    return content


# ==== Families ====


def _llama(config: ConfigKeys, max_model_len: int | None) -> ModelSpec:
    return _spec(config, max_model_len, biased_sites=_biased_sites(config))


def _granite(config: ConfigKeys, max_model_len: int | None) -> ModelSpec:
    return _spec(
        config,
        max_model_len,
        biased_sites=_biased_sites(config),
        attention_scale=config.number("attention_multiplier", 1.0),
        embedding_scale=config.number("embedding_multiplier", 1.0),
        residual_scale=config.number("residual_multiplier", 1.0),
        logit_scale=1.0 / config.number("logits_scaling", 1.0),
    )


def _mistral(config: ConfigKeys, max_model_len: int | None) -> ModelSpec:
    config.require("num_key_value_heads")
    window = config.optional_integer("sliding_window", 4096)
    return _spec(config, max_model_len, windows=[window] * _num_layers(config))


def _qwen2(config: ConfigKeys, max_model_len: int | None) -> ModelSpec:
    config.require("num_key_value_heads")
    windows = _windows_of_late_layers(config)
    return _spec(config, max_model_len, biased_sites=("qkv",), windows=windows)


def _qwen3(config: ConfigKeys, max_model_len: int | None) -> ModelSpec:
    config.require("head_dim", "num_key_value_heads")
    return _spec(
        config,
        max_model_len,
        biased_sites=_attention_biases(config),
        windows=_windows_of_late_layers(config),
        qk_norm=True,
    )


def _gemma2(config: ConfigKeys, max_model_len: int | None) -> ModelSpec:
    every_other = ["full_attention" if i % 2 else "sliding_attention" for i in _layers(config)]
    types = _layer_types(config, every_other)
    return _spec(
        config,
        max_model_len,
        windows=_windows(config, types, config.optional_integer("sliding_window", 4096)),
        attention_soft_cap=config.optional_number("attn_logit_softcapping", 50.0),
        logit_soft_cap=config.optional_number("final_logit_softcapping", 30.0),
        **_gemma_facts(config),
    )


def _gemma3(config: ConfigKeys, max_model_len: int | None) -> ModelSpec:
    default = config.integer("_sliding_window_pattern", 6)
    pattern = config.integer("sliding_window_pattern", default)
    every_nth = [
        "sliding_attention" if (i + 1) % pattern else "full_attention" for i in _layers(config)
    ]
    types = _layer_types(config, every_nth)
    return _spec(
        config,
        max_model_len,
        windows=_windows(config, types, config.optional_integer("sliding_window", 4096)),
        rope_keys=_rope_keys_by_type(config, types),
        logit_soft_cap=config.optional_number("final_logit_softcapping", None),
        qk_norm=True,
        **_gemma_facts(config),
    )


def _phi3(config: ConfigKeys, max_model_len: int | None) -> ModelSpec:
    rope = _rope_keys(config)
    kind = rope.setdefault("rope_type", rope.pop("type", "default"))
    if kind in ("su", "yarn"):  # the names in this family's first checkpoints
        rope["rope_type"] = "longrope"
    trained_len = config.integer("original_max_position_embeddings", 4096)
    if rope["rope_type"] == "longrope":
        rope["original_max_position_embeddings"] = trained_len
    return _spec(
        config,
        max_model_len,
        windows=[config.optional_integer("sliding_window", None)] * _num_layers(config),
        rope_keys=[rope] * _num_layers(config),
        partial_rotary=True,
        fused_sites=("qkv", "gate_up"),
    )


def _gemma_facts(config: ConfigKeys) -> dict[str, Any]:
    config.require("head_dim", "num_key_value_heads")
    return {
        "biased_sites": _attention_biases(config),
        "activation": config.text("hidden_activation", "gelu_pytorch_tanh"),
        "attention_scale": config.number("query_pre_attn_scalar", 256) ** -0.5,
        "embedding_scale": config.integer("hidden_size") ** 0.5,
        "norm_offset": 1.0,
        "sandwich_norm": True,
        "tied_embeddings": config.flag("tie_word_embeddings", True),
    }


_WINDOWED: dict[str, tuple[Any, ...]] = {"use_mrope": (False,)}
_GEMMA: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("gelu_pytorch_tanh",),
    "use_bidirectional_attention": (False,),
}

FAMILIES = {
    "llama": _Family(_llama, "LlamaForCausalLM", {"rope_interleaved": (False,)}),
    "mistral": _Family(_mistral, "MistralForCausalLM"),
    "qwen2": _Family(_qwen2, "Qwen2ForCausalLM", _WINDOWED),
    "qwen3": _Family(_qwen3, "Qwen3ForCausalLM", _WINDOWED),
    "gemma2": _Family(_gemma2, "Gemma2ForCausalLM", _GEMMA),
    "gemma3_text": _Family(_gemma3, "Gemma3ForCausalLM", _GEMMA | {"attn_logit_softcapping": ()}),
    "phi3": _Family(
        _phi3,
        "Phi3ForCausalLM",
        {
            "attention_bias": (False,),
            "full_attn_mod": (1,),
            "interpolate_factor": (1,),
            "lm_head_bias": (False,),
            "mlp_bias": (False,),
        },
    ),
    "granite": _Family(_granite, "GraniteForCausalLM"),
}


# ==== shared by families ====


def _spec(
    config: ConfigKeys,
    max_model_len: int | None,
    *,
    biased_sites: tuple[str, ...] = (),
    fused_sites: tuple[str, ...] = (),
    windows: list[int | None] | None = None,
    rope_keys: list[dict[str, Any]] | None = None,
    partial_rotary: bool = False,
    activation: str | None = None,
    attention_scale: float | None = None,
    attention_soft_cap: float | None = None,
    logit_soft_cap: float | None = None,
    tied_embeddings: bool | None = None,
    norm_offset: float = 0.0,
    sandwich_norm: bool = False,
    qk_norm: bool = False,
    embedding_scale: float = 1.0,
    residual_scale: float = 1.0,
    logit_scale: float = 1.0,
) -> ModelSpec:
    """Build a ModelSpec from keys of equal meaning in all families, and the family's own facts."""
    num_layers, num_heads = _num_layers(config), config.integer("num_attention_heads")
    num_kv_heads = config.optional_integer("num_key_value_heads", None) or num_heads
    hidden_size = config.integer("hidden_size")
    head_dim = config.optional_integer("head_dim", None) or hidden_size // num_heads
    if num_heads % num_kv_heads:
        raise config.error("num_key_value_heads", num_kv_heads, f"a divisor of {num_heads}")
    if activation is None:
        activation = config.text("hidden_act", "silu")
    if activation not in ACTIVATIONS:
        raise config.error("activation", activation, f"one of {', '.join(ACTIVATIONS)}")
    ropes = RopeReader(config.where, head_dim, config.integer("max_position_embeddings"))
    rotaries = [
        ropes.read(keys, max_model_len, partial_rotary)
        for keys in rope_keys or [_rope_keys(config)] * num_layers
    ]
    tied_by_key = config.flag("tie_word_embeddings", False)
    return ModelSpec(
        vocab_size=config.integer("vocab_size"),
        num_layers=num_layers,
        hidden_size=hidden_size,
        intermediate_size=config.integer("intermediate_size"),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        max_position=min(ropes.longest(rotary.scaling) for rotary in rotaries),
        biased_sites=biased_sites,
        fused_sites=fused_sites,
        tied_embeddings=tied_by_key if tied_embeddings is None else tied_embeddings,
        activation=ACTIVATIONS[activation],
        norm_eps=config.number("rms_norm_eps"),
        norm_offset=norm_offset,
        sandwich_norm=sandwich_norm,
        qk_norm=qk_norm,
        attention_scale=head_dim**-0.5 if attention_scale is None else attention_scale,
        attention_soft_cap=attention_soft_cap,
        windows=tuple(windows or [None] * num_layers),
        rotaries=tuple(rotaries),
        embedding_scale=embedding_scale,
        residual_scale=residual_scale,
        logit_scale=logit_scale,
        logit_soft_cap=logit_soft_cap,
    )


def _num_layers(config: ConfigKeys) -> int:
    return config.integer("num_hidden_layers")


def _layers(config: ConfigKeys) -> range:
    return range(_num_layers(config))


def _attention_biases(config: ConfigKeys) -> tuple[str, ...]:
    return ("qkv", "o") if config.flag("attention_bias", False) else ()


def _biased_sites(config: ConfigKeys) -> tuple[str, ...]:
    mlp = ("gate_up", "down") if config.flag("mlp_bias", False) else ()
    return (*_attention_biases(config), *mlp)


def _layer_types(config: ConfigKeys, default: list[str]) -> list[str]:
    types = config.take("layer_types", None) or default
    known = {"full_attention", "sliding_attention"}
    if not isinstance(types, list) or len(types) != len(default) or not known.issuperset(types):
        allowed = f"{len(default)} times one of {', '.join(sorted(known))}"
        raise config.error("layer_types", types, allowed)
    return types


def _windows(config: ConfigKeys, types: list[str], window: int | None) -> list[int | None]:
    if "sliding_attention" in types and window is None:
        raise config.error("sliding_window", None, "an integer: layer_types has sliding layers")
    return [window if kind == "sliding_attention" else None for kind in types]


def _windows_of_late_layers(config: ConfigKeys) -> list[int | None]:
    """Give layers from `max_window_layers` on a window, if `use_sliding_window` is set."""
    window = config.optional_integer("sliding_window", 4096)
    first = config.integer("max_window_layers", 28, low=0)
    if not config.flag("use_sliding_window", False):
        window = None
    types = [
        "sliding_attention" if window is not None and i >= first else "full_attention"
        for i in _layers(config)
    ]
    return _windows(config, _layer_types(config, types), window)


# ==== Rotary positions ====


def _rope_keys(config: ConfigKeys, default_theta: float = 10000.0) -> dict[str, Any]:
    """Read `rope_parameters`, or `rope_scaling` and `rope_theta` in older files."""
    new, old = config.mapping("rope_parameters"), config.mapping("rope_scaling")
    keys = dict(old or new or {})
    theta = config.optional_number("rope_theta", None)
    if keys.get("rope_theta") is None:
        keys["rope_theta"] = default_theta if theta is None else theta
    partial = config.optional_number("partial_rotary_factor", None)
    if partial is not None:
        keys.setdefault("partial_rotary_factor", partial)
    return keys


def _rope_keys_by_type(config: ConfigKeys, types: list[str]) -> list[dict[str, Any]]:
    """Read one set of keys per layer, by its type; older files scale full attention only."""
    nested = config.mapping("rope_parameters") or {}
    scaling = config.mapping("rope_scaling") or {}
    thetas = {
        "full_attention": config.number("rope_theta", 1_000_000.0),
        "sliding_attention": config.number("rope_local_base_freq", 10_000.0),
    }
    if not set(nested) <= set(thetas):
        raise config.error("rope_parameters", nested, f"keyed by {', '.join(thetas)}")
    found = {
        kind: {"rope_theta": theta} | (nested.get(kind) or {}) for kind, theta in thetas.items()
    }
    found["full_attention"] |= scaling
    return [found[kind] for kind in types]

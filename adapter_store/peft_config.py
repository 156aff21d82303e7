"""Read adapter_config.json: the modules that an adapter changes, with their ranks and scalings.

Every key of PEFT's LoRA configuration is in one of the four tables below. A key that would change
the mathematics in a way that is not served is refused by name, and so is an unknown key with a
value: an adapter is served as PEFT would run it, or not at all.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

from adapter_store.alora_config import read_invocation
from adapter_store.compact_config import BlockDiagonal, read_blocks, read_group_size
from adapter_store.errors import AdapterInvalid
from adapter_store.patterns import Budget, Pattern, compile_pattern
from adapter_store.safetensors_file import unique_keys
from adapter_store.targets import Targets, listed, read_targets

CONFIG_NAME = "adapter_config.json"
MAX_CONFIG_BYTES = 4 * 2**20
MAX_LORA_RANK = 1024
MAX_LORA_ALPHA = 1e6

# Read below: together with the tensors they define the mathematics.
UNDERSTOOD_KEYS = (
    *("peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
    *("init_lora_weights", "use_dora", "lora_bias", "bias", "alora_invocation_tokens"),
    *("modules_to_save", "trainable_token_indices", "ensure_weight_tying", "fan_in_fan_out"),
    *("use_qalora", "qalora_group_size", "use_bdlora"),
)
EMBEDDING, HEAD = "embed_tokens", "lm_head"  # the last parts of their modules' names
MAX_TOKEN_ID = 2**24
BIASES = ("none", "all", "lora_only")
# Ignored: they describe training or provenance, or are options of a key that is refused.
IGNORED_KEYS = (
    *("task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
    *("inference_mode", "lora_dropout", "eva_config", "corda_config", "loftq_config"),
    *("lora_ga_config", "megatron_core", "runtime_config"),
)
# Refused unless neutral: the only value that is served, and what any other one means.
NEUTRAL_VALUES: dict[str, tuple[object, str]] = {
    "target_parameters": (None, "LoRA on bare parameters"),
    "layer_replication": (None, "layers that are stacked anew"),
    "arrow_config": (None, "Arrow routing between adapters"),
    "kasa_config": (None, "KaSA's diagonal of singular values"),
    "monteclora_config": (None, "Monte Carlo noise on the weights"),
    "velora_config": (None, "VeLoRA's compressed activations"),
    "megatron_config": (None, "Megatron's parallel layers"),
}
# What to do instead, where there is a way
WAYS_OUT = {
    "target_parameters": (
        "name linear layers in target_modules, or merge the adapter (merge_and_unload) and serve "
        "the merged model as a base"
    ),
    "layer_replication": (
        "save the model with its stacked layers, each with weights of its own, as a base, serve "
        "that, and publish the adapter for it without this key"
    ),
}
# Accepted initialisations of training. Every other one also rewrites the base's weights, so the
# adapter is useless without them; PEFT converts such an adapter with
# save_pretrained(path_initial_model_for_weight_conversion=).
NEUTRAL_INITS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")


@dataclass(frozen=True, slots=True)
class LoraSettings:
    """The part of the configuration that decides what the adapter computes."""

    r: int
    lora_alpha: float
    use_rslora: bool
    rank_pattern: tuple[tuple[Pattern, int], ...]
    alpha_pattern: tuple[tuple[Pattern, float], ...]
    targets: Targets
    use_dora: bool = False
    lora_bias: bool = False
    bias: str = "none"  # which biases of the base were trained: one of BIASES
    invocation_token_ids: tuple[int, ...] = ()  # of an aLoRA: it acts from their last place on
    modules_to_save: tuple[str, ...] = ()  # ends of the names of modules that are replaced
    token_ids: Mapping[str, tuple[int, ...]] = field(default_factory=dict[str, tuple[int, ...]])
    ensure_weight_tying: bool = False
    group_size: int = 0  # of the inputs that QALoRA averages; 0: none
    block_diagonal: BlockDiagonal | None = None  # BD-LoRA's
    names: Mapping[str, str] = field(default_factory=dict[str, str])  # by which patterns know them

    def naming(self, names: Mapping[str, str]) -> "LoraSettings":
        """Return the same settings for modules that its patterns know by other names."""
        return replace(self, names=names)

    def include(self, module: str) -> bool:
        """Check whether PEFT would wrap the module of this name."""
        return self.targets.include(self.name(module))

    def lora_rank(self, module: str) -> int:
        """Return the rank of the module of this name."""
        name = self.name(module)
        return next((r for key, r in self.rank_pattern if key.match(name)), self.r)

    def alpha(self, module: str) -> float:
        """Return lora_alpha for the module of this name."""
        name = self.name(module)
        return next((a for key, a in self.alpha_pattern if key.match(name)), self.lora_alpha)

    def scaling(self, module: str) -> float:
        """Return the factor of B A x: alpha / r, or alpha / sqrt(r) with rsLoRA."""
        r = self.lora_rank(module)
        return self.alpha(module) / (math.sqrt(r) if self.use_rslora else r)

    def blocks(self, module: str) -> tuple[int, int]:
        """Return of how many blocks A and B of the module consist. Raises AdapterInvalid."""
        if self.block_diagonal is None:
            return 1, 1
        return self.block_diagonal.blocks(self.name(module))

    def effect(self, module: str) -> tuple[bool, int, float]:
        """Return all that the settings say of a module: is it wrapped, its rank, its alpha."""
        return self.include(module), self.lora_rank(module), self.alpha(module)

    def name(self, module: str) -> str:
        """Return the name by which patterns know the module."""
        return self.names.get(module, module)


def read_settings(folder: Path) -> LoraSettings:
    """Read the settings of an adapter folder; AdapterInvalid with the key, value and reason."""
    return settings_of(read_config(folder))


def read_config(folder: Path) -> dict[str, Any]:
    """Read the configuration as it is written. Raises AdapterInvalid."""
    path = folder / CONFIG_NAME
    try:
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise ValueError(f"it is larger than {MAX_CONFIG_BYTES} bytes")
        config = json.loads(path.read_bytes(), object_pairs_hook=unique_keys)
    except FileNotFoundError as error:
        raise AdapterInvalid(f"{folder} has no {CONFIG_NAME}") from error
    except (OSError, ValueError, RecursionError) as error:
        raise AdapterInvalid(f"{path} cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise AdapterInvalid(f"{path} is not a JSON object")
    return cast("dict[str, Any]", config)


def settings_of(config: dict[str, Any]) -> LoraSettings:
    """Read the settings of a configuration; AdapterInvalid with the key, value and reason."""
    _refuse_unserved(config)
    budget = Budget()
    use_dora, lora_bias = _flag(config, "use_dora"), _flag(config, "lora_bias")
    _flag(
        config, "fan_in_fan_out"
    )  # PEFT sets it anew by the kind of each layer, so it says nothing
    if use_dora and lora_bias:
        raise AdapterInvalid("use_dora=True with lora_bias=True is not served: PEFT refuses it too")
    bias = config.get("bias", "none")
    bias = "none" if bias is None else bias
    if bias not in BIASES:
        raise AdapterInvalid(f"bias={bias!r} must be one of {', '.join(BIASES)}")
    rank_pattern: dict[str, Any] = _mapping(config, "rank_pattern")
    alpha_pattern: dict[str, Any] = _mapping(config, "alpha_pattern")
    return LoraSettings(
        r=_rank("r", config.get("r", 8)),
        lora_alpha=_alpha("lora_alpha", config.get("lora_alpha", 8)),
        use_rslora=_flag(config, "use_rslora"),
        rank_pattern=tuple(
            (_suffix("rank_pattern", key, budget), _rank(f"rank_pattern[{key!r}]", value))
            for key, value in rank_pattern.items()
        ),
        alpha_pattern=tuple(
            (_suffix("alpha_pattern", key, budget), _alpha(f"alpha_pattern[{key!r}]", value))
            for key, value in alpha_pattern.items()
        ),
        targets=read_targets(config, budget),
        use_dora=use_dora,
        lora_bias=lora_bias,
        bias=bias,
        invocation_token_ids=read_invocation(config),
        modules_to_save=_names_to_save(config),
        token_ids=_token_ids(config.get("trainable_token_indices")),
        ensure_weight_tying=_flag(config, "ensure_weight_tying"),
        group_size=read_group_size(config),
        block_diagonal=read_blocks(config),
    )


def _refuse_unserved(config: dict[str, Any]) -> None:
    if "peft_type" not in config and "lora_parameters" in config:
        raise AdapterInvalid(
            f"{CONFIG_NAME} with lora_parameters is MLX's, which is not served as it stands; "
            "publish it with --convert, or make a PEFT folder: each lora_a transposed is a "
            "lora_A.weight, each lora_b transposed a lora_B.weight, and lora_alpha is scale * rank"
        )
    if config.get("peft_type") != "LORA":
        raise AdapterInvalid(
            f"peft_type={config.get('peft_type')!r} is not served, only 'LORA'; --convert makes "
            "LoRA of what changes weights"
        )
    init = config.get("init_lora_weights", True)
    if init not in NEUTRAL_INITS:
        raise AdapterInvalid(
            f"init_lora_weights={init!r} also changed the base's weights; save the adapter with "
            "PEFT's path_initial_model_for_weight_conversion, or publish it with --convert and "
            "--initial-adapter"
        )
    for key, value in config.items():
        if key in NEUTRAL_VALUES:
            neutral, meaning = NEUTRAL_VALUES[key]
            if value not in (neutral, None, []):
                instead = f": {WAYS_OUT[key]}" if key in WAYS_OUT else ""
                raise AdapterInvalid(f"{key}={value!r} ({meaning}) is not served yet{instead}")
        elif key not in UNDERSTOOD_KEYS and key not in IGNORED_KEYS and value:
            raise AdapterInvalid(
                f"{key}={value!r} is not a key of a PEFT LoRA configuration that is known here, "
                "so it may change what the adapter computes"
            )


def _suffix(key: str, pattern: str, budget: Budget) -> Pattern:
    """Compile a key of rank_pattern or alpha_pattern, which PEFT matches with the end of a name."""
    return compile_pattern(key, pattern, budget, rf"(.*\.)?({pattern})$")


def _mapping(config: dict[str, Any], key: str) -> dict[str, Any]:
    value: Any = config.get(key)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise AdapterInvalid(f"{key}={value!r} must map module names to numbers")
    return cast("dict[str, Any]", value)


def _rank(key: str, value: Any) -> int:
    if type(value) is not int or not 1 <= value <= MAX_LORA_RANK:
        raise AdapterInvalid(f"{key}={value!r} must be a whole number in 1..{MAX_LORA_RANK}")
    return value


def _alpha(key: str, value: Any) -> float:
    if type(value) not in (int, float) or not -MAX_LORA_ALPHA <= value <= MAX_LORA_ALPHA:
        raise AdapterInvalid(f"{key}={value!r} must be a number in +-{MAX_LORA_ALPHA:g}")
    return value


def _flag(config: dict[str, Any], key: str) -> bool:
    value = config.get(key) or False
    if type(value) is not bool:
        raise AdapterInvalid(f"{key}={value!r} must be true or false")
    return value


def _names_to_save(config: dict[str, Any]) -> tuple[str, ...]:
    names = config.get("modules_to_save")
    found = [] if names is None else listed(names)
    if not all(isinstance(name, str) and name for name in found):
        raise AdapterInvalid(f"modules_to_save={names!r} must be a list of module names")
    return tuple(found)


def _token_ids(value: Any) -> dict[str, tuple[int, ...]]:
    """Read trainable_token_indices: of the embedding, or of each module that it names."""
    by_module: dict[Any, Any] = {}
    if isinstance(value, dict):
        by_module = cast("dict[Any, Any]", value)
    elif value is not None:
        by_module = {EMBEDDING: value}
    for module, ids in by_module.items():
        if module.rpartition(".")[2] not in (EMBEDDING, HEAD):
            raise AdapterInvalid(
                f"trainable_token_indices of {module!r} are not served: only those of "
                f"{EMBEDDING} and {HEAD}"
            )
        found = listed(ids)
        if not all(type(i) is int and 0 <= i <= MAX_TOKEN_ID for i in found):
            raise AdapterInvalid(
                f"trainable_token_indices of {module} must be whole numbers in 0..{MAX_TOKEN_ID}"
            )
        if len(set(found)) < len(found):
            raise AdapterInvalid(f"trainable_token_indices of {module} name a token twice")
    return {module.rpartition(".")[2]: tuple(listed(ids)) for module, ids in by_module.items()}

"""Describe an adapter: the modules it changes, their ranks and scalings, and its digest.

The engine needs `read_lora_layout` alone. `prepare` checks an upload completely and computes its
identity: the digest of its weights, of the settings that matter, of its chat template if it has one
and of its base. Knows nothing of names, versions or stores.
"""

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from adapter_store.bases import BaseModel
from adapter_store.chat_template import TEMPLATE_NAME, read_adapter_template
from adapter_store.errors import AdapterInvalid, StoreCorrupt
from adapter_store.object_store import OnBytes
from adapter_store.peft_config import CONFIG_NAME, LoraSettings, read_settings
from adapter_store.recipes import Recipe, parse_recipe
from adapter_store.safetensors_file import (
    HeaderLimits,
    TensorEntry,
    find_not_finite,
    hash_file,
    read_header,
)
from adapter_store.tensor_causes import cause_of, refuse_broken
from adapter_store.tensor_names import Role, parse_tensor_name
from adapter_store.wrapped_names import configured_name, plain_name, whole_name, without_prefix

WEIGHTS_NAME = "adapter_model.safetensors"
MANIFEST_NAME = "manifest.json"
WEIGHT_DTYPES = ("F32", "F16", "BF16")
# A hundred layers of seven modules have a header of 0.2 MiB. It is parsed in the engine's process,
# where a large one would stop all streams.
HEADER_LIMITS = HeaderLimits(header_bytes=2 * 2**20, metadata_chars=64 * 2**10)
_DIGEST = re.compile(r"[0-9a-f]{64}")
_SAVED_EMBEDDINGS = (
    "; PEFT saves it after the vocabulary was resized, and if target_modules or modules_to_save "
    "name it. If it was not trained, save the adapter again with save_embedding_layers=False; if "
    "it was, merge the adapter (merge_and_unload) and serve the result as a base"
)
_WAYS_OUT = {"embed_tokens": _SAVED_EMBEDDINGS, "lm_head": _SAVED_EMBEDDINGS}
_UNSERVED_TENSORS = {  # part of a tensor's name: what such a tensor holds
    "modules_to_save": "modules that are replaced as a whole",
    "lora_embedding_": "LoRA on token embeddings",
    "trainable_tokens": "retrained token embeddings",
    "embed_tokens": "token embeddings",
    "lm_head": "an output layer",
    "lora_diag": "KaSA's diagonal of singular values",
    ".base_layer.weight": "weights of the base",
}


@dataclass(frozen=True, slots=True)
class LoraModule:
    """One adapted linear layer: y += scaling * (x @ A^T) @ B^T, A [R, in] and B [out, R]."""

    lora_rank: int
    scaling: float
    in_features: int
    out_features: int
    dtype: str  # "F32", "F16" or "BF16", of A and of B; "F32" if they differ
    lora_a: str  # tensor names in adapter_model.safetensors
    lora_b: str
    lora_b_bias: str | None = None  # tensor [out], scaled and added with B
    magnitude: str | None = None  # tensor [out], of DoRA: the norm of each row of W + scaling B A


@dataclass(frozen=True, slots=True)
class SavedTensor:
    """A parameter of the base that the adapter replaces as a whole."""

    tensor: str  # name in adapter_model.safetensors
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True, slots=True)
class LoraLayout:
    """What an adapter changes, by paths in the base.

    `modules` are linear layers with factors (model.layers.0.self_attn.q_proj), `replaced` are
    parameters (model.layers.0.self_attn.q_proj.bias).
    """

    modules: Mapping[str, LoraModule]
    replaced: Mapping[str, SavedTensor] = field(default_factory=dict[str, SavedTensor])

    @property
    def lora_rank(self) -> int:
        """The rank of the widest module."""
        return max(module.lora_rank for module in self.modules.values())

    @property
    def num_parameters(self) -> int:
        """The number of elements of all tensors."""
        return sum(_num_parameters(module) for module in self.modules.values()) + sum(
            math.prod(saved.shape) for saved in self.replaced.values()
        )

    @property
    def has_factors_alone(self) -> bool:
        """Whether the adapter is a sum of products of A and B, and nothing else."""
        return not self.replaced and all(
            module.lora_b_bias is None and module.magnitude is None
            for module in self.modules.values()
        )


def _num_parameters(module: LoraModule) -> int:
    vectors = (module.lora_b_bias is not None) + (module.magnitude is not None)
    inner = module.lora_rank * (module.in_features + module.out_features)
    return inner + vectors * module.out_features


@dataclass(frozen=True, slots=True)
class FileEntry:
    """The size and the SHA-256, in hexadecimal, of one file."""

    nbytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class AdapterManifest:
    """An adapter's identity, sizes and modules, all computed from its files and its base."""

    digest: str
    base: str  # fingerprint
    lora_rank: int  # of the widest module
    num_parameters: int
    nbytes: int  # of the files together, without the manifest
    files: Mapping[str, FileEntry]
    modules: Mapping[str, LoraModule]
    recipe: Recipe | None = None  # of an adapter that is combined from others
    replaced: Mapping[str, SavedTensor] = field(default_factory=dict[str, SavedTensor])

    @property
    def target_modules(self) -> tuple[str, ...]:
        """The last parts of the modules' names, e.g. q_proj."""
        return tuple(sorted({name.rpartition(".")[2] for name in self.modules}))

    def to_json(self) -> bytes:
        """Encode the manifest for the object store; the inverse of `parse_manifest`."""
        fields = asdict(self)
        fields["modules"] = {name: _set_ones(m) for name, m in fields["modules"].items()}
        for name in ("recipe", "replaced"):
            if not fields[name]:
                del fields[name]
        return json.dumps(fields, indent=1, sort_keys=True).encode()


def _set_ones(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}


@dataclass(frozen=True, slots=True)
class PreparedAdapter:
    """A checked upload, ready to be stored; `config` is rewritten, `weights` are the upload's.

    `template` is the content of TEMPLATE_NAME, if the folder has a chat template.
    """

    manifest: AdapterManifest
    config: bytes
    weights: Path
    template: bytes | None = None


def is_digest(text: str) -> bool:
    """Check that a text is 64 lower-case hexadecimal digits."""
    return _DIGEST.fullmatch(text) is not None


def read_lora_layout(folder: Path) -> LoraLayout:
    """Read an adapter's layout from its config and the header of its weights, without a tensor.

    Raises AdapterInvalid, with the module and the reason, if the two do not fit each other.
    """
    return _layout(*_read(folder))


def prepare(folder: Path, base: BaseModel, on_bytes: OnBytes) -> PreparedAdapter:
    """Check an upload completely, weights included, and compute its digest.

    Reads the weights twice; `on_bytes` is called with the bytes read since its last call. Raises
    AdapterInvalid.
    """
    settings, tensors = _read(folder)
    template = read_adapter_template(folder)
    layout = _layout(settings, tensors)
    _check_base(layout, base)
    weights = folder / WEIGHTS_NAME
    try:
        bad = find_not_finite(weights, tensors, on_bytes)
        sha256 = hash_file(weights, on_bytes)
    except (OSError, ValueError) as error:
        raise AdapterInvalid(f"{weights} cannot be read: {error}") from error
    if bad is not None:
        raise AdapterInvalid(f"tensor {bad} holds a NaN or an infinity")
    config = canonical_config(
        {name: settings.lora_rank(name) for name in layout.modules},
        {name: settings.alpha(name) for name in layout.modules},
        settings.use_rslora,
        _kind_settings(settings, layout),
    )
    files = {
        CONFIG_NAME: FileEntry(len(config), hashlib.sha256(config).hexdigest()),
        WEIGHTS_NAME: FileEntry(weights.stat().st_size, sha256),
    }
    if template is not None:
        files[TEMPLATE_NAME] = FileEntry(len(template), hashlib.sha256(template).hexdigest())
    manifest = AdapterManifest(
        digest=adapter_digest(base.fingerprint, files),
        base=base.fingerprint,
        lora_rank=layout.lora_rank,
        num_parameters=layout.num_parameters,
        nbytes=sum(file.nbytes for file in files.values()),
        files=files,
        modules=layout.modules,
        replaced=layout.replaced,
    )
    return PreparedAdapter(manifest, config, weights, template)


def parse_manifest(raw: bytes, digest: str) -> AdapterManifest:
    """Decode the manifest of this digest; StoreCorrupt if it is damaged or another adapter's."""
    try:
        data: dict[str, Any] = json.loads(raw)
        files = {
            name: FileEntry(int(entry["nbytes"]), str(entry["sha256"]))
            for name, entry in data.pop("files").items()
        }
        modules = {name: LoraModule(**entry) for name, entry in data.pop("modules").items()}
        replaced = {
            name: SavedTensor(**entry | {"shape": tuple(entry["shape"])})
            for name, entry in data.pop("replaced", {}).items()
        }
        found = data.pop("recipe", None)
        recipe = None if found is None else parse_recipe(found)
        manifest = AdapterManifest(
            **data, files=files, modules=modules, recipe=recipe, replaced=replaced
        )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise StoreCorrupt(f"the manifest of {digest} is damaged: {error!r}") from error
    is_complete = set(files) - {TEMPLATE_NAME} == {CONFIG_NAME, WEIGHTS_NAME}
    base = manifest.base
    expected = adapter_digest(base, files) if recipe is None else recipe.digest(base)
    if not is_complete or expected != digest:
        raise StoreCorrupt(f"the manifest of {digest} describes other files")
    return manifest


def adapter_digest(base: str, files: Mapping[str, FileEntry]) -> str:
    """Compute an adapter's digest from its base's fingerprint and the entries of its files.

    The config among the files must be the canonical one that `prepare` writes.
    """
    parts = {"base": base, "files": {name: entry.sha256 for name, entry in files.items()}}
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def canonical_config(
    ranks: Mapping[str, int],
    alphas: Mapping[str, float],
    use_rslora: bool,
    kinds: Mapping[str, object] | None = None,
) -> bytes:
    """Write the PEFT configuration of modules with these ranks and alphas.

    Patterns become one entry per module that differs from the first, so neither the spelling of a
    pattern nor a training option changes the digest. `kinds` are the keys that only some adapters
    have.
    """
    names = sorted(ranks)
    r, alpha = ranks[names[0]], _number(alphas[names[0]])
    numbers = {name: _number(alphas[name]) for name in names}
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "inference_mode": True,
        "bias": "none",
        "r": r,
        "lora_alpha": alpha,
        "use_rslora": use_rslora,
        "target_modules": names,
        "rank_pattern": {re.escape(name): ranks[name] for name in names if ranks[name] != r},
        "alpha_pattern": {re.escape(n): number for n, number in numbers.items() if number != alpha},
        **(kinds or {}),
    }
    return json.dumps(config, indent=1, sort_keys=True).encode()


def _number(value: float) -> float:
    """Make a whole number an int, so that 16 and 16.0 are written alike."""
    return int(value) if value == int(value) else value


def _read(folder: Path) -> tuple[LoraSettings, dict[str, TensorEntry]]:
    """Read settings and tensors; the settings know the modules by their plain names."""
    settings, tensors = read_settings(folder), _read_tensors(folder)
    for name, tensor in tensors.items():
        refuse_broken(name, tensor)
    wrapped = {without_prefix(name).partition(".lora_")[0] for name in tensors}
    renamed = [name for name in sorted(wrapped) if plain_name(name) != name]
    names = {plain_name(name): configured_name(name, settings) for name in renamed}
    return settings.naming(names), tensors


def _read_tensors(folder: Path) -> dict[str, TensorEntry]:
    path = folder / WEIGHTS_NAME
    if not path.is_file():
        pickles = sorted(
            file.name for file in folder.glob("*") if file.suffix in (".bin", ".pt", ".pth", ".pkl")
        )
        if pickles:
            raise AdapterInvalid(
                f"{pickles[0]} is a pickle file, which can run code when it is opened; "
                f"save the adapter as {WEIGHTS_NAME}"
            )
        raise AdapterInvalid(f"{folder} has no {WEIGHTS_NAME}")
    try:
        return read_header(path, HEADER_LIMITS)
    except (OSError, ValueError) as error:
        raise AdapterInvalid(f"{path} is not a valid safetensors file: {error}") from error


def _layout(settings: LoraSettings, tensors: Mapping[str, TensorEntry]) -> LoraLayout:
    found: dict[str, dict[Role, str]] = {}
    for name, tensor in tensors.items():
        module, role = _parse_tensor_name(name)
        if tensor.dtype not in WEIGHT_DTYPES:
            raise AdapterInvalid(
                f"tensor {name} has dtype {tensor.dtype}, not one of {', '.join(WEIGHT_DTYPES)}"
            )
        if role in found.setdefault(module, {}):
            raise AdapterInvalid(f"{module} has two tensors {role}: {name} is the second")
        found[module][role] = name
    if not found:
        raise AdapterInvalid(
            f"{WEIGHTS_NAME} holds no tensor. Activation checkpointing that wraps modules (torch's "
            "checkpoint_wrapper, FSDP's option) makes PEFT save none: save the adapter again "
            "without it, e.g. after training with gradient_checkpointing instead"
        )
    replaced = {
        f"{name}.bias": _bias(roles.pop(Role.BIAS), tensors, settings)
        for name, roles in sorted(found.items())
        if Role.BIAS in roles
    }
    modules = {
        name: _module(name, found[name], tensors, settings) for name in sorted(found) if found[name]
    }
    if not modules:
        raise AdapterInvalid(f"{WEIGHTS_NAME} holds no lora_A and lora_B of any module")
    return LoraLayout(modules, replaced)


def _bias(name: str, tensors: Mapping[str, TensorEntry], settings: LoraSettings) -> SavedTensor:
    tensor = tensors[name]
    if settings.bias == "none":
        raise AdapterInvalid(f"tensor {name} is a bias, but the config has bias='none'")
    if len(tensor.shape) != 1:
        raise AdapterInvalid(f"tensor {name} {tensor.shape} must be a vector")
    return SavedTensor(name, tensor.shape, tensor.dtype)


def _parse_tensor_name(name: str) -> tuple[str, Role]:
    """Split base_model.model.<module>.lora_A.weight into (<module>, Role.A)."""
    for part, meaning in _UNSERVED_TENSORS.items():
        if part in name:
            way_out = _WAYS_OUT.get(part, "")
            raise AdapterInvalid(f"tensor {name} ({meaning}) is not served yet{way_out}")
    parsed = parse_tensor_name(plain_name(without_prefix(name)))
    if parsed is None:
        raise AdapterInvalid(
            f"tensor {name} is neither a lora_A.weight nor a lora_B.weight{cause_of(name)}"
        )
    return parsed


def _module(
    name: str, roles: Mapping[Role, str], tensors: Mapping[str, TensorEntry], settings: LoraSettings
) -> LoraModule:
    for role in (Role.A, Role.B):
        if role not in roles:
            raise AdapterInvalid(f"{name} has a {min(roles)} but no {role}")
    if not settings.include(name):
        raise AdapterInvalid(f"{name} has weights, but target_modules does not select it")
    a, b = tensors[roles[Role.A]], tensors[roles[Role.B]]
    r = settings.lora_rank(name)
    if len(a.shape) != 2 or len(b.shape) != 2:
        raise AdapterInvalid(f"{name}: lora_A {a.shape} and lora_B {b.shape} must be matrices")
    if a.shape[0] != r or b.shape[1] != r:
        raise AdapterInvalid(
            f"{name}: lora_A {a.shape} and lora_B {b.shape} do not have the config's rank {r}"
        )
    return LoraModule(
        lora_rank=r,
        scaling=settings.scaling(name),
        in_features=a.shape[1],
        out_features=b.shape[0],
        dtype=a.dtype if a.dtype == b.dtype else "F32",
        lora_a=roles[Role.A],
        lora_b=roles[Role.B],
        lora_b_bias=_vector(name, Role.B_BIAS, "lora_bias", settings.lora_bias, roles, tensors),
        magnitude=_vector(name, Role.MAGNITUDE, "use_dora", settings.use_dora, roles, tensors),
    )


def _vector(
    module: str,
    role: Role,
    key: str,
    is_wanted: bool,
    roles: Mapping[Role, str],
    tensors: Mapping[str, TensorEntry],
) -> str | None:
    """Name a vector [out] that the config's `key` asks for, or None if it does not."""
    name = roles.get(role)
    if is_wanted != (name is not None):
        has = "no " if name is None else ""
        raise AdapterInvalid(f"{module} has {has}{role}, but the config has {key}={is_wanted}")
    out_features = tensors[roles[Role.B]].shape[0]
    if name is not None and tensors[name].shape != (out_features,):
        raise AdapterInvalid(
            f"{module}: {role} {tensors[name].shape} does not have the {out_features} outputs of "
            "lora_B"
        )
    return name


def _kind_settings(settings: LoraSettings, layout: LoraLayout) -> dict[str, object]:
    """List the keys of what goes beyond A and B."""
    keys: dict[str, object] = {}
    if settings.use_dora:
        keys["use_dora"] = True
    if settings.lora_bias:
        keys["lora_bias"] = True
    if layout.replaced:
        keys["bias"] = "all"
    return keys


def _check_base(layout: LoraLayout, base: BaseModel) -> None:
    known = {whole_name(plain_name(name)): shape for name, shape in base.modules.items()}
    for name, module in layout.modules.items():
        shape = known.get(whole_name(name))
        if shape is None:
            raise AdapterInvalid(f"{name} is not a module of the base that can carry an adapter")
        if shape != (module.out_features, module.in_features):
            raise AdapterInvalid(
                f"{name} is {shape[0]} x {shape[1]} in the base, but the adapter was made for "
                f"{module.out_features} x {module.in_features}"
            )
    parameters = {whole_name(plain_name(name)): shape for name, shape in base.parameters.items()}
    for name, saved in layout.replaced.items() if parameters else ():
        found = parameters.get(whole_name(name))
        if found is None:
            raise AdapterInvalid(f"{saved.tensor} replaces {name}, which the base does not have")
        if found != saved.shape:
            raise AdapterInvalid(f"{saved.tensor} is {saved.shape}; {name} of the base is {found}")

"""Read what an adapter changes: modules with factors, their ranks and scalings, from two headers.

The engine needs `read_lora_layout` alone. No tensor is read.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from adapter_store.errors import AdapterInvalid
from adapter_store.peft_config import EMBEDDING, HEAD, LoraSettings, read_settings
from adapter_store.safetensors_file import HeaderLimits, TensorEntry, read_header
from adapter_store.saved import (
    Found,
    SavedTensor,
    TokenRows,
    is_vocabulary,
    take_saved,
    take_token_rows,
)
from adapter_store.tensor_causes import cause_of, refuse_broken
from adapter_store.tensor_names import Role, is_copy, parse_tensor_name
from adapter_store.wrapped_names import configured_name, plain_name, without_prefix

WEIGHTS_NAME = "adapter_model.safetensors"
# Token ids beyond the base's: with such an adapter, a whole batch has logits for them
MAX_NEW_ROWS = 8192
WEIGHT_DTYPES = ("F32", "F16", "BF16")
# A hundred layers of seven modules have a header of 0.2 MiB. It is parsed in the engine's process,
# where a large one would stop all streams.
HEADER_LIMITS = HeaderLimits(header_bytes=2 * 2**20, metadata_chars=64 * 2**10)
_UNSERVED_TENSORS = {  # part of a tensor's name: what such a tensor holds
    "lora_diag": "KaSA's diagonal of singular values",
}


@dataclass(frozen=True, slots=True)
class LoraModule:
    """One adapted linear layer: y += scaling * (x @ A^T) @ B^T, A [R, in] and B [out, R].

    Of an embedding A is [R, V], with a column for each token id, which is the input. What is
    stored is less of A if `group_size` is set and the base has that many times `in_features`:
    [R, in / group_size], QALoRA's; or blocks of one of them: A [R, in / a_blocks], B [out, R /
    b_blocks], BD-LoRA's.
    """

    lora_rank: int
    scaling: float
    in_features: int
    out_features: int
    dtype: str  # "F32", "F16" or "BF16", of A and of B; "F32" if they differ
    lora_a: str  # tensor names in adapter_model.safetensors
    lora_b: str
    lora_b_bias: str | None = None  # tensor [out], scaled and added with B
    magnitude: str | None = None  # tensor [out], of DoRA: the norm of each row of W + scaling B A
    group_size: int | None = None
    a_blocks: int | None = None
    b_blocks: int | None = None

    @property
    def is_compact(self) -> bool:
        """Whether the tensors may not have the shapes that are multiplied."""
        return (self.group_size, self.a_blocks, self.b_blocks) != (None, None, None)

    def fits(self, out_features: int, in_features: int) -> bool:
        """Check the shape of the base's layer. A group's PEFT layer exists for GPTQ alone, so an
        adapter of another base has groups in its config, and none in its tensors."""
        widths = (self.in_features, self.in_features * (self.group_size or 1))
        return out_features == self.out_features and in_features in widths


@dataclass(frozen=True, slots=True)
class LoraLayout:
    """What an adapter changes, by paths in the base.

    `modules` are those with factors (model.layers.0.self_attn.q_proj, lm_head), `replaced` are
    parameters (model.layers.0.self_attn.q_proj.bias), `token_rows` are by module.
    """

    modules: Mapping[str, LoraModule]
    replaced: Mapping[str, SavedTensor] = field(default_factory=dict[str, SavedTensor])
    invocation_token_ids: tuple[int, ...] = ()  # of an aLoRA: it acts from their last place on
    token_rows: Mapping[str, TokenRows] = field(default_factory=dict[str, TokenRows])

    @property
    def lora_rank(self) -> int:
        """The rank of the widest module."""
        return max(module.lora_rank for module in self.modules.values())

    @property
    def num_parameters(self) -> int:
        """The number of elements of all tensors."""
        return (
            sum(_num_parameters(module) for module in self.modules.values())
            + sum(math.prod(saved.shape) for saved in self.replaced.values())
            + sum(len(rows.token_ids) * rows.hidden_size for rows in self.token_rows.values())
        )

    @property
    def has_factors_alone(self) -> bool:
        """Whether the adapter is a sum of products of A and B, and nothing else."""
        return not (self.replaced or self.token_rows) and all(
            module.lora_b_bias is None
            and module.magnitude is None
            and not module.is_compact
            and not is_vocabulary(name)
            for name, module in self.modules.items()
        )


def vocab_rows(
    modules: Mapping[str, LoraModule], replaced: Mapping[str, SavedTensor]
) -> dict[str, int]:
    """Return the rows that embedding and output layer have, by each of the tensors that tell."""
    rows = {
        saved.tensor: saved.shape[0]
        for name, saved in replaced.items()
        if is_vocabulary(name.rpartition(".")[0])
    }
    for name, module in modules.items():
        if name.rpartition(".")[2] == EMBEDDING:
            rows[module.lora_a] = module.in_features
        elif name.rpartition(".")[2] == HEAD:
            rows[module.lora_b] = module.out_features
    return rows


def _num_parameters(module: LoraModule) -> int:
    vectors = (module.lora_b_bias is not None) + (module.magnitude is not None)
    inner = module.lora_rank * (
        module.in_features // (module.a_blocks or 1) + module.out_features // (module.b_blocks or 1)
    )
    return inner + vectors * module.out_features


def read_lora_layout(folder: Path) -> LoraLayout:
    """Read an adapter's layout from its config and the header of its weights, without a tensor.

    Raises AdapterInvalid, with the module and the reason, if the two do not fit each other.
    """
    return layout_of(*read_adapter(folder))


def read_adapter(folder: Path) -> tuple[LoraSettings, dict[str, TensorEntry]]:
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


def layout_of(settings: LoraSettings, tensors: Mapping[str, TensorEntry]) -> LoraLayout:
    """Fit settings and tensors together. Raises AdapterInvalid."""
    found: Found = {}
    for name, tensor in tensors.items():
        if is_copy(name, tensors):
            continue
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
    replaced = take_saved(found, tensors, settings)
    token_rows = take_token_rows(found, tensors, settings)
    modules = {
        name: _module(name, found[name], tensors, settings) for name in sorted(found) if found[name]
    }
    if not modules:
        raise AdapterInvalid(f"{WEIGHTS_NAME} holds no lora_A and lora_B of any module")
    beyond = [*replaced, *token_rows, *(name for name in modules if is_vocabulary(name))]
    if beyond and settings.invocation_token_ids:
        raise AdapterInvalid(
            f"{beyond[0]} is changed, which would also act before the alora_invocation_tokens; "
            "what is there must be the base model's alone"
        )
    return LoraLayout(modules, replaced, settings.invocation_token_ids, token_rows)


def _parse_tensor_name(name: str) -> tuple[str, Role]:
    """Split base_model.model.<module>.lora_A.weight into (<module>, Role.A)."""
    for part, meaning in _UNSERVED_TENSORS.items():
        if part in name:
            raise AdapterInvalid(f"tensor {name} ({meaning}) is not served yet")
    parsed = parse_tensor_name(plain_name(without_prefix(name)))
    if parsed is None:
        raise AdapterInvalid(
            f"tensor {name} is neither a lora_A.weight nor a lora_B.weight{cause_of(name)}"
        )
    return parsed


def _module(
    name: str, roles: Mapping[Role, str], tensors: Mapping[str, TensorEntry], settings: LoraSettings
) -> LoraModule:
    is_embedding = name.rpartition(".")[2] == EMBEDDING
    sides = (Role.EMBEDDING_A, Role.EMBEDDING_B) if is_embedding else (Role.A, Role.B)
    _check_roles(name, roles, sides, settings)
    a, b = (tensors[roles[side]] for side in sides)
    r = settings.lora_rank(name)
    if len(a.shape) != 2 or len(b.shape) != 2:
        raise AdapterInvalid(f"{name}: lora_A {a.shape} and lora_B {b.shape} must be matrices")
    a_blocks, b_blocks = settings.blocks(name)
    if a.shape[0] != r or b.shape[1] * b_blocks != r:
        raise AdapterInvalid(
            f"{name}: lora_A {a.shape} and lora_B {b.shape} do not have the config's rank {r}"
            f"{f' in {b_blocks} blocks of B' if b_blocks > 1 else ''}"
        )
    if r % a_blocks or b.shape[0] % b_blocks:
        raise AdapterInvalid(
            f"{name}: nblocks={max(a_blocks, b_blocks)} does not divide the rank {r} and the "
            f"{b.shape[0]} outputs"
        )

    def vector(role: Role, key: str, is_wanted: bool) -> str | None:
        _check_vector(name, role, key, is_wanted, roles, tensors, b.shape[0])
        return roles.get(role)

    return LoraModule(
        lora_rank=r,
        scaling=settings.scaling(name),
        in_features=a.shape[1] * a_blocks,
        out_features=b.shape[0],
        dtype=a.dtype if a.dtype == b.dtype else "F32",
        lora_a=roles[sides[0]],
        lora_b=roles[sides[1]],
        lora_b_bias=vector(Role.B_BIAS, "lora_bias", settings.lora_bias),
        magnitude=vector(Role.MAGNITUDE, "use_dora", settings.use_dora),
        group_size=settings.group_size or None,
        a_blocks=a_blocks if a_blocks > 1 else None,
        b_blocks=b_blocks if b_blocks > 1 else None,
    )


def _check_roles(
    module: str, roles: Mapping[Role, str], sides: tuple[Role, Role], settings: LoraSettings
) -> None:
    for side in sides:
        if side not in roles:
            raise AdapterInvalid(f"{module} has a {min(roles)} but no {side}")
    is_tied_head = settings.ensure_weight_tying and module.rpartition(".")[2] == HEAD
    if not settings.include(module) and not is_tied_head:
        raise AdapterInvalid(f"{module} has weights, but target_modules does not select it")
    if settings.lora_bias and Role.EMBEDDING_B in sides:
        raise AdapterInvalid(f"lora_bias=True is not served of {module}: PEFT refuses it too")
    of_linear_alone = {
        "use_qalora": settings.group_size > 0,
        "use_bdlora": settings.block_diagonal is not None,
    }
    for key, is_set in of_linear_alone.items():
        if is_set and is_vocabulary(module):
            raise AdapterInvalid(f"{key} is not served of {module}: leave it out of target_modules")


def _check_vector(
    module: str,
    role: Role,
    key: str,
    is_wanted: bool,
    roles: Mapping[Role, str],
    tensors: Mapping[str, TensorEntry],
    out_features: int,
) -> None:
    """Check that a vector [out] is there if the config's `key` asks for it, and only then."""
    name = roles.get(role)
    if is_wanted != (name is not None):
        has = "no " if name is None else ""
        raise AdapterInvalid(f"{module} has {has}{role}, but the config has {key}={is_wanted}")
    if name is not None and tensors[name].shape != (out_features,):
        raise AdapterInvalid(
            f"{module}: {role} {tensors[name].shape} does not have the {out_features} outputs of "
            "lora_B"
        )

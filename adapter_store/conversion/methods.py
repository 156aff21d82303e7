"""The mathematics of PEFT's methods other than LoRA, as changes of a weight W [out, in].

Each function gets the tensors of one module by the parts of their names, what `settings` say of the
module, and a function that reads W.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from adapter_store.conversion.change import Change, Kronecker, Product
from adapter_store.conversion.rotations import boft, oft
from adapter_store.conversion.setting import ReadWeight, Setting, Tensors, check_rank
from adapter_store.conversion.tensor_file import Matrix
from adapter_store.peft_config import IGNORED_KEYS

ChangeOf = Callable[[Tensors, Setting, ReadWeight], Change]


@dataclass(frozen=True, slots=True)
class Method:
    """A peft_type: its tensors, its keys and what it does."""

    tensors: tuple[str, ...]  # ends of their names, behind the module's
    change: ChangeOf
    keys: tuple[str, ...] = ()  # read here, or without effect once trained
    neutral: Mapping[str, Any] = field(default_factory=dict[str, Any])  # refused unless this
    shared: tuple[str, ...] = ()  # tensors of all modules, by whole names


def _loha(tensors: Tensors, setting: Setting, read: ReadWeight) -> Change:
    """(w1a w1b) * (w2a w2b), element by element: each pair of ranks is one of the product."""
    b1, a1, b2, a2 = (tensors[f"hada_{w}"] for w in ("w1_a", "w1_b", "w2_a", "w2_b"))
    check_rank(setting, a1, a2)
    size = b1.shape[1] * b2.shape[1]
    if 2 * size > min(setting.shape):
        whole: Any = (b1 * np.float32(setting.scaling)) @ a1
        whole *= b2 @ a2
        return whole
    b = (b1[:, :, None] * b2[:, None, :]).reshape(b1.shape[0], size)
    a = (a1[:, None, :] * a2[None, :, :]).reshape(size, a1.shape[1])
    return Product(b * np.float32(setting.scaling), a)


def _lokr(tensors: Tensors, setting: Setting, read: ReadWeight) -> Change:
    """The Kronecker product of w1 and w2, each whole or in two factors."""
    check_rank(setting, *(tensors[n] for n in ("lokr_w1_b", "lokr_w2_b") if n in tensors))
    left, right = (_whole(tensors, name) for name in ("lokr_w1", "lokr_w2"))
    return Kronecker(left * np.float32(setting.scaling), right)


def _whole(tensors: Tensors, name: str) -> Matrix:
    whole = tensors.get(name)
    return tensors[f"{name}_a"] @ tensors[f"{name}_b"] if whole is None else whole


def _vera(tensors: Tensors, setting: Setting, read: ReadWeight) -> Change:
    """Shared random matrices, cut to size, with a trained scale for each of their rows."""
    out_features, in_features = setting.shape
    a = tensors["base_model.vera_A"][:, :in_features]
    b = tensors["base_model.vera_B"][:out_features]
    lambda_b, lambda_d = tensors["vera_lambda_b"], tensors["vera_lambda_d"]
    return Product(lambda_b[:, None] * b, lambda_d[:, None] * a)


def _adalora(tensors: Tensors, setting: Setting, read: ReadWeight) -> Change:
    """B E A with a diagonal E; PEFT divides by the initial rank and a small number."""
    init_r = int(setting.config.get("init_r", 12))
    alpha = float(setting.config.get("lora_alpha", 8))
    scaling = (alpha if alpha > 0 else float(init_r)) / (init_r + 1e-5)
    a = tensors["lora_A"] * tensors["lora_E"].reshape(-1, 1)
    return Product(tensors["lora_B"] * np.float32(scaling), a)


def _miss(tensors: Tensors, setting: Setting, read: ReadWeight) -> Change:
    """A block [r, out] that is added to every r inputs."""
    block = tensors["miss_block"]
    out_features, in_features = setting.shape
    if setting.config.get("init_weights") == "mini":
        block = np.tile(block, (1, out_features // block.shape[1]))
    lora_rank = block.shape[0]
    places = np.arange(in_features) % lora_rank
    return Product(block.T, np.eye(lora_rank, dtype=np.float32)[:, places])


def _hira(tensors: Tensors, setting: Setting, read: ReadWeight) -> Change:
    """W * (B A), element by element."""
    factor: Matrix = tensors["hira_B"] @ tensors["hira_A"]
    return read() * factor


def _hra(tensors: Tensors, setting: Setting, read: ReadWeight) -> Change:
    """W H, with H a chain of reflections: H - 1 has their number as its rank."""
    u: Any = tensors["hra_u"].astype(np.float64)
    if setting.config.get("apply_GS"):
        u = _orthogonal(u)
    u /= np.linalg.norm(u, axis=0)
    # H - 1 = -left u^T, grown by one reflection after the other
    left = np.zeros_like(u)
    for i in range(u.shape[1]):
        left[:, i] = 2 * (u[:, i] - left[:, :i] @ (u[:, :i].T @ u[:, i]))
    return Product(-read() @ left.astype(np.float32), u.T.astype(np.float32))


def _delora(tensors: Tensors, setting: Setting, read: ReadWeight) -> Change:
    """B A of length 1 in each rank, times lambda / r, and times the norms of W's columns."""
    a, b = tensors["delora_A"], tensors["delora_B"]
    lengths = (np.maximum(np.linalg.norm(m, axis=axis), 1e-4) for m, axis in ((a, 1), (b, 0)))
    scale = tensors["delora_lambda"] / len(a) / np.prod([*lengths], axis=0)
    norms = tensors.get("delora_w_norm")
    if norms is None:
        norms = np.linalg.norm(read(), axis=0)
    return Product(b * scale.astype(np.float32), a * norms)


def _gralora(tensors: Tensors, setting: Setting, read: ReadWeight) -> Change:
    """A grid of blocks, each with ranks of its own: r of each row of blocks, and of each column."""
    a, b = tensors["gralora_A"], tensors["gralora_B"]  # [k, in / k, r] and [k, r, out / k]
    size, _, lora_rank = a.shape
    part = lora_rank // size  # ranks of one block
    wide_a = np.zeros((size, size, part, setting.shape[1]), np.float32)
    wide_b = np.zeros((setting.shape[0], size, size, part), np.float32)
    inputs, outputs = (np.split(np.arange(count), size) for count in setting.shape[::-1])
    for i in range(size):
        wide_a[i][..., inputs[i]] = a[i].T.reshape(size, part, -1)
        wide_b[outputs[i], :, i] = b[i].T.reshape(-1, size, part)
    left, right = wide_b.reshape(setting.shape[0], -1), wide_a.reshape(-1, setting.shape[1])
    if "gralora_A_general.weight" in tensors:
        left = np.hstack([left, tensors["gralora_B_general.weight"]])
        right = np.vstack([right, tensors["gralora_A_general.weight"]])
    total = lora_rank + int(setting.config.get("hybrid_r", 0))
    scaling = float(setting.config.get("alpha", 64)) / total
    return Product(left * np.float32(scaling), right)


def _c3a(tensors: Tensors, setting: Setting, read: ReadWeight) -> Change:
    """Blocks whose rows are all the same but for their turn, divided by the inputs' number."""
    kernel = tensors["c3a_kernel"]  # [out / size, in / size, size]
    size: int = kernel.shape[2]
    places: Any = np.arange(size)
    blocks: Matrix = kernel[:, :, (places - places[:, None]) % size]
    whole = blocks.transpose(0, 2, 1, 3).reshape(len(kernel) * size, -1)
    return np.ascontiguousarray(whole / np.float32(setting.shape[1]))


def _orthogonal(u: Any) -> Any:
    """Make each vector orthogonal to those before it."""
    columns: list[Any] = []
    for i in range(u.shape[1]):
        vector = u[:, i]
        for other in columns:
            vector = vector - (other @ vector) * other
        columns.append(vector / np.linalg.norm(vector))
    return np.stack(columns, axis=1)


METHODS: Mapping[str, Method] = {
    "LOHA": Method(
        ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"),
        _loha,
        ("alpha", "rank_dropout", "module_dropout", "use_effective_conv2d"),
    ),
    "LOKR": Method(
        ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b"),
        _lokr,
        (
            *("alpha", "rank_dropout", "module_dropout", "use_effective_conv2d"),
            *("decompose_both", "decompose_factor", "rank_dropout_scale"),
        ),
    ),
    "VERA": Method(
        ("vera_lambda_b", "vera_lambda_d"),
        _vera,
        ("projection_prng_key", "vera_dropout", "d_initial"),
        {"save_projection": True},
        ("base_model.vera_A", "base_model.vera_B"),
    ),
    "ADALORA": Method(
        ("lora_A", "lora_B", "lora_E"),
        _adalora,
        (
            *("lora_alpha", "target_r", "init_r", "tinit", "tfinal", "deltaT"),
            *("beta1", "beta2", "orth_reg_weight", "total_step", "init_lora_weights"),
            *("qalora_group_size", *IGNORED_KEYS),
        ),
    ),
    "MISS": Method(("miss_block",), _miss, ("miss_dropout", "mini_r")),
    "HIRA": Method(("hira_A", "hira_B"), _hira, ("hira_dropout",)),
    "DELORA": Method(
        ("delora_A", "delora_B", "delora_lambda", "delora_w_norm"),
        _delora,
        ("delora_lambda", "lambda_pattern", "module_dropout"),
    ),
    "HRA": Method(("hra_u",), _hra, ("apply_GS",)),
    "GRALORA": Method(
        ("gralora_A", "gralora_B", "gralora_A_general.weight", "gralora_B_general.weight"),
        _gralora,
        ("alpha", "hybrid_r", "gralora_k", "gralora_dropout"),
    ),
    "C3A": Method(("c3a_kernel",), _c3a, ("block_size", "block_size_pattern")),
    "OFT": Method(
        ("oft_R.weight",),
        oft,
        (
            *("oft_block_size", "module_dropout", "eps", "block_share"),
            *("use_cayley_neumann", "num_cayley_neumann_terms"),
        ),
        {"coft": False},
    ),
    "BOFT": Method(
        ("boft_R", "boft_s"),
        boft,
        ("boft_block_size", "boft_block_num", "boft_n_butterfly_factor", "boft_dropout"),
    ),
}

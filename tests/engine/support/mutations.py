"""Changes valid adapters at random: keys and values of the config, and names, shapes, dtypes and
values of tensors, as trainers, tools and accidents do."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
Tensors = dict[str, torch.Tensor]

VALUES: list[Any] = [
    *(None, True, False, 0, 1, 2, 4, 8, -1, 1e9, 0.5, 16.0, "8", "", "none", "all"),
    *([], {}, [1], ["q_proj"], {"q_proj": 2}, {"q_proj": 2.5}, "lora_only", [[0, 1]]),
]
TARGETS: list[Any] = [
    *(["q_proj"], ["q_proj", "o_proj", "up_proj", "down_proj"], "all-linear", ".*"),
    *(r".*\.(q|o|up)_proj", r"(?:.*\.)*(?:[qo]|up)_proj", ["proj"], "q_proj"),
    *(r"model\.layers\.(?:0|1)\..*proj", ["self_attn.q_proj", "o_proj", "mlp.up_proj"]),
    *([f"model.layers.{i}.{m}" for i in (0, 1) for m in ("self_attn.q_proj", "mlp.up_proj")],),
    *(r"(?=.*q_proj).*", r".*(", ["up_proj", "o_proj", "q_proj"]),
]
PATTERNS: list[Any] = [
    *({"q_proj": 8}, {"layers.1.*": 2}, {".*": 16}, {r"layers\.(0|1)\.mlp.up_proj": 3}),
    *({"o_proj": 4, "q_proj": 4}, {"x": 7}, {"^model": 3}, {"(q|up)_proj": 0}, {"q_proj": "8"}),
]
OFTEN: dict[str, list[Any]] = {
    "r": [1, 4, 8, 2000, "4", 4.0],
    "lora_alpha": [1, 3.5, 32, -8, 0, 1e7, "16"],
    "target_modules": TARGETS,
    "exclude_modules": [["v_proj"], ["q_proj"], "x.*", r".*layers\.1.*"],
    "rank_pattern": PATTERNS,
    "alpha_pattern": PATTERNS,
    "layers_to_transform": [0, [0, 1], [0], ["0"], [5]],
    "layers_pattern": ["layers", ["layers", "h"], "h", 3],
    "use_rslora": [True, False, None, 1],
    "init_lora_weights": [True, False, "gaussian", "pissa", "olora", "loftq", None],
    "bias": ["none", "all", "lora_only", "some"],
    "peft_type": ["LORA", "lora", "IA3", None],
    "task_type": [None, "CAUSAL_LM", "SEQ_2_SEQ_LM"],
    "unknown_key": [None, 1, "x", {}],
    "lora_dropout": [0.1, 0.0],
    "inference_mode": [True, False],
    "base_model_name_or_path": ["elsewhere", None],
    "peft_version": ["0.1.0", None],
}
RENAMES = [
    *(("lora_A", "lora_B"), ("lora_A.weight", "lora_A.default.weight"), ("layers.1", "layers.7")),
    *(("q_proj", "k_proj"), ("q_proj", "lm_head"), ("model.model", "model.models")),
    *(
        (".weight", ""),
        ("lora_", "LORA_"),
        ("up_proj", "up_proj.base_layer"),
        ("self_attn", "attn"),
    ),
    *(("model.layers", "vision_tower.layers"), ("lora_A", "lora_A.other"), ("o_proj", "o_projs")),
]
# New names of the same modules, which PEFT does not take: the effect must stay
WRAPPERS = [
    *(("model.layers", "_orig_mod.model.layers"), ("model.layers", "model.language_model.layers")),
    *((".mlp.", "._checkpoint_wrapped_module.mlp."), (PREFIX, f"module.{PREFIX}")),
    *((f"{PREFIX}model.", PREFIX), (PREFIX, "")),
    *(("model.layers", "language_model.model.layers"), (".mlp.", "._fsdp_wrapped_module.mlp.")),
]


class Mutant:
    """A copy of an adapter in two forms: as it is uploaded, and as PEFT can load it."""

    def __init__(self, source: Path, seed: int) -> None:
        self._random = random.Random(seed)
        self.config: dict[str, Any] = json.loads((source / CONFIG).read_text())
        self.tensors: Tensors = load_file(source / WEIGHTS)
        self.steps: list[str] = []
        self._wrapper: tuple[str, str] | None = None
        for _ in range(self._random.choice((1, 1, 1, 2, 2, 3))):
            self._step()

    def write(self, uploaded: Path, for_peft: Path) -> None:
        """Write both folders."""
        old, new = self._wrapper or ("", "")
        for folder, tensors in (
            (for_peft, self.tensors),
            (uploaded, {n.replace(old, new, 1): t for n, t in self.tensors.items()}),
        ):
            folder.mkdir(parents=True)
            (folder / CONFIG).write_text(json.dumps(self.config))
            save_file(tensors, folder / WEIGHTS)

    def _step(self) -> None:
        kinds: list[Callable[[], str]] = [
            *(self._set_often, self._set_often, self._set_any, self._remove_key),
            *(self._rename, self._wrap, self._drop, self._add, self._reshape, self._retype),
            self._revalue,
        ]
        self.steps.append(self._random.choice(kinds)())

    def _set_often(self) -> str:
        key = self._random.choice(list(OFTEN))
        self.config[key] = self._random.choice(OFTEN[key])
        return f"{key}={self.config[key]!r}"

    def _set_any(self) -> str:
        key = self._random.choice(list(self.config))
        self.config[key] = self._random.choice(VALUES)
        return f"{key}={self.config[key]!r}"

    def _remove_key(self) -> str:
        key = self._random.choice(list(self.config))
        del self.config[key]
        return f"without {key}"

    def _name(self) -> str:
        return self._random.choice(list(self.tensors)) if self.tensors else ""

    def _rename(self) -> str:
        old, new = self._random.choice(RENAMES)
        chosen = set(self.tensors) if self._random.random() < 0.5 else {self._name()}
        self.tensors = {
            n.replace(old, new) if n in chosen else n: t for n, t in self.tensors.items()
        }
        return f"{old} -> {new} in {len(chosen)}"

    def _wrap(self) -> str:
        self._wrapper = self._random.choice(WRAPPERS)
        return f"wrapped: {self._wrapper[1]}"

    def _drop(self) -> str:
        name = self._name()
        self.tensors.pop(name, None)
        return f"without {name}"

    def _add(self) -> str:
        names = ["model.embed_tokens.weight", "lm_head.weight", "score.weight", "x", "a b"]
        name = PREFIX + self._random.choice(names)
        self.tensors[name] = torch.randn(4, 4)
        return f"with {name}"

    def _reshape(self) -> str:
        name = self._name()
        tensor = self.tensors.get(name, torch.zeros(2, 2))
        shapes = (
            tensor.mT if tensor.ndim > 1 else tensor[None],
            tensor[:-1],
            tensor[:0],
            tensor.flatten(),
            tensor[None],
        )
        shape = self._random.choice(shapes)
        self.tensors[name or "new"] = shape.contiguous()
        return f"{name}: {tuple(tensor.shape)} -> {tuple(shape.shape)}"

    def _retype(self) -> str:
        dtypes = (torch.float16, torch.bfloat16, torch.float64, torch.int8, torch.float32)
        dtype = self._random.choice(dtypes)
        chosen = set(self.tensors) if self._random.random() < 0.5 else {self._name()}
        self.tensors = {n: t.to(dtype) if n in chosen else t for n, t in self.tensors.items()}
        return f"{dtype} in {len(chosen)}"

    def _revalue(self) -> str:
        name, value = self._name(), self._random.choice((0.0, float("nan"), float("inf"), 1e-3))
        if name and self.tensors[name].is_floating_point():
            self.tensors[name] = torch.full_like(self.tensors[name], value)
        return f"{name}: {value}"

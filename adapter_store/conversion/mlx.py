"""Read an adapter of MLX: adapters.safetensors with transposed factors and a scale."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from adapter_store.conversion.change import Factors, Saved
from adapter_store.conversion.fine_tune import FineTune, open_trained_part
from adapter_store.conversion.model_weights import open_model
from adapter_store.conversion.saved_rows import is_tied
from adapter_store.conversion.tensor_file import open_tensors
from adapter_store.errors import AdapterInvalid
from adapter_store.layout import HEADER_LIMITS
from adapter_store.wrapped_names import plain_name

EMBEDDING, HEAD = "model.embed_tokens", "lm_head"
MLX_WEIGHTS_NAME = "adapters.safetensors"
_TENSOR = re.compile(r"(?P<module>.+)\.(?P<part>lora_a|lora_b|m)")
_PARTS = {"lora": {"lora_a", "lora_b"}, "dora": {"lora_a", "lora_b", "m"}}


def is_mlx(config: Mapping[str, Any]) -> bool:
    """Check whether a configuration is MLX's."""
    return "peft_type" not in config and "lora_parameters" in config


def open_mlx(
    folder: Path, config: Mapping[str, Any], base_folder: Path | None
) -> "MlxUpload | FineTune":
    """Open what MLX has trained: factors, or weights as a whole. Raises AdapterInvalid."""
    if config.get("fine_tune_type") == "full":
        return open_trained_part("MLX", folder / MLX_WEIGHTS_NAME, base_folder)
    return MlxUpload(folder, config, base_folder)


class MlxUpload:
    """A Source: A is lora_a transposed, B is lora_b transposed. Raises AdapterInvalid.

    Where a model uses its embedding as output layer, MLX changes both with the embedding's factors.
    """

    name = "MLX"

    def __init__(self, folder: Path, config: Mapping[str, Any], base_folder: Path | None) -> None:
        kind = _kind(config)
        self._scale = _scale(config)
        self._file = open_tensors([folder / MLX_WEIGHTS_NAME], HEADER_LIMITS)
        self._names: dict[str, dict[str, str]] = {}
        for name in self._file.entries:
            self._claim(name)
        for module, parts in self._names.items():
            if set(parts) != _PARTS[kind]:
                raise AdapterInvalid(
                    f"{module} has {', '.join(sorted(parts))}, and fine_tune_type={kind!r} of MLX "
                    f"needs {', '.join(sorted(_PARTS[kind]))}"
                )
        if not self._names:
            raise AdapterInvalid(f"{MLX_WEIGHTS_NAME} holds no lora_a and lora_b")
        if EMBEDDING in self._names and _ties(base_folder):
            if HEAD in self._names:
                raise AdapterInvalid(
                    f"{HEAD} has factors, and the base has {EMBEDDING} in its place"
                )
            self._names[HEAD] = self._names[EMBEDDING]
        self.modules = {
            module: sum(self._nbytes(name) for name in parts.values())
            for module, parts in sorted(self._names.items())
        }

    def change(self, module: str, shape: tuple[int, int]) -> Factors:
        parts = self._names[module]
        (dtype_a, a), (dtype_b, b) = (self._file.raw(parts[part]) for part in ("lora_a", "lora_b"))
        if a.ndim != 2 or b.ndim != 2:
            raise AdapterInvalid(
                f"{module}: lora_a {a.shape} and lora_b {b.shape} must be matrices"
            )
        if module == HEAD and self._names.get(EMBEDDING) is parts:
            return Factors(b, a, (dtype_b, dtype_a), self._scale)
        magnitude = self._file.raw(parts["m"]) if "m" in parts else None
        return Factors(a.T, b.T, (dtype_a, dtype_b), self._scale, magnitude)

    def saved(self) -> tuple[Saved, ...]:
        return ()

    def _claim(self, name: str) -> None:
        match = _TENSOR.fullmatch(name)
        if match is None:
            raise AdapterInvalid(
                f"tensor {name} is neither a lora_a nor a lora_b of a layer; fuse the adapter into "
                "its model (mlx_lm.fuse --dequantize) and publish that folder with --convert"
            )
        parts = self._names.setdefault(plain_name(match["module"]), {})
        if match["part"] in parts:
            raise AdapterInvalid(f"tensor {name} is the second {match['part']} of its module")
        parts[match["part"]] = name

    def _nbytes(self, name: str) -> int:
        entry = self._file.entries[name][1]
        return entry.end - entry.start


def _ties(base_folder: Path | None) -> bool:
    if base_folder is None:
        raise AdapterInvalid(
            f"{EMBEDDING} has factors, which also change the output layer of a base that ties "
            "both: name the base by its folder, --base path/to/model"
        )
    return is_tied(open_model(base_folder))


def _kind(config: Mapping[str, Any]) -> str:
    kind = config.get("fine_tune_type", "lora")
    if kind not in _PARTS:
        raise AdapterInvalid(
            f"fine_tune_type={kind!r} of MLX is not known, only 'lora', 'dora' and 'full'; fuse it "
            "into its model (mlx_lm.fuse --dequantize) and publish that folder with --convert"
        )
    return str(kind)


def _scale(config: Mapping[str, Any]) -> float:
    parameters: Any = config.get("lora_parameters")
    found = cast("dict[str, Any]", parameters) if isinstance(parameters, dict) else {}
    scale = found.get("scale")
    if not isinstance(scale, int | float) or isinstance(scale, bool):
        raise AdapterInvalid(f"lora_parameters={parameters!r} must have a number as its scale")
    return float(scale)

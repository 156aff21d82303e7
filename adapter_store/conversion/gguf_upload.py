"""Read an adapter of llama.cpp: one GGUF file, with names and an order of heads of its own."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from adapter_store.conversion.change import Factors, Saved
from adapter_store.errors import AdapterInvalid

_TENSOR = re.compile(r"(?:blk\.(?P<layer>\d+)\.)?(?P<module>\w+)\.weight\.(?P<part>lora_[ab])")
EMBEDDING = "model.embed_tokens"
_VOCABULARY = {"token_embd": EMBEDDING, "output": "lm_head"}
_MODULES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_qkv": "self_attn.qkv_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# llama.cpp keeps the two halves of a head interleaved in the rows of q and k of these
_PERMUTED = ("llama", "granite")
_PLAIN = ("qwen2", "qwen3", "gemma2", "gemma3", "phi3")
_FUSED_GATE = "phi3"  # its ffn_up is both gate and up
_RAW = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}


class GgufUpload:
    """A Source: factors as they stand, under the names of transformers. Raises AdapterInvalid."""

    name = "GGUF"

    def __init__(self, path: Path, base_folder: Path | None) -> None:
        self._path = path
        self._base_folder = base_folder
        fields, tensors = _read(path)
        self._architecture = _architecture(fields)
        self._alpha = float(fields.get("adapter.lora.alpha") or 0.0)
        self._tensors: dict[str, dict[str, Any]] = {}
        for tensor in tensors:
            self._claim(tensor)
        for module, parts in self._tensors.items():
            if len(parts) != 2:
                raise AdapterInvalid(f"{module} has a {next(iter(parts))} alone in {path.name}")
        if not self._tensors:
            raise AdapterInvalid(f"{path.name} holds no lora_a and lora_b")
        self.modules = {
            module: sum(int(tensor.n_bytes) for tensor in parts.values())
            for module, parts in sorted(self._tensors.items())
        }

    def change(self, module: str, shape: tuple[int, int]) -> Factors:
        parts = self._tensors[module]
        (dtype_a, a), (dtype_b, b) = (_array(parts[part]) for part in ("lora_a", "lora_b"))
        if module == EMBEDDING and a.ndim == 2:  # a row for each token
            a = a.T
        if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1]:
            raise AdapterInvalid(f"{module}: lora_a {a.shape} and lora_b {b.shape} do not fit")
        if self._architecture in _PERMUTED and module.endswith(("q_proj", "k_proj")):
            b = _unpermuted(b, self._num_heads(module), module)
        scaling = self._alpha / a.shape[0] if self._alpha else 1.0
        return Factors(a, b, (dtype_a, dtype_b), scaling)

    def saved(self) -> tuple[Saved, ...]:
        return ()

    def _claim(self, tensor: Any) -> None:
        module, part = self._module(str(tensor.name))
        self._tensors.setdefault(module, {})[part] = tensor

    def _module(self, name: str) -> tuple[str, str]:
        """Return the module of a tensor, as transformers calls it, and lora_a or lora_b."""
        match = _TENSOR.fullmatch(name)
        layer = match["layer"] if match else None
        module = (
            (_VOCABULARY if layer is None else _MODULES).get(match["module"]) if match else None
        )
        if match is None or module is None:
            raise AdapterInvalid(
                f"tensor {name} of {self._path.name} is no factor of a linear layer of attention "
                "or MLP, of the embedding or of the output layer, and only those are converted"
            )
        if self._architecture == _FUSED_GATE and module == "mlp.up_proj":
            module = "mlp.gate_up_proj"
        return module if layer is None else f"model.layers.{layer}.{module}", match["part"]

    def _num_heads(self, module: str) -> int:
        if self._base_folder is None:
            raise AdapterInvalid(
                f"{module}: llama.cpp reorders the heads of {self._architecture}, and their number "
                "is in the base's config: name it by its folder, --base path/to/model"
            )
        try:
            config: dict[str, Any] = json.loads((self._base_folder / "config.json").read_bytes())
            num_heads = config["num_attention_heads"]
            if module.endswith("k_proj"):
                num_heads = config.get("num_key_value_heads", num_heads)
            return int(num_heads)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise AdapterInvalid(f"the base's config has no number of heads: {error!r}") from error


def _read(path: Path) -> tuple[Mapping[str, Any], list[Any]]:
    import gguf  # pyright: ignore[reportMissingTypeStubs]

    library: Any = gguf
    try:
        reader = library.GGUFReader(path)
        fields = {str(name): field.contents() for name, field in reader.fields.items()}
        return fields, list(reader.tensors)
    except (OSError, ValueError, IndexError, KeyError, TypeError, OverflowError) as error:
        raise AdapterInvalid(f"{path} is not a readable GGUF file: {error}") from error


def _architecture(fields: Mapping[str, Any]) -> str:
    kinds = fields.get("general.type"), fields.get("adapter.type")
    if kinds != ("adapter", "lora"):
        raise AdapterInvalid(
            f"general.type={kinds[0]!r} and adapter.type={kinds[1]!r}: the GGUF file is no LoRA "
            "adapter"
        )
    if fields.get("adapter.alora.invocation_tokens") is not None:
        raise AdapterInvalid(
            "adapter.alora.invocation_tokens: activated LoRA is not converted from GGUF; publish "
            "the PEFT folder that it was made of"
        )
    architecture = str(fields.get("general.architecture"))
    if architecture not in _PERMUTED + _PLAIN:
        raise AdapterInvalid(
            f"general.architecture={architecture!r} is not converted, only "
            f"{', '.join(_PERMUTED + _PLAIN)}; publish the PEFT folder that it was made of"
        )
    return architecture


def _array(tensor: Any) -> tuple[str, Any]:
    """Return dtype and numbers: A as [r, in], B as [out, r]."""
    kind = str(tensor.tensor_type.name)
    shape = tuple(int(size) for size in reversed(tensor.shape))
    if view := _RAW.get(kind):
        return kind, np.asarray(tensor.data).view(view).reshape(shape)
    import gguf  # pyright: ignore[reportMissingTypeStubs]

    quants: Any = gguf.quants
    return "F32", np.asarray(quants.dequantize(tensor.data, tensor.tensor_type)).reshape(shape)


def _unpermuted(b: Any, num_heads: int, module: str) -> Any:
    """Put the rows of each head back: llama.cpp has (half, pair) as (pair, half)."""
    out_features, lora_rank = b.shape
    if num_heads < 1 or out_features % (2 * num_heads):
        raise AdapterInvalid(f"{module}: {out_features} outputs are not {num_heads} heads")
    heads = b.reshape(num_heads, out_features // num_heads // 2, 2, lora_rank)
    return heads.swapaxes(1, 2).reshape(out_features, lora_rank)

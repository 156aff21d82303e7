"""Read quantized weights of a base (bitsandbytes, GPTQ, AWQ) as the numbers that they stand for.

What a method multiplies, and what a whole model is compared with, are these numbers: PEFT computes
with them too. Rows are [out, in] in float32.
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from adapter_store.conversion.tensor_file import Matrix, TensorFile
from adapter_store.errors import AdapterInvalid

Names = Mapping[str, str]  # tensors of a file, by what they are of one module
_PART = re.compile(
    r"(?P<module>.+)\.(?P<part>weight\.[\w.]+|SCB|weight_format|qweight|qzeros|scales|g_idx)"
)
_STATE = "weight.quant_state.bitsandbytes__nf4"
# Where AWQ keeps output j of eight: the even outputs first, then the odd ones
_AWQ_NIBBLES = (0, 4, 1, 5, 2, 6, 3, 7)


@dataclass(frozen=True, slots=True)
class PackedModule:
    """The tensors of one quantized module."""

    names: Names

    def read(self, file: TensorFile, config: Mapping[str, Any]) -> Matrix:
        """Return the weight; `config` is the model's quantization_config. Raises AdapterInvalid."""
        method = str(config.get("quant_method"))
        reader = _reader(self.names, method)
        if reader is None:
            raise AdapterInvalid(
                f"the base's {next(iter(self.names.values()))} is quantized as quant_method="
                f"{method!r} does it, which is not read here; only bitsandbytes (nf4, int8), gptq "
                "and awq are"
            )
        try:
            weight = reader(file, self.names, config)
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise AdapterInvalid(
                f"the base's {', '.join(sorted(self.names.values()))} are no weight of {method}: "
                f"{error!r}"
            ) from error
        if not np.isfinite(weight).all():
            raise AdapterInvalid(f"{min(self.names.values())} stands for a NaN or an infinity")
        return weight


def packed_modules(file: TensorFile) -> dict[str, PackedModule]:
    """Find the modules whose weights are not stored as such, with all their tensors."""
    found: dict[str, dict[str, str]] = {}
    for name in file.entries:
        if match := _PART.fullmatch(name):
            found.setdefault(match["module"], {})[match["part"]] = name
    for module, names in found.items():
        if f"{module}.weight" in file.entries:
            names["weight"] = f"{module}.weight"
    return {module: PackedModule(names) for module, names in found.items()}


def _reader(
    names: Names, method: str
) -> Callable[[TensorFile, Names, Mapping[str, Any]], Matrix] | None:
    if method == "bitsandbytes":
        return _nf4 if _STATE in names else _int8 if "SCB" in names else None
    return {"gptq": _gptq, "awq": _awq}.get(method)


def _nf4(file: TensorFile, names: Names, config: Mapping[str, Any]) -> Matrix:
    state: dict[str, Any] = json.loads(file.codes(names[_STATE], "U8").tobytes())
    out_features, in_features = (int(size) for size in state["shape"])
    packed = file.codes(names["weight"], "U8").reshape(-1)
    codes = np.stack([packed >> 4, packed & 15], axis=-1).reshape(-1)  # the even one is high
    values = file.read(names["weight.quant_map"])[codes].reshape(-1, int(state["blocksize"]))
    scales = _block_scales(file, names, state)
    return (values * scales[:, None]).reshape(out_features, in_features)


def _block_scales(file: TensorFile, names: Names, state: Mapping[str, Any]) -> Matrix:
    """Return a scale for each block of nf4; they may be quantized themselves."""
    if "weight.nested_absmax" not in names:
        return file.read(names["weight.absmax"])
    codes = file.codes(names["weight.absmax"], "U8")
    values = file.read(names["weight.nested_quant_map"])[codes]
    outer = file.read(names["weight.nested_absmax"])
    wide = np.repeat(outer, int(state["nested_blocksize"]))[: len(codes)]
    return values * wide + np.float32(state["nested_offset"])


def _int8(file: TensorFile, names: Names, config: Mapping[str, Any]) -> Matrix:
    codes, largest = file.codes(names["weight"], "I8"), file.read(names["SCB"])
    scales: Matrix = (largest / np.float32(127)).astype(np.float32)
    return codes.astype(np.float32) * scales[:, None]


def _gptq(file: TensorFile, names: Names, config: Mapping[str, Any]) -> Matrix:
    """qweight [in / 8, out] has eight inputs in a word, qzeros [groups, out / 8] eight outputs."""
    _check_bits(config)
    layout = config.get("checkpoint_format", config.get("format", "gptq"))
    offset = {"gptq": 1, "gptq_v2": 0}[str(layout)]  # the first version stores zeros minus 1
    codes = _nibbles(file.codes(names["qweight"], "I32").T).T
    zeros = _nibbles(file.codes(names["qzeros"], "I32")) + np.uint8(offset) & 15
    scales = file.read(names["scales"])
    groups = _groups(len(codes), len(scales))
    if "g_idx" in names:
        groups = file.codes(names["g_idx"], "I32")
    return _scaled(codes, zeros, scales, groups)


def _awq(file: TensorFile, names: Names, config: Mapping[str, Any]) -> Matrix:
    """qweight [in, out / 8] and qzeros [groups, out / 8] have eight outputs in a word."""
    _check_bits(config)
    if str(config.get("version", config.get("format", "gemm"))).lower() != "gemm":
        raise ValueError("its version is not gemm")
    codes, zeros = (
        _nibbles(file.codes(names[part], "I32")).reshape(-1, _width(file, names), 8)
        for part in ("qweight", "qzeros")
    )
    order = list(_AWQ_NIBBLES)
    codes, zeros = (each[..., order].reshape(len(each), -1) for each in (codes, zeros))
    scales = file.read(names["scales"])
    return _scaled(codes, zeros, scales, _groups(len(codes), len(scales)))


def _width(file: TensorFile, names: Names) -> int:
    return file.entries[names["qweight"]][1].shape[1]


def _check_bits(config: Mapping[str, Any]) -> None:
    if config.get("bits") != 4:
        raise ValueError(f"it has bits={config.get('bits')!r}, and 4 are read")


def _nibbles(words: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Unpack int32 [rows, n] to [rows, 8 n], the lowest bits first."""
    packed = np.ascontiguousarray(words).view(np.uint8)
    return np.stack([packed & 15, packed >> 4], axis=-1).reshape(len(packed), -1)


def _groups(num_inputs: int, num_groups: int) -> npt.NDArray[Any]:
    return np.arange(num_inputs) // (num_inputs // num_groups)


def _scaled(
    codes: npt.NDArray[Any], zeros: npt.NDArray[Any], scales: Matrix, groups: npt.NDArray[Any]
) -> Matrix:
    """Turn codes [in, out], with zeros and scales [groups, out], into a weight [out, in]."""
    if groups.min() < 0:
        raise ValueError("g_idx names a group below 0")
    wide = codes.astype(np.float32) - zeros.astype(np.float32)[groups]
    return np.ascontiguousarray((wide * scales[groups]).T)

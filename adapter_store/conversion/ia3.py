"""Read IA3, which scales outputs or inputs of layers, as DoRA without factors: it is exact.

DoRA gives the rows of a weight the norms m. With factors of zero, m = l ||W|| of each row scales
the layer's outputs by l. The inputs of down_proj are the outputs of up_proj times those of the
gate, so what scales them scales up_proj's outputs. A bias is scaled with them: it is replaced.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from adapter_store.conversion.change import Change, Factors, Saved
from adapter_store.conversion.methods import Method
from adapter_store.conversion.model_weights import open_model
from adapter_store.conversion.peft_upload import PeftUpload
from adapter_store.conversion.setting import ReadWeight, Setting, Tensors
from adapter_store.conversion.tensor_file import Matrix
from adapter_store.errors import AdapterInvalid


def _vector(tensors: Tensors, setting: Setting, read: ReadWeight) -> Change:
    return tensors["ia3_l"]


_IA3 = Method(("ia3_l",), _vector, ("feedforward_modules", "init_ia3_weights"))


class Ia3Upload:
    """A Source: vectors that scale outputs. Raises AdapterInvalid."""

    name = "IA3"

    def __init__(self, folder: Path, config: Mapping[str, Any], base_folder: Path | None) -> None:
        if base_folder is None:
            raise AdapterInvalid(
                "IA3 scales the rows of the base's weights, so the base must be given by its "
                "folder: --base path/to/model"
            )
        self._base = open_model(base_folder)
        self._upload = PeftUpload(folder, config, None, _IA3)
        self._scales: dict[str, Matrix] = {}
        for module in self._upload.modules:
            self._take(module)
        self.modules = {module: scale.nbytes for module, scale in sorted(self._scales.items())}

    def change(self, module: str, shape: tuple[int, int]) -> Change:
        scale, weight = self._scales[module], self._weight(module)
        if scale.shape != (len(weight),):
            raise AdapterInvalid(
                f"{module} has {len(weight)} outputs, and ia3_l is for {len(scale)}"
            )
        norms = np.sqrt(np.einsum("oi,oi->o", weight, weight, dtype=np.float64))
        a, b = np.zeros((1, shape[1]), np.float32), np.zeros((shape[0], 1), np.float32)
        magnitude = (scale * norms).astype(np.float32)
        return Factors(a, b, ("F32", "F32"), 1.0, ("F32", magnitude))

    def saved(self) -> Iterator[Saved]:
        yield from self._upload.saved()
        for module, scale in self._scales.items():
            name = f"{module}.bias"
            if name in self._base.others:
                bias = self._base.file.read(self._base.others[name]) * scale
                yield Saved(name, "F32", bias.shape, iter([bias]))

    def _weight(self, module: str) -> Matrix:
        if module not in self._base.modules:
            raise AdapterInvalid(f"the base has no {module}.weight")
        return self._base.weight(module)

    def _take(self, module: str) -> None:
        """Find the outputs that a module's vector [out, 1] or [1, in] scales."""
        vector = self._upload.change(module, (0, 0))
        assert isinstance(vector, np.ndarray)
        if vector.ndim == 2 and vector.shape[1] == 1:
            self._scale(module, vector[:, 0])
        elif vector.ndim != 2 or vector.shape[0] != 1:
            raise AdapterInvalid(
                f"{module}.ia3_l {list(vector.shape)} is neither a row nor a column"
            )
        elif not module.endswith(".mlp.down_proj"):
            raise AdapterInvalid(
                f"{module}: its inputs are scaled (feedforward_modules), and only those of "
                "down_proj are outputs of one other layer; merge it (merge_and_unload), and serve "
                "the model as a base"
            )
        else:
            self._scale_inputs(module.removesuffix("down_proj"), vector[0])

    def _scale_inputs(self, prefix: str, scale: Matrix) -> None:
        fused = f"{prefix}gate_up_proj"
        if fused in self._base.modules:  # the gate's outputs come first
            self._scale(fused, np.concatenate([np.ones_like(scale), scale]))
        else:
            self._scale(f"{prefix}up_proj", scale)

    def _scale(self, module: str, scale: Matrix) -> None:
        known = self._scales.get(module)
        if known is not None and known.shape != scale.shape:
            raise AdapterInvalid(f"{module}: its vectors are {known.shape} and {scale.shape}")
        self._scales[module] = scale if known is None else known * scale

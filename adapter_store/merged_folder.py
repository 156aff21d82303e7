"""Write the folder of an adapter that is combined from others: it is an adapter like any other.

Its manifest holds the recipe, from which its digest follows. Tensors are computed and written one
after the other, so that memory holds those of one module at a time.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from adapter_store.errors import AdapterInvalid
from adapter_store.layout import HEADER_LIMITS, WEIGHTS_NAME, LoraModule, read_lora_layout
from adapter_store.manifest import (
    CONFIG_NAME,
    MANIFEST_NAME,
    AdapterManifest,
    FileEntry,
    canonical_config,
)
from adapter_store.merging import Factors, Matrix, merge_factors
from adapter_store.peft_config import MAX_LORA_RANK
from adapter_store.recipes import Recipe
from adapter_store.safetensors_file import TensorEntry, read_header

_NO_HASH = "0" * 64


@dataclass(frozen=True, slots=True)
class _Member:
    path: Path
    tensors: Mapping[str, TensorEntry]
    modules: Mapping[str, LoraModule]
    weight: float
    key: str


class MergedAdapter:
    """An adapter that is still to be computed, of members whose folders must stay as they are.

    Reads headers alone. Raises AdapterInvalid if the members cannot be combined.
    """

    def __init__(self, recipe: Recipe, base: str, folders: Sequence[Path]) -> None:
        self._recipe = recipe
        self._base = base
        self._digest = recipe.digest(base)
        self._members = [
            _open(folder, weight, f"{at} {digest}")
            for at, (folder, digest, weight) in enumerate(
                zip(folders, recipe.members, recipe.weights, strict=True)
            )
        ]
        names = sorted({name for member in self._members for name in member.modules})
        self._modules = {name: self._module(name) for name in names}
        ranks = {name: module.lora_rank for name, module in self._modules.items()}
        self._config = canonical_config(ranks, ranks, use_rslora=False)
        self._header = _header(self._modules)

    @property
    def nbytes(self) -> int:
        """The bytes of its files together."""
        manifest = self._manifest(_NO_HASH)
        return manifest.nbytes + len(manifest.to_json())

    def write(self, folder: Path) -> None:
        """Compute it into an empty folder."""
        (folder / CONFIG_NAME).write_bytes(self._config)
        sha256 = hashlib.sha256()
        with (folder / WEIGHTS_NAME).open("wb") as file:
            for chunk in self._chunks():
                file.write(chunk)
                sha256.update(chunk)
        (folder / MANIFEST_NAME).write_bytes(self._manifest(sha256.hexdigest()).to_json())

    def _chunks(self) -> Iterator[bytes]:
        yield self._header
        for name in self._modules:
            for matrix in merge_factors(
                [_factors(m, name) for m in self._members if name in m.modules],
                self._recipe,
                self._digest,
                name,
            ):
                if not np.isfinite(matrix).all():
                    raise AdapterInvalid(f"{name} of the combined adapter is not finite")
                yield np.ascontiguousarray(matrix, dtype="<f4").tobytes()

    def _manifest(self, weights_sha256: str) -> AdapterManifest:
        modules = self._modules.values()
        num_parameters = sum(m.lora_rank * (m.in_features + m.out_features) for m in modules)
        files = {
            CONFIG_NAME: FileEntry(len(self._config), hashlib.sha256(self._config).hexdigest()),
            WEIGHTS_NAME: FileEntry(len(self._header) + 4 * num_parameters, weights_sha256),
        }
        return AdapterManifest(
            digest=self._digest,
            base=self._base,
            lora_rank=max(module.lora_rank for module in modules),
            num_parameters=num_parameters,
            nbytes=sum(file.nbytes for file in files.values()),
            files=files,
            modules=self._modules,
            recipe=self._recipe,
        )

    def _module(self, name: str) -> LoraModule:
        parts = [member.modules[name] for member in self._members if name in member.modules]
        first = parts[0]
        for part in parts[1:]:
            if (part.in_features, part.out_features) != (first.in_features, first.out_features):
                raise AdapterInvalid(f"{name} has different sizes in the adapters to be combined")
        ranks = [part.lora_rank for part in parts]
        if self._recipe.method == "cat":
            rank = sum(ranks)
        elif len(set(ranks)) == 1:
            rank = ranks[0]
        else:
            raise AdapterInvalid(
                f"{name} has the ranks {', '.join(map(str, ranks))}, and {self._recipe.method} "
                "needs equal ones; a weighted set (a:0.5+b:0.5) does not"
            )
        if rank > MAX_LORA_RANK:
            raise AdapterInvalid(
                f"{name} would have rank {' + '.join(map(str, ranks))} = {rank}, and at most "
                f"{MAX_LORA_RANK} is served"
            )
        a, b = (f"base_model.model.{name}.lora_{side}.weight" for side in "AB")
        return LoraModule(rank, 1.0, first.in_features, first.out_features, "F32", a, b)


def _open(folder: Path, weight: float, key: str) -> _Member:
    path = folder / WEIGHTS_NAME
    try:
        tensors = read_header(path, HEADER_LIMITS)
    except ValueError as error:
        raise AdapterInvalid(f"{path.name} is not a valid safetensors file: {error}") from error
    layout = read_lora_layout(folder)
    if not layout.has_factors_alone:
        raise AdapterInvalid(
            f"adapter {key.partition(' ')[2]} cannot be combined with others: it has more than "
            "lora_A and lora_B (DoRA, biases), or stores them in another form (QALoRA, BD-LoRA)"
        )
    if layout.invocation_token_ids:
        raise AdapterInvalid(
            f"adapter {key.rpartition(' ')[2]} is an activated LoRA (alora_invocation_tokens), "
            "which cannot be weighted or combined with others; ask for it by its name alone"
        )
    return _Member(path, tensors, layout.modules, weight, key)


def _factors(member: _Member, name: str) -> Factors:
    module = member.modules[name]
    with member.path.open("rb") as file:
        a, b = (_read(file.fileno(), member.tensors[t]) for t in (module.lora_a, module.lora_b))
    return Factors(a, b, member.weight * module.scaling, member.key)


def _read(descriptor: int, tensor: TensorEntry) -> Matrix:
    raw = os.pread(descriptor, tensor.end - tensor.start, tensor.start)
    if tensor.dtype == "BF16":  # the upper half of a float32
        wide = np.frombuffer(raw, "<u2").astype(np.uint32) << np.uint32(16)
        return wide.view(np.float32).reshape(tensor.shape)
    view = {"F32": "<f4", "F16": "<f2"}[tensor.dtype]
    return np.frombuffer(raw, view).astype(np.float32).reshape(tensor.shape)


def _header(modules: Mapping[str, LoraModule]) -> bytes:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for module in modules.values():
        shapes = {
            module.lora_a: (module.lora_rank, module.in_features),
            module.lora_b: (module.out_features, module.lora_rank),
        }
        for name, shape in shapes.items():
            end = at + 4 * shape[0] * shape[1]
            entries[name] = {"dtype": "F32", "shape": shape, "data_offsets": (at, end)}
            at = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text

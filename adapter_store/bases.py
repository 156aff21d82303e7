"""Describe a base model: its fingerprint and the shapes of the modules that adapters may change.

Reads only config.json and safetensors files. Knows no architecture.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from adapter_store.base_text import NO_TEXT, BaseText, base_text_of, describe_text
from adapter_store.errors import BaseInvalid, StoreCorrupt
from adapter_store.object_store import OnBytes
from adapter_store.packed_shapes import packed_shapes
from adapter_store.safetensors_file import hash_file, read_header

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
HASHES_NAME = "file-hashes.json"
_PROVENANCE_KEYS = ("_name_or_path", "transformers_version")  # without effect on the computation
_MODULE = re.compile(
    r"(?P<module>(?:.+\.)?layers\.\d+\.(?:self_attn|mlp)\.(?:.+\.)?\w*_proj)\.weight"
)


@dataclass(frozen=True, slots=True)
class BaseModel:
    """A description of a base; `modules` maps a module's path to (out_features, in_features).

    `parameters` are the shapes of its other weights and biases, by name; empty in a description
    from before they were listed.
    """

    fingerprint: str
    modules: Mapping[str, tuple[int, int]]
    parameters: Mapping[str, tuple[int, ...]] = field(default_factory=dict[str, tuple[int, ...]])
    text: BaseText = NO_TEXT

    def to_json(self) -> bytes:
        """Encode the description for the object store; the inverse of `parse_base`."""
        data = {
            "fingerprint": self.fingerprint,
            "modules": dict(self.modules),
            "parameters": dict(self.parameters),
            "text": self.text.to_data(),
        }
        return json.dumps(data, indent=1, sort_keys=True).encode()


def describe_base(model_folder: Path, cache_dir: Path, on_bytes: OnBytes) -> BaseModel:
    """Hash a model folder and list its modules.

    Hashes of files that did not change since the last call come from a file in `cache_dir`;
    `on_bytes` is called with the bytes hashed since its last call. Raises BaseInvalid.
    """
    try:
        config = _read_config(model_folder)
        paths = weight_files(model_folder)
        modules, parameters = _shapes(paths)
        hashes = _hash_files(paths, cache_dir / HASHES_NAME, on_bytes)
    except (OSError, ValueError, AttributeError) as error:
        raise BaseInvalid(f"{model_folder} is not a usable model folder: {error}") from error
    parts = {"config": config, "files": hashes}
    fingerprint = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
    text = describe_text(model_folder, _vocab_size(config))
    return BaseModel(fingerprint, modules, parameters, text)


def parse_base(raw: bytes, fingerprint: str) -> BaseModel:
    """Decode the description of this base; StoreCorrupt if it is damaged or another base's."""
    try:
        data: dict[str, Any] = json.loads(raw)
        modules = {name: (int(out), int(in_)) for name, (out, in_) in data["modules"].items()}
        parameters = {
            str(name): tuple(int(size) for size in shape)
            for name, shape in data.get("parameters", {}).items()
        }
        text = base_text_of(data.get("text") or {})
        base = BaseModel(str(data["fingerprint"]), modules, parameters, text)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise StoreCorrupt(
            f"the description of base {fingerprint} is damaged: {error!r}"
        ) from error
    if base.fingerprint != fingerprint:
        raise StoreCorrupt(f"the description of base {fingerprint} is {base.fingerprint}'s")
    return base


def weight_files(model_folder: Path) -> list[Path]:
    """List the safetensors files of a model, sharded or not, in the order of their names.

    Raises OSError or ValueError if the index of the shards is damaged.
    """
    whole = model_folder / WEIGHTS_NAME
    index = model_folder / INDEX_NAME
    if whole.is_file() or not index.is_file():
        return [whole]
    weight_map: dict[str, Any] = json.loads(index.read_bytes()).get("weight_map", {})
    names = sorted({str(name) for name in weight_map.values()})
    if strange := [name for name in names if name != Path(name).name]:
        raise ValueError(f"{INDEX_NAME} names {strange[0]!r}, which is not in the folder")
    return [model_folder / name for name in names]


def is_module_weight(tensor: str) -> bool:
    """Check whether a tensor of a model is the weight of a module that adapters may change."""
    return _MODULE.fullmatch(tensor) is not None


def _read_config(model_folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((model_folder / CONFIG_NAME).read_bytes())
    return {key: value for key, value in config.items() if key not in _PROVENANCE_KEYS}


def _vocab_size(config: Mapping[str, Any]) -> int:
    size = config.get("vocab_size")
    return size if type(size) is int and size > 0 else 0


def _shapes(
    paths: list[Path],
) -> tuple[dict[str, tuple[int, int]], dict[str, tuple[int, ...]]]:
    """Return the shapes of the modules, and of all other weights and biases."""
    tensors = {name: (path, t) for path in paths for name, t in read_header(path).items()}
    packed = packed_shapes(tensors)
    modules = {name: shape for name, shape in packed.items() if is_module_weight(f"{name}.weight")}
    parameters: dict[str, tuple[int, ...]] = {}
    for name, (_, tensor) in tensors.items():
        match = _MODULE.fullmatch(name)
        if match and match["module"] in packed:
            continue
        if match and len(tensor.shape) == 2:
            modules[match["module"]] = (tensor.shape[0], tensor.shape[1])
        elif name.endswith((".weight", ".bias")):
            parameters[name] = tensor.shape
    if not modules:
        raise ValueError("it has no layers.N.(self_attn|mlp).*_proj.weight matrix")
    return dict(sorted(modules.items())), dict(sorted(parameters.items()))


def _hash_files(paths: list[Path], cache: Path, on_bytes: OnBytes) -> dict[str, str]:
    known = _read_cache(cache)
    fresh: dict[str, str] = {}
    hashes: dict[str, str] = {}
    for path in paths:
        stat = path.stat()
        key = f"{path.resolve()}:{stat.st_size}:{stat.st_mtime_ns}"
        if key not in known:
            known[key] = fresh[key] = hash_file(path, on_bytes)
        hashes[path.name] = known[key]
    if fresh:
        _write_cache(cache, known)
    return hashes


def _read_cache(cache: Path) -> dict[str, str]:
    """Load the known hashes; a damaged file counts as an empty one, since it only saves time."""
    try:
        data: dict[str, Any] = json.loads(cache.read_bytes())
        return {str(key): str(value) for key, value in data.items()}
    except (OSError, ValueError, AttributeError):
        return {}


def _write_cache(cache: Path, hashes: dict[str, str]) -> None:
    cache.parent.mkdir(parents=True, exist_ok=True)
    draft = cache.with_name(f"{cache.name}.{hashlib.sha256(str(hashes).encode()).hexdigest()[:16]}")
    draft.write_text(json.dumps(hashes, indent=1, sort_keys=True))
    draft.replace(cache)

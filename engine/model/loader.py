"""From a folder of safetensors to a Decoder, one tensor at a time.

Every tensor of the checkpoint is used exactly once, with the shape that its config promises, or
the load is refused with its name. At no time are there two copies of more than a few layers.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from engine.kernels.dispatch import select_ops
from engine.model.decoder import Decoder
from engine.model.families import read_spec
from engine.model.layers import Build, Part
from engine.model.spec import ModelError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
TIED_HEAD = "lm_head.weight"  # some checkpoints keep a copy of what their config ties
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def load_decoder(
    folder: Path,
    *,
    dtype: torch.dtype,
    device: torch.device,
    max_model_len: int,
    progress: bool = False,
) -> Decoder:
    """The model in `folder`, ready to run; raises ModelError where it cannot be served."""
    spec = read_spec(folder, max_model_len)
    build = Build(select_ops(device, dtype), dtype, device)
    decoder = Decoder(spec, build, max_model_len)
    parts = {part.key: part for part in decoder.parts()}
    files = _weight_files(folder)
    skipped = {key for keys in files.values() for key in keys if _is_derived(key)}
    if spec.tied_embeddings:
        skipped.add(TIED_HEAD)
    _check_keys(folder, files, parts, skipped)
    with tqdm(total=len(parts), desc="weights", unit="tensor", disable=not progress) as bar:
        for path, keys in files.items():
            _load_file(path, [key for key in keys if key not in skipped], parts, bar)
    if spec.tied_embeddings:
        _check_tied_head(files, decoder)
        decoder.tie_head()
    return decoder.eval()


def weight_bytes(decoder: Decoder, dtype: torch.dtype) -> int:
    """What the weights weigh in `dtype`; a tied output layer counts once."""
    return sum(torch.Size(part.shape).numel() for part in decoder.parts()) * dtype.itemsize


def _weight_files(folder: Path) -> dict[Path, list[str]]:
    """The safetensors files of a checkpoint and the tensors that each really holds."""
    if (folder / INDEX).exists():
        paths = _shards(folder / INDEX)
    elif (folder / SINGLE).exists():
        paths = [folder / SINGLE]
    else:
        raise ModelError(f"{folder} has neither {SINGLE} nor {INDEX}; other formats are not read")
    found: dict[Path, list[str]] = {}
    for path in paths:
        with _opened(path) as file:
            found[path] = list(file.keys())
    return found


def _shards(index: Path) -> list[Path]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = list(dict.fromkeys(weight_map.values()))
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise ModelError(f"{index} is not an index of safetensors files: {error!r}") from error
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise ModelError(f"{index} names {name!r}, which is not a file beside it")
    return [index.parent / name for name in names]


def _check_keys(
    folder: Path, files: dict[Path, list[str]], parts: dict[str, Part], skipped: set[str]
) -> None:
    seen: dict[str, Path] = {}
    for path, keys in files.items():
        for key in keys:
            if key in seen:
                raise ModelError(f"{path}: {key} is also in {seen[key]}")
            if key not in parts and key not in skipped:
                raise ModelError(f"{path}: {key} is not a weight of this architecture")
            seen[key] = path
    missing = [key for key in parts if key not in seen]
    if missing:
        raise ModelError(f"{folder} lacks {missing[0]} ({len(missing)} weights are missing)")


def _is_derived(key: str) -> bool:
    """Old checkpoints carry rotary frequencies, which follow from the config."""
    return key.endswith(".rotary_emb.inv_freq")


def _load_file(path: Path, keys: list[str], parts: dict[str, Part], bar: "tqdm[None]") -> None:
    with _opened(path) as file:
        for key in keys:
            tensor, part = file.get_tensor(key), parts[key]
            if tuple(tensor.shape) != part.shape:
                found, wanted = list(tensor.shape), list(part.shape)
                raise ModelError(f"{path}: {key} has shape {found}; the config asks for {wanted}")
            if tensor.dtype not in FLOATS:
                allowed = ", ".join(map(str, FLOATS))
                raise ModelError(f"{path}: {key} is {tensor.dtype}, not one of {allowed}")
            part.store(tensor)
            bar.update()


def _check_tied_head(files: dict[Path, list[str]], decoder: Decoder) -> None:
    embedding = decoder.embedding.weight
    for path in (path for path, keys in files.items() if TIED_HEAD in keys):
        with _opened(path) as file:
            if not torch.equal(file.get_tensor(TIED_HEAD).to(embedding), embedding):
                raise ModelError(
                    f"{path}: {TIED_HEAD} differs from the embedding, but config.json says "
                    "tie_word_embeddings=true"
                )


@contextmanager
def _opened(path: Path) -> Iterator[safe_open]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{path} cannot be read: {error}") from error

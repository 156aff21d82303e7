"""Checkpoint: reads tensors by name from a folder of safetensors files, and checks each.

Files are memory-mapped: a tensor's pages are read when it is used, and the operating system may
drop them. Does not interpret the tensors. Every error names the file and the tensor.

Files of a model that was saved without its output layer, as those of embedding models are, name
their tensors without `model.` in front; here they have it.
"""

import json
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from engine.model.spec import ModelError

PREFIX, BARE_EMBEDDING = "model.", "embed_tokens.weight"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


class Checkpoint:
    """Context manager that keeps the files open. Raises ModelError."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._paths: dict[str, Path] = {}
        self._prefix = ""  # of the names here, which those in the files lack
        self._files: dict[Path, safe_open] = {}
        self._opened = ExitStack()

    def __enter__(self) -> "Checkpoint":
        with ExitStack() as opened:
            for path in _weight_files(self.folder):
                self._open(path, opened)
            self._opened = opened.pop_all()
        if BARE_EMBEDDING in self._paths:
            self._prefix = PREFIX
            self._paths = {f"{PREFIX}{key}": path for key, path in self._paths.items()}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._opened.close()

    @property
    def keys(self) -> list[str]:
        """Names of all tensors, in the files' order."""
        return list(self._paths)

    def __contains__(self, key: str) -> bool:
        return key in self._paths

    def tensor(
        self, key: str, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...], asker: str
    ) -> Tensor:
        """Return a view of the file, valid after the context ends too.

        Raises ModelError for another shape or dtype; `asker` names what requires this shape.
        """
        tensor = self.any_shape(key)
        if tuple(tensor.shape) != shape:
            found, wanted = list(tensor.shape), list(shape)
            raise self.error(key, f"has shape {found}; {asker} asks for {wanted}")
        if tensor.dtype not in dtypes:
            raise self.error(key, f"is {tensor.dtype}, not {_one_of(dtypes)}")
        return tensor

    def vector(self, key: str, dtype: torch.dtype) -> Tensor:
        """Return a one-dimensional tensor of any length."""
        tensor = self.any_shape(key)
        return self.tensor(key, (tensor.numel(),), (dtype,), "its meaning")

    def error(self, key: str, text: str) -> ModelError:
        return ModelError(f"{self._paths[key]}: {key.removeprefix(self._prefix)} {text}")

    def any_shape(self, key: str) -> Tensor:
        path = self._paths[key]
        try:
            return self._files[path].get_tensor(key.removeprefix(self._prefix))
        except (OSError, SafetensorError) as error:
            raise ModelError(f"{path} cannot be read: {error}") from error

    def _open(self, path: Path, opened: ExitStack) -> None:
        try:
            file = opened.enter_context(safe_open(path, framework="pt"))
        except (OSError, SafetensorError) as error:
            raise ModelError(f"{path} cannot be read: {error}") from error
        self._files[path] = file
        for key in file.keys():  # noqa: SIM118  # not a mapping
            if key in self._paths:
                raise ModelError(f"{path}: {key} is also in {self._paths[key]}")
            self._paths[key] = path


def _one_of(dtypes: tuple[torch.dtype, ...]) -> str:
    return ("one of " if len(dtypes) > 1 else "") + ", ".join(map(str, dtypes))


def _weight_files(folder: Path) -> list[Path]:
    """Find the files as transformers does: an index next to a whole file is a left-over."""
    if (folder / SINGLE).exists():
        return [folder / SINGLE]
    if (folder / INDEX).exists():
        return _shards(folder / INDEX)
    raise ModelError(f"{folder} has neither {SINGLE} nor {INDEX}; other formats are not read")


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

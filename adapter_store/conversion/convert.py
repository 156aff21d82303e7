"""Convert an upload into a PEFT LoRA folder, one module at a time."""

import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from adapter_store.conversion.change import Change, Factors, Source
from adapter_store.conversion.fine_tune import is_model, open_fine_tune
from adapter_store.conversion.folder_writer import FolderWriter
from adapter_store.conversion.gguf_upload import GgufUpload
from adapter_store.conversion.ia3 import Ia3Upload
from adapter_store.conversion.in_turn import in_turn
from adapter_store.conversion.low_rank import low_rank
from adapter_store.conversion.mlx import is_mlx, open_mlx
from adapter_store.conversion.model_weights import base_weights
from adapter_store.conversion.options import DEFAULT_RANK, EXACT_RANK, ConversionOptions
from adapter_store.conversion.peft_upload import PeftUpload
from adapter_store.conversion.record import ConversionRecord
from adapter_store.conversion.saved_upload import SavedUpload, has_no_factors
from adapter_store.conversion.subtracted_init import SubtractedInit, changes_base
from adapter_store.errors import AdapterInvalid
from adapter_store.object_store import OnBytes
from adapter_store.own_files import UPLOADED_FILES
from adapter_store.peft_config import CONFIG_NAME, read_config
from adapter_store.saved import is_vocabulary
from adapter_store.tensor_causes import unknown_module
from adapter_store.wrapped_names import plain_name, whole_name


def open_upload(folder: Path, options: ConversionOptions) -> Source | None:
    """Find out what form an upload has; None if it is a PEFT LoRA folder. Raises AdapterInvalid.

    The upload is a folder, or one file of llama.cpp's.
    """
    if (gguf := _gguf_file(folder)) is not None:
        return GgufUpload(gguf, options.base_folder)
    if is_model(folder):
        return open_fine_tune(folder, options.base_folder)
    config = read_config(folder)
    if is_mlx(config):
        return open_mlx(folder, config, options.base_folder)
    if config.get("peft_type") == "LORA":
        changed = changes_base(config)
        return SubtractedInit(folder, config, options.initial_folder) if changed else None
    if config.get("peft_type") == "IA3":
        return Ia3Upload(folder, config, options.base_folder)
    if has_no_factors(config.get("peft_type")):
        return SavedUpload(folder, config)
    return PeftUpload(folder, config, base_weights(options.base_folder))


def convert(
    source: Source,
    base_modules: Mapping[str, tuple[int, int]],
    options: ConversionOptions,
    folder: Path,
    on_bytes: OnBytes,
    num_threads: int = 1,
) -> ConversionRecord:
    """Write what a source is as a PEFT LoRA folder; return what of it is not exact.

    `base_modules` are [out, in] of linear layers, lm_head's [V, E] too, and the embedding's [E, V].
    `on_bytes` is called with the bytes of the source converted since its last call. So many modules
    are in work at a time; what comes out is the same for any number. Raises AdapterInvalid if a
    module does not fit the base or its residual is too large.
    """
    shapes = {whole_name(plain_name(name)): shape for name, shape in base_modules.items()}
    residuals: dict[str, float] = {}
    saved = list(source.saved())
    with FolderWriter(folder, source.modules, (each.name for each in saved)) as writer:

        def work(module: str) -> tuple[str, tuple[Factors, float] | None]:
            shape = shapes.get(whole_name(module))
            if shape is None:
                raise AdapterInvalid(unknown_module(module, base_modules))
            change = source.change(module, shape)
            if change is not None and not isinstance(change, Factors) and change.shape != shape:
                raise AdapterInvalid(
                    f"{module} is {shape[0]} x {shape[1]} in the base, but the adapter was made "
                    f"for {change.shape[0]} x {change.shape[1]}"
                )
            return module, _factors(change, module, options)

        for module, done in in_turn(work, source.modules, num_threads):
            if done is not None:
                factors, residual = done
                if residual:
                    residuals[module] = residual
                writer.add(module, factors)
            on_bytes(source.modules[module])
        for each in saved:
            writer.save(each)
        if writer.is_empty:
            raise AdapterInvalid(f"{source.name}: it has the same weights as its base")
        if not writer.has_factors:  # which every adapter must have
            module = min(name for name in shapes if not is_vocabulary(name))
            writer.add(module, _nothing(shapes[module]))
        writer.finish()
    return ConversionRecord(source.name, residuals)


def _nothing(shape: tuple[int, int]) -> Factors:
    out_features, in_features = shape
    a, b = np.zeros((1, in_features), np.float32), np.zeros((out_features, 1), np.float32)
    return Factors(a, b, ("F32", "F32"), 1.0)


def _gguf_file(upload: Path) -> Path | None:
    if upload.is_file():
        return upload if upload.suffix == ".gguf" else None
    files = sorted(upload.glob("*.gguf"))
    if not files or (upload / CONFIG_NAME).exists():
        return None
    if len(files) > 1:
        raise AdapterInvalid(f"{upload} has {len(files)} GGUF files: name one of them")
    return files[0]


def copy_own_files(source: Path, target: Path) -> None:
    """Keep what is read beside the weights."""
    for name in UPLOADED_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def _factors(
    change: Change | None, module: str, options: ConversionOptions
) -> tuple[Factors, float] | None:
    if change is None:
        return None
    if isinstance(change, Factors):
        return change, 0.0
    limits = options.lora_rank or DEFAULT_RANK, options.lora_rank or EXACT_RANK
    product, residual = low_rank(change, *limits)
    if residual > options.max_residual:
        raise AdapterInvalid(
            f"{module}: factors of rank {product.a.shape[0]} miss {residual:.3g} of the change "
            f"(relative Frobenius norm), and {options.max_residual:g} is allowed: convert it with "
            "a higher rank, or allow more with --max-residual (adapters.convert.max_residual)"
        )
    return Factors(product.a, product.b, ("F32", "F32"), 1.0), residual

"""Give publishing a PEFT LoRA folder, whatever was uploaded."""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapter_store.bases import BaseModel
from adapter_store.conversion.options import ConversionOptions
from adapter_store.conversion.record import ConversionRecord, parse_record
from adapter_store.conversion.subtracted_init import changes_base
from adapter_store.errors import AdapterInvalid
from adapter_store.object_store import OnBytes
from adapter_store.peft_config import CONFIG_NAME, read_config

PROGRAM = (sys.executable, "-m", "adapter_store.conversion.process")
# A process that reads strangers' files gets no credentials.
_PASSED_ON = ("LD_LIBRARY_PATH", "PATH", "TZ")
_ONE_THREAD = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


@dataclass(frozen=True, slots=True)
class Upload:
    """A PEFT LoRA folder, and how it was made if it is not the user's own."""

    folder: Path
    record: ConversionRecord | None = None


@contextlib.contextmanager
def converted_upload(
    upload: Path,
    base: BaseModel,
    options: ConversionOptions | None,
    scratch: Path,
    on_bytes: OnBytes,
) -> Generator[Upload, None, None]:
    """Yield the folder to publish; one that had to be converted exists during the block.

    `on_bytes` is called with the bytes converted since its last call. Raises AdapterInvalid.
    """
    if options is None:
        if upload.is_file():
            raise AdapterInvalid(f"{upload} is no PEFT folder; --convert makes one of it")
        yield Upload(upload)
        return
    if _is_lora(upload):
        yield Upload(upload)
        return
    scratch.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=scratch) as name:
        record = _convert(upload, base, options, Path(name), on_bytes)
        yield Upload(upload) if record is None else Upload(Path(name), record)


def _is_lora(upload: Path) -> bool:
    """Check whether there is nothing to convert, which needs no process."""
    if not (upload / CONFIG_NAME).is_file():
        return False
    config = read_config(upload)
    return config.get("peft_type") == "LORA" and not changes_base(config)


def _convert(
    upload: Path, base: BaseModel, options: ConversionOptions, folder: Path, on_bytes: OnBytes
) -> ConversionRecord | None:
    """Run the conversion; None if the upload is a PEFT LoRA folder. Raises AdapterInvalid."""
    job = {
        "upload": str(upload.absolute()),
        "folder": str(folder.absolute()),
        "modules": dict(base.modules),
        "vocabulary": vocabulary_shapes(base.parameters),
        "lora_rank": options.lora_rank,
        "max_residual": options.max_residual,
        "base_folder": _absolute(options.base_folder),
        "initial_folder": _absolute(options.initial_folder),
    }
    kept = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
    environment = {**kept, **_ONE_THREAD, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with (
        subprocess.Popen(
            PROGRAM, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as process,
        _killed(process, options.limit_s),
    ):
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            json.dump(job, process.stdin)
            process.stdin.close()
        answer = _follow(process, on_bytes)
    if answer is None:
        limit = (
            "" if options.limit_s is None else f"longer than the {options.limit_s:g} s allowed, or "
        )
        raise AdapterInvalid(f"{upload.name} takes {limit}more memory to convert than there is")
    if "refused" in answer:
        raise AdapterInvalid(str(answer["refused"]))
    return None if answer["record"] is None else parse_record(answer["record"])


def _follow(process: "subprocess.Popen[str]", on_bytes: OnBytes) -> Mapping[str, Any] | None:
    """Pass progress on; return the last line, or None if the process ended without one."""
    assert process.stdout is not None
    for line in process.stdout:
        said: dict[str, Any] = json.loads(line)
        if "bytes" not in said:
            return said
        on_bytes(said["bytes"])
    return None


@contextlib.contextmanager
def _killed(process: "subprocess.Popen[str]", limit_s: float | None) -> Generator[None, None, None]:
    """End the process with the block, and after its time."""
    timer = threading.Timer(limit_s or threading.TIMEOUT_MAX, process.kill)
    timer.daemon = True
    if limit_s is not None:
        timer.start()
    try:
        yield
    except BaseException:
        process.kill()
        raise
    finally:
        timer.cancel()


def vocabulary_shapes(parameters: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, int]]:
    """Return the shapes of embedding and output layer as adapters see them, also if tied."""
    shape = parameters.get("model.embed_tokens.weight", ())
    if len(shape) != 2:
        return {}
    return {"model.embed_tokens": (shape[1], shape[0]), "lm_head": (shape[0], shape[1])}


def _absolute(path: Path | None) -> str | None:
    return None if path is None else str(path.absolute())

"""Give publishing a PEFT LoRA folder, whatever was uploaded."""

import contextlib
import tempfile
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path

from adapter_store.bases import BaseModel
from adapter_store.conversion.convert import convert, copy_own_files, open_upload
from adapter_store.conversion.options import ConversionOptions
from adapter_store.conversion.record import ConversionRecord
from adapter_store.errors import AdapterInvalid
from adapter_store.object_store import OnBytes


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
    source = open_upload(upload, options)
    if source is None:
        yield Upload(upload)
        return
    scratch.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=scratch) as name:
        folder = Path(name)
        record = convert(source, base.modules, options, folder, on_bytes)
        copy_own_files(upload, folder)
        yield Upload(folder, record)

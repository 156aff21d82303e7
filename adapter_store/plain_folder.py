"""Make a verified folder of an adapter that lies as a plain PEFT folder in an object store."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from adapter_store.bases import BaseModel
from adapter_store.errors import AdapterInvalid, ObjectChanged, ObjectNotFound, SourceUnavailable
from adapter_store.layout import WEIGHTS_NAME
from adapter_store.manifest import CONFIG_NAME, MANIFEST_NAME, prepare
from adapter_store.object_store import ObjectStore, Reading, always_wanted, ignore_bytes
from adapter_store.own_files import MAX_OWN_BYTES, OwnFiles, parse_own_files, read_own_files
from adapter_store.plain_folders import check_origin
from adapter_store.plain_origin import PlainFile, PlainOrigin

MANIFEST_BYTES = 4 * 2**20  # room for what is made of a folder beside its own files
_EMBEDDING = "model.embed_tokens.weight"


@dataclass(frozen=True, slots=True)
class PlainAdapter:
    """An adapter that is still to be fetched and checked, as the disk cache builds one."""

    origin: PlainOrigin
    name: str
    base: BaseModel
    objects: ObjectStore
    is_wanted: Callable[[], bool] = always_wanted

    @property
    def nbytes(self) -> int:
        """The bytes that it may take. Raises AdapterInvalid."""
        return check_origin(self.origin).nbytes + MANIFEST_BYTES

    def write(self, folder: Path) -> None:
        """Fetch and check it, all that `reef publish` checks, into an empty folder.

        Raises AdapterInvalid, SourceUnavailable, DownloadStopped, OSError.
        """
        files = self.origin.files
        fetch_plain(self.objects, self.name, files, folder, self.is_wanted)
        try:
            prepared = prepare(folder, self.base, ignore_bytes)
        except AdapterInvalid as error:
            raise AdapterInvalid(_without(str(error), folder)) from error
        own_rows = prepared.manifest.vocab_size
        if own_rows not in (0, self.base.parameters.get(_EMBEDDING, (own_rows,))[0]):
            raise AdapterInvalid(
                f"the adapter has {own_rows} token ids, and other numbers than the base's are "
                "served of published adapters alone: publish it with `reef publish`"
            )
        for file in files:
            if file.name != WEIGHTS_NAME:
                (folder / file.name).unlink()
        (folder / CONFIG_NAME).write_bytes(prepared.config)
        for name, content in prepared.own_files.items():
            (folder / name).write_bytes(content)
        digest = self.origin.digest(self.base.fingerprint)
        manifest = replace(prepared.manifest, digest=digest, origin=self.origin)
        (folder / MANIFEST_NAME).write_bytes(manifest.to_json())


def fetch_plain(
    objects: ObjectStore,
    name: str,
    files: Sequence[PlainFile],
    folder: Path,
    is_wanted: Callable[[], bool] = always_wanted,
) -> None:
    """Copy files of a folder, all in the states that are asked for.

    Raises AdapterInvalid for a small file that is large, SourceUnavailable if a state is gone.
    """
    for file in files:
        if file.name != WEIGHTS_NAME and file.nbytes > MAX_OWN_BYTES:
            raise AdapterInvalid(
                f"{file.name} has {file.nbytes} bytes, more than the {MAX_OWN_BYTES} allowed"
            )
    for file in files:
        how = Reading(is_wanted=is_wanted, etag=file.etag)
        try:
            objects.get_file(f"{name}/{file.name}", folder / file.name, how)
        except (ObjectChanged, ObjectNotFound) as error:
            raise SourceUnavailable(f"{name} has changed since the request came") from error


def own_files_of(
    objects: ObjectStore, name: str, origin: PlainOrigin, base: BaseModel, scratch: Path
) -> OwnFiles:
    """Read what an adapter brings beside its weights, by way of an empty folder.

    Raises AdapterInvalid, SourceUnavailable.
    """
    files = [file for file in origin.files if file.name not in (CONFIG_NAME, WEIGHTS_NAME)]
    try:
        fetch_plain(objects, name, files, scratch)
        return parse_own_files(read_own_files(scratch, base.text), name)
    except AdapterInvalid as error:
        raise AdapterInvalid(_without(str(error), scratch)) from error


def _without(sentence: str, folder: Path) -> str:
    """Leave this machine's paths out of what clients see."""
    return sentence.replace(f"{folder}/", "").replace(str(folder), "the adapter's folder")

"""Store the files of adapters under blobs/<digest>/, read them back and check them.

Invariant: the manifest is written last, so a blob that has one is complete.
"""

import hashlib
from collections.abc import Generator
from pathlib import Path

from adapter_store.chat_template import (
    MAX_FILE_BYTES,
    TEMPLATE_NAME,
    AdapterTemplate,
    parse_adapter_template,
)
from adapter_store.errors import ObjectNotFound, SourceUnavailable, StoreCorrupt
from adapter_store.manifest import (
    CONFIG_NAME,
    MANIFEST_NAME,
    AdapterManifest,
    PreparedAdapter,
    parse_manifest,
)
from adapter_store.object_store import CHUNK_BYTES, ObjectStore, OnBytes


class Blobs:
    """The files of all adapters in one object store. Thread-safe."""

    def __init__(self, objects: ObjectStore) -> None:
        self._objects = objects

    def upload(self, prepared: PreparedAdapter, on_bytes: OnBytes) -> None:
        """Store an adapter's files unless they are there already.

        Raises StoreCorrupt if the weights have changed since they were checked.
        """
        manifest = prepared.manifest
        if self._is_complete(manifest):
            return
        weights = prepared.weights
        sha256 = manifest.files[weights.name].sha256
        self._objects.put(_key(manifest.digest, CONFIG_NAME), prepared.config)
        if prepared.template is not None:
            self._objects.put(_key(manifest.digest, TEMPLATE_NAME), prepared.template)
        self._objects.put_file(_key(manifest.digest, weights.name), weights, sha256, on_bytes)
        self._objects.put_if_absent(_key(manifest.digest, MANIFEST_NAME), manifest.to_json())

    def download(self, digest: str, name: str, path: Path) -> None:
        """Write one file of an adapter to `path`. Raises ObjectNotFound, SourceUnavailable."""
        try:
            self._objects.get_file(_key(digest, name), path)
        except OSError as error:
            raise SourceUnavailable(f"cannot write {path}: {error}") from error

    def manifest(self, digest: str) -> AdapterManifest:
        """Read an adapter's manifest. Raises ObjectNotFound, StoreCorrupt."""
        return parse_manifest(self._objects.get(_key(digest, MANIFEST_NAME)), digest)

    def chat_template(self, digest: str) -> AdapterTemplate | None:
        """Read an adapter's own chat template; None if it has none.

        Raises ObjectNotFound, StoreCorrupt.
        """
        entry = self.manifest(digest).files.get(TEMPLATE_NAME)
        if entry is None:
            return None
        key = _key(digest, TEMPLATE_NAME)
        raw = self._objects.get_range(key, 0, MAX_FILE_BYTES)
        if hashlib.sha256(raw).hexdigest() != entry.sha256:
            raise StoreCorrupt(f"{key} does not have the sha256 {entry.sha256}")
        return parse_adapter_template(raw, digest)

    def problems(self, digest: str, on_bytes: OnBytes) -> Generator[str, None, None]:
        """Hash an adapter's files; yield one sentence for each that is missing or damaged."""
        try:
            manifest = self.manifest(digest)
        except (ObjectNotFound, StoreCorrupt) as error:
            yield str(error)
            return
        for name, expected in manifest.files.items():
            key = _key(digest, name)
            try:
                sha256 = self._hash(key, on_bytes)
            except ObjectNotFound as error:
                yield str(error)
                continue
            if sha256 != expected.sha256:
                yield f"{key} has sha256 {sha256}, not {expected.sha256}"

    def _is_complete(self, manifest: AdapterManifest) -> bool:
        """Check that all files are there, with the right sizes."""
        digest = manifest.digest
        sizes = {name: self._objects.size(_key(digest, name)) for name in manifest.files}
        expected = {name: entry.nbytes for name, entry in manifest.files.items()}
        return sizes == expected and self._objects.size(_key(digest, MANIFEST_NAME)) is not None

    def _hash(self, key: str, on_bytes: OnBytes) -> str:
        digest = hashlib.sha256()
        for chunk in self._chunks(key):
            digest.update(chunk)
            on_bytes(len(chunk))
        return digest.hexdigest()

    def _chunks(self, key: str) -> Generator[bytes, None, None]:
        start = 0
        while chunk := self._objects.get_range(key, start, CHUNK_BYTES):
            yield chunk
            start += len(chunk)
            if len(chunk) < CHUNK_BYTES:
                return


def _key(digest: str, name: str) -> str:
    return f"blobs/{digest}/{name}"

"""Make an API key, and put its hash into a keys file or show it for one.

The file is replaced in one step and under a lock, so a server that reads it meanwhile sees it
before or after, and of two concurrent commands none is lost. Comments in the file are lost.
"""

import json
import os
import re
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from adapter_store.file_lock import FileLock
from adapter_store.names import NAME_RULE
from deployments.tenants.key_id import draw_key, hash_key
from deployments.tenants.keys_file import KeysFileError, parse_document

NEW_FILE_MODE = 0o600


@dataclass(frozen=True, slots=True)
class Purpose:
    """What a key is for: a tenant's requests, and with a name its adapters; without a tenant
    /metrics, and with a name everybody's adapters."""

    tenant: str | None
    name: str | None = None  # of who gets it, as the audit log shows it

    def __str__(self) -> str:
        if self.name is not None:
            whose = "all tenants" if self.tenant is None else f"tenant {self.tenant}"
            return f"the adapters of {whose}"
        return "the metrics" if self.tenant is None else f"tenant {self.tenant}"


def make_key(purpose: Purpose, path: Path | None) -> str:
    """Make a key for a purpose. Raises KeysFileError or OSError."""
    for kind, name in (("tenant", purpose.tenant), ("name", purpose.name)):
        if name is not None and re.fullmatch(NAME_RULE, name) is None:
            raise KeysFileError(f"{kind} {name!r} does not match {NAME_RULE}")
    key = draw_key()
    _store(key, purpose, path)
    return key


def _store(key: str, purpose: Purpose, path: Path | None) -> None:
    digest = hash_key(key).hex()
    if path is None:
        lines = yaml.safe_dump(_with_key({}, purpose, digest), sort_keys=False)
        print(f"For the keys file, the hash of a key for {purpose}:\n\n{lines}", file=sys.stderr)
        return
    path = path.resolve()  # not the link to it, but what it points to, is replaced
    lock = FileLock.acquire(path.with_name(f".{path.name}.lock"))
    assert lock is not None, "acquire waits"
    try:
        document = _read(path)
        _replace(path, _write(_with_key(document, purpose, digest), path.suffix == ".json"))
    finally:
        lock.release()
    print(f"{path} has its hash for {purpose}; the key is shown only here:", file=sys.stderr)


def _read(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    return parse_document(path).model_dump(exclude_unset=True)


def _with_key(document: dict[str, Any], purpose: Purpose, digest: str) -> dict[str, Any]:
    entry = document
    if purpose.tenant is not None:
        entry = document.setdefault("tenants", {}).setdefault(purpose.tenant, {})
    if purpose.name is None:
        entry.setdefault("metrics_keys" if entry is document else "keys", []).append(digest)
        return document
    keys = entry.setdefault("admin_keys" if entry is document else "publish_keys", {})
    if purpose.name in keys:
        raise KeysFileError(f"there is a key of {purpose.name} for {purpose} already")
    keys[purpose.name] = digest
    return document


def _write(document: dict[str, Any], as_json: bool) -> str:
    if as_json:
        return json.dumps(document, indent=2) + "\n"
    return yaml.safe_dump(document, sort_keys=False)


def _replace(path: Path, text: str) -> None:
    """Replace the file in one step, with the permissions that it had."""
    mode = path.stat().st_mode & 0o777 if path.exists() else NEW_FILE_MODE
    descriptor, draft = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with open(descriptor, "w") as file:
            file.write(text)
            os.fchmod(file.fileno(), mode)
            os.fsync(file.fileno())
        os.replace(draft, path)
    except BaseException:
        os.unlink(draft)
        raise

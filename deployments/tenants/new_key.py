"""Make an API key, and put its hash into a keys file or show it for one.

The file is replaced in one step and under a lock, so a server that reads it meanwhile sees it
before or after, and of two concurrent commands none is lost. Comments in the file are lost.
"""

import json
import os
import re
import secrets
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

from adapter_store.file_lock import FileLock
from adapter_store.names import NAME_RULE
from deployments.tenants.keys_file import KEY_PREFIX, KeysFileError, hash_key, parse_document

KEY_BYTES = 32
NEW_FILE_MODE = 0o600


def make_key(tenant: str | None, path: Path | None) -> str:
    """Make a key for a tenant, or with None for /metrics. Raises KeysFileError or OSError."""
    if tenant is not None and re.fullmatch(NAME_RULE, tenant) is None:
        raise KeysFileError(f"tenant {tenant!r} does not match {NAME_RULE}")
    key = KEY_PREFIX + secrets.token_urlsafe(KEY_BYTES)
    _store(key, tenant, path)
    return key


def _store(key: str, tenant: str | None, path: Path | None) -> None:
    digest = hash_key(key).hex()
    whose = "the metrics" if tenant is None else f"tenant {tenant}"
    if path is None:
        lines = yaml.safe_dump(_with_key({}, tenant, digest), sort_keys=False)
        print(f"For the keys file, the hash of a key for {whose}:\n\n{lines}", file=sys.stderr)
        return
    path = path.resolve()  # not the link to it, but what it points to, is replaced
    lock = FileLock.acquire(path.with_name(f".{path.name}.lock"))
    assert lock is not None, "acquire waits"
    try:
        document = _read(path)
        _replace(path, _write(_with_key(document, tenant, digest), path.suffix == ".json"))
    finally:
        lock.release()
    print(f"{path} has its hash for {whose}; the key is shown only here:", file=sys.stderr)


def _read(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    return parse_document(path).model_dump(exclude_unset=True)


def _with_key(document: dict[str, Any], tenant: str | None, digest: str) -> dict[str, Any]:
    if tenant is None:
        document.setdefault("metrics_keys", []).append(digest)
    else:
        entry = document.setdefault("tenants", {}).setdefault(tenant, {})
        entry.setdefault("keys", []).append(digest)
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

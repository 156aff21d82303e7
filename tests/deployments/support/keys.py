"""Keys of two tenants and of the metrics, and a keys file with their hashes."""

import hashlib
from pathlib import Path
from typing import Any

import yaml

ACME, UMBRELLA, PROMETHEUS = "reef-" + "a" * 40, "reef-" + "u" * 40, "reef-" + "m" * 40


def digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def keys_file(folder: Path, **more: Any) -> Path:
    path = folder / "keys.yaml"
    tenants = {"acme": {"keys": [digest(ACME)]}, "umbrella": {"keys": [digest(UMBRELLA)]}}
    path.write_text(
        yaml.safe_dump({"tenants": tenants, "metrics_keys": [digest(PROMETHEUS)], **more})
    )
    return path


def bearer(key: str) -> str:
    return f"Bearer {key}"

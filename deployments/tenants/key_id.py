"""API keys: how they are drawn, hashed and named."""

import hashlib
import secrets

KEY_PREFIX = "reef-"
KEY_BYTES = 32
KEY_ID_CHARS = 12


def draw_key() -> str:
    return KEY_PREFIX + secrets.token_urlsafe(KEY_BYTES)


def hash_key(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


def key_id(digest: bytes) -> str:
    """Name a key in lists and records: neither the key nor its hash can be found from it."""
    return hashlib.sha256(b"the id of a key" + digest).hexdigest()[:KEY_ID_CHARS]

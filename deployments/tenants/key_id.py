"""Names and hashes of API keys."""

import hashlib

KEY_ID_CHARS = 12


def hash_key(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


def key_id(digest: bytes) -> str:
    """Name a key in lists and records: neither the key nor its hash can be found from it."""
    return hashlib.sha256(b"the id of a key" + digest).hexdigest()[:KEY_ID_CHARS]

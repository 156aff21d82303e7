"""PrefixMemory: which prompts a router has sent where, to find them in a replica's prefix cache.

A prompt is known by one key for each whole chunk from its beginning on: the hash of all tokens up
to there, rooted in what the engine's cache is rooted in. It says what was sent, not what a replica
still holds; the oldest are forgotten.
"""

import hashlib
from array import array
from collections.abc import Sequence

PREFIX_CHUNK = 64  # tokens
MAX_CHUNKS = 128  # of a prompt; what comes after them is not looked at
MAX_KEYS = 50_000


def prefix_keys(prompt_token_ids: Sequence[int], *root: str) -> tuple[int, ...]:
    """Return the keys of a prompt; `root` is what else must be equal: tenant, salt, adapter."""
    length = min(len(prompt_token_ids) // PREFIX_CHUNK, MAX_CHUNKS) * PREFIX_CHUNK
    if not length:
        return ()
    data = memoryview(array("I", prompt_token_ids[:length])).cast("B")
    size = len(data) // (length // PREFIX_CHUNK)
    running = hashlib.blake2b(repr(root).encode(), digest_size=8)
    keys: list[int] = []
    for start in range(0, len(data), size):
        running.update(data[start : start + size])
        keys.append(int.from_bytes(running.copy().digest(), "big"))
    return tuple(keys)


class PrefixMemory:
    """Keys and the replicas that have got them. Not thread-safe."""

    def __init__(self, max_keys: int = MAX_KEYS) -> None:
        self._max_keys = max_keys
        self._replicas: dict[int, dict[str, None]] = {}

    def sent(self, replica_id: str, keys: Sequence[int]) -> None:
        known = self._replicas
        for key in keys:
            replicas = known.pop(key, None) or {}
            replicas[replica_id] = None
            known[key] = replicas  # the latest last
        while len(known) > self._max_keys:
            del known[next(iter(known))]

    def find(self, keys: Sequence[int]) -> dict[str, int]:
        """Return how many tokens of the prompt each replica has got before, where it is any."""
        cached: dict[str, int] = {}
        for count, key in enumerate(keys, 1):
            replicas = self._replicas.get(key)
            if replicas is None:
                break
            for replica_id in replicas:
                if cached.get(replica_id, 0) == (count - 1) * PREFIX_CHUNK:
                    cached[replica_id] = count * PREFIX_CHUNK
        return cached

    def forget(self, replica_id: str) -> None:
        """Forget a replica that is gone."""
        for replicas in self._replicas.values():
            replicas.pop(replica_id, None)
        self._replicas = {key: known for key, known in self._replicas.items() if known}

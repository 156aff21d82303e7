"""AllowedSources: the prefixes of addresses that an operator lets a server fetch from."""

from collections.abc import Sequence

S3 = "s3://"


class AllowedSources:
    """Prefixes such as s3://bucket/uploads and hf://organisation. None: nothing may be fetched."""

    def __init__(self, prefixes: Sequence[str]) -> None:
        self._prefixes = tuple(prefix.rstrip("/") + "/" for prefix in prefixes)

    def __bool__(self) -> bool:
        return bool(self._prefixes)

    def has(self, url: str) -> bool:
        """Check that an address is plain, and one of the prefixes or below one."""
        scheme, _, path = url.partition("://")
        if scheme == "hf":
            path = path.partition("@")[0]  # a revision may have slashes
        is_plain = all(part not in ("", ".", "..") for part in path.split("/"))
        return is_plain and f"{scheme}://{path}/".startswith(self._prefixes)

"""What can go wrong between an adapter's name and its files. Knows no HTTP status.

Every message is one sentence that names the offending value; callers show it as it is.
"""


class AdapterStoreError(Exception):
    """The root of everything this package raises on purpose."""


class InvalidName(AdapterStoreError):
    """A tenant, adapter, alias or version is not spelled as one."""


class AdapterNotFound(AdapterStoreError):
    """No such adapter, version or alias, or it is retired."""


class AdapterInvalid(AdapterStoreError):
    """An upload is not an adapter that can be served; the reason is exact."""


class AdapterTooLarge(AdapterStoreError):
    """An adapter is larger than the whole disk cache."""


class CacheFull(AdapterStoreError):
    """Everything that could make room on disk is pinned."""


class BaseInvalid(AdapterStoreError):
    """A model folder cannot be described as a base."""


class BaseNotFound(AdapterStoreError):
    """The store does not know the base, or knows several and none was named."""


class SourceUnavailable(AdapterStoreError):
    """The object store, or an upload's origin, cannot be read or written right now."""


class ObjectNotFound(AdapterStoreError):
    """No object has this key."""


class StoreCorrupt(AdapterStoreError):
    """A stored object is not what was written."""

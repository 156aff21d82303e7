"""Define the errors that this package raises on purpose. Knows no HTTP status.

Every message is one sentence that names the offending value, so that callers can show it as it is.
"""


class AdapterStoreError(Exception):
    """The base class of all errors below."""


class InvalidName(AdapterStoreError):
    """A tenant, adapter, alias or version is not spelled as the grammar demands."""


class InvalidShares(AdapterStoreError, ValueError):
    """The versions of an alias, their weights or the bounds of a trial are not allowed."""


class AdapterNotFound(AdapterStoreError):
    """The adapter, version or alias does not exist or is retired."""


class AdapterExists(AdapterStoreError):
    """A name that should be new has a live version."""


class AdapterInvalid(AdapterStoreError):
    """An upload is not an adapter that can be served; the message gives the exact reason."""


class LimitExceeded(AdapterStoreError):
    """A tenant may not have that much; the message names the limit and the value."""


class NoRoom(LimitExceeded):
    """A tenant has as many live versions as it may."""


class AdapterTooLarge(AdapterStoreError):
    """An adapter is larger than the whole disk cache."""


class CacheFull(AdapterStoreError):
    """Nothing can be evicted to make room: all of it is pinned or being downloaded."""


class BaseInvalid(AdapterStoreError):
    """A model folder cannot be described as a base."""


class BaseNotFound(AdapterStoreError):
    """The store does not know the base, or knows several and none was named."""


class SourceUnavailable(AdapterStoreError):
    """The object store or the source of an upload cannot be read or written at the moment."""


class AccessDenied(SourceUnavailable):
    """The credentials, or the rights of this process, do not allow to write."""


class NotAStore(AdapterStoreError):
    """The root holds something else than an adapter store, or nothing."""


class ObjectNotFound(AdapterStoreError):
    """No object has this key."""


class StoreCorrupt(AdapterStoreError):
    """An object is damaged, or differs from what was written or promised."""


class ObjectChanged(StoreCorrupt):
    """An object is not, or no longer, in the state that was asked for."""


class DownloadStopped(AdapterStoreError):
    """Nobody wanted what was being downloaded any more."""


class FilesRemoved(AdapterStoreError):
    """An adapter's files were removed as garbage, so they must be uploaded again."""

"""Fetch an upload that its publisher has named by an address, within limits, in a thread."""

import logging
import time

from adapter_store.errors import (
    AdapterInvalid,
    DownloadStopped,
    ObjectNotFound,
    SourceUnavailable,
    StoreCorrupt,
)
from adapter_store.object_store import Reading
from adapter_store.sources import remote_folder
from deployments.ingress.http_errors import ApiError, invalid
from deployments.ingress.upload_folders import UploadFolder, disk_error

logger = logging.getLogger(__name__)


def fetch(
    source: str,
    endpoint_url: str | None,
    folder: UploadFolder,
    max_bytes: int,
    deadline_s: float,
) -> None:
    """Copy an adapter's files from an address, which is allowed, into a folder.

    Publishers see what is wrong with what they named, and nothing of the store or its address.
    Raises ApiError.
    """
    wanted = Reading(is_wanted=lambda: time.monotonic() < deadline_s)
    try:
        remote_folder(source, endpoint_url, max_bytes).fetch(folder.path, wanted)
    except AdapterInvalid as error:
        raise invalid(f"{error}.", "source", "adapter_invalid") from None
    except (ObjectNotFound, StoreCorrupt) as error:
        logger.warning("fetching %s: %s", source, error)
        raise ApiError(
            409, f"{source[:200]!r} changed while it was fetched.", param="source"
        ) from None
    except DownloadStopped:
        raise ApiError(504, "Fetching it took too long.", "server_error", param="source") from None
    except SourceUnavailable as error:
        logger.warning("fetching %s: %s", source, error)
        message = f"{source[:200]!r} cannot be read now."
        raise ApiError(502, message, "server_error", param="source") from None
    except OSError as error:
        raise disk_error(error) from error

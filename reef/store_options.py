"""Adds options for the place of the adapter store to a command, and opens the store."""

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec

import click

from reef.refusal import refusing

if TYPE_CHECKING:
    from adapter_store.store import AdapterStore

CACHE_BYTES = 2**30  # no adapter is downloaded: the folder holds hashes of base models
DEFAULT_CACHE = "~/.cache/reef/adapter_store"
DEFAULT_TENANT = "public"

Options = ParamSpec("Options")

tenant_option = click.option(
    "--tenant", default=DEFAULT_TENANT, show_default=True, help="Whose adapter it is."
)


def with_store(
    command: "Callable[Concatenate[AdapterStore, Options], None]",
) -> Callable[..., None]:
    """Call `command` with the opened store, and refuse with the message of a store's error."""
    return _with_store(command, read_only=False)


def with_store_to_read(
    command: "Callable[Concatenate[AdapterStore, Options], None]",
) -> Callable[..., None]:
    """Do the same for a command that only reads: the root is left as it is, store or not."""
    return _with_store(command, read_only=True)


def _with_store(
    command: "Callable[Concatenate[AdapterStore, Options], None]", read_only: bool
) -> Callable[..., None]:

    @click.option(
        "--root",
        envvar="ADAPTER_STORE_ROOT",
        show_envvar=True,
        required=True,
        help="The store: file:///path or s3://bucket/prefix.",
    )
    @click.option("--endpoint-url", help="Of an S3 server.  [default: $S3_ENDPOINT_URL]")
    @click.option(
        "--cache", default=DEFAULT_CACHE, show_default=True, help="A folder for hashes of bases."
    )
    @click.option(
        "--single-writer",
        is_flag=True,
        envvar="REEF_SINGLE_WRITER",
        help="Nobody else writes: use an S3 server that does not keep concurrent writers apart.",
    )
    @functools.wraps(command)
    def with_options(
        root: str, endpoint_url: str | None, cache: str, single_writer: bool, **options: Any
    ) -> None:
        from adapter_store.errors import AdapterStoreError
        from adapter_store.open_store import endpoint_from
        from adapter_store.store import AdapterStore

        with refusing(AdapterStoreError, OSError):  # OSError: from the folder for hashes
            folder = Path(cache).expanduser()
            endpoint = endpoint_url or endpoint_from(os.environ, root)
            store = AdapterStore(
                root,
                folder,
                CACHE_BYTES,
                endpoint_url=endpoint,
                read_only=read_only,
                single_writer=single_writer,
            )
            command(store, **options)  # type: ignore[call-arg]

    return with_options

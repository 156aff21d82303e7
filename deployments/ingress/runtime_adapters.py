"""RuntimeAdapters: publish and retire adapters for clients, from places that the operator allows.

The store's log is the truth: what one ingress replica publishes, the others serve, and of two that
publish a new name at a time one is refused. Work runs in a thread, and little of it may wait.
"""

import asyncio
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Protocol, TypeVar

from adapter_store.conversion.options import ConversionOptions
from adapter_store.errors import (
    AdapterExists,
    AdapterInvalid,
    AdapterNotFound,
    AdapterTooLarge,
    BaseNotFound,
    InvalidName,
)
from adapter_store.names import AdapterRecord, AdapterRef, check_name
from adapter_store.sources import fetch_folder
from deployments.ingress.allowed_sources import S3, AllowedSources
from deployments.ingress.http_errors import ApiError, invalid, overloaded

MAX_WAITING = 16  # requests that publish or retire, at one ingress replica
MAX_FILES = 1000  # of a folder that is looked through for links

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class LoadedBase:
    """The base that an adapter is for: its fingerprint, and its folder here if it has one."""

    fingerprint: str
    folder: Path | None = None


class AdapterWriter(Protocol):
    """The part of `adapter_store.store.AdapterStore` that is used here."""

    def publish(
        self,
        folder: str | Path,
        tenant: str,
        name: str,
        base: str | None = None,
        *,
        only_new: bool = False,
        conversion: ConversionOptions | None = None,
        by: str = "",
    ) -> AdapterRef: ...
    def retire(self, tenant: str, full_name: str, by: str = "") -> tuple[int, ...]: ...
    def refresh(self) -> None: ...
    def list_from(
        self, tenant: str, first_name: str, num_names: int
    ) -> Sequence[AdapterRecord]: ...


class RuntimeAdapters:
    """`roots` are folders and s3:// prefixes below which adapters may be loaded; none: it is off.

    Downloads from S3 lie in `scratch` while they are published, at most `max_bytes` of each. With
    `conversion`, what is no PEFT LoRA folder is made into one.
    """

    def __init__(
        self,
        store: AdapterWriter,
        roots: Sequence[str],
        scratch: Path,
        max_bytes: int,
        endpoint_url: str | None = None,
        conversion: ConversionOptions | None = None,
    ) -> None:
        self._store = store
        self.allow(roots, conversion)
        self._scratch = scratch
        self._max_bytes = max_bytes
        self._endpoint_url = endpoint_url
        self._threads = ThreadPoolExecutor(1, "runtime-adapters")
        self._num_waiting = 0

    def allow(self, roots: Sequence[str], conversion: ConversionOptions | None) -> None:
        """Change what may be loaded from now on."""
        self._conversion = conversion
        self._folders = [Path(root).resolve() for root in roots if not root.startswith(S3)]
        self._prefixes = AllowedSources([root for root in roots if root.startswith(S3)])

    @property
    def is_on(self) -> bool:
        return bool(self._folders or self._prefixes)

    async def load(
        self, tenant: str, name: str, path: str, base: LoadedBase, only_new: bool
    ) -> AdapterRef:
        """Publish what lies at the path for a base as the name's next version.

        Raises ApiError; 409 if the name is there and it should be new.
        """
        return await self._run(lambda: self._load(tenant, name, path, base, only_new))

    async def unload(self, tenant: str, name: str) -> tuple[int, ...]:
        """Retire all versions of a tenant's own adapter. Raises ApiError."""
        return await self._run(lambda: self._unload(tenant, name))

    async def names(self, tenant: str, most: int) -> Sequence[AdapterRecord]:
        """List the versions of the first names that a tenant has itself."""
        return await self._run(lambda: self._store.list_from(tenant, "", most))

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _run(self, work: Callable[[], T]) -> T:
        if self._num_waiting >= MAX_WAITING:
            raise overloaded(f"{MAX_WAITING} adapters are being loaded or unloaded already.")
        self._num_waiting += 1
        done = asyncio.get_running_loop().run_in_executor(self._threads, work)
        done.add_done_callback(self._finish)  # also for a client that has gone meanwhile
        return await asyncio.shield(done)

    def _finish(self, done: asyncio.Future[T]) -> None:
        self._num_waiting -= 1
        if not done.cancelled():
            done.exception()

    # ---- in the thread -------------------------------------------------------------------

    def _load(
        self, tenant: str, name: str, path: str, base: LoadedBase, only_new: bool
    ) -> AdapterRef:
        path = path.rstrip("/") or path
        try:
            check_name("lora_name", name)
            if only_new:
                self._store.refresh()
                if self._has(tenant, name):
                    raise AdapterExists(f"{tenant} has an adapter {name}")
            if not path.startswith(S3):
                return self._publish(self._allowed_folder(path), tenant, name, base, only_new)
            self._check_prefix(path)
            with TemporaryDirectory(dir=self._scratch, prefix=".load-") as copy:
                any_form = self._conversion is not None
                fetch_folder(path, self._endpoint_url, Path(copy), self._max_bytes, any_form)
                return self._publish(Path(copy), tenant, name, base, only_new)
        except AdapterExists:
            raise name_taken(name) from None
        except InvalidName as error:
            raise invalid(f"lora_name: {error}.", "lora_name") from None
        except (AdapterInvalid, AdapterTooLarge) as error:
            raise invalid(f"lora_path: {error}.", "lora_path") from None
        except BaseNotFound:
            raise invalid("The base is not in the store yet.", "base_model_name") from None
        except OSError as error:
            raise _wrong_path(path, f"it cannot be read: {error.strerror}") from None

    def _publish(
        self, folder: Path, tenant: str, name: str, base: LoadedBase, only_new: bool
    ) -> AdapterRef:
        conversion = self._conversion
        if conversion is not None:
            conversion = replace(conversion, base_folder=base.folder)
        return self._store.publish(
            folder,
            tenant,
            name,
            base.fingerprint,
            only_new=only_new,
            conversion=conversion,
            by=f"tenant {tenant}",
        )

    def _unload(self, tenant: str, name: str) -> tuple[int, ...]:
        try:
            check_name("lora_name", name)
            return self._store.retire(tenant, name, by=f"tenant {tenant}")
        except (InvalidName, AdapterNotFound):
            raise ApiError(
                404, f"You have no adapter of your own called {name[:200]!r}.", param="lora_name"
            ) from None

    def _has(self, tenant: str, name: str) -> bool:
        found = self._store.list_from(tenant, name, 1)
        return bool(found) and found[0].name == name

    def _allowed_folder(self, path: str) -> Path:
        """Follow all links of a path and of what lies in it. Raises ApiError if one leads out.

        What is there is not said of places that are not allowed.
        """
        given = Path(path)
        if not given.is_absolute() or "\0" in path:
            raise _wrong_path(path, "it must be an absolute path or begin with s3://")
        folder = given.resolve()
        roots = [root for root in self._folders if folder.is_relative_to(root)]
        if not roots:
            raise _wrong_path(path, "it is below none of the folders that the server allows")
        if self._conversion is not None and folder.suffix == ".gguf" and folder.is_file():
            return folder
        if not folder.is_dir():
            raise no_adapter(path)
        with os.scandir(folder) as entries:
            names = [entry.name for entry, _ in zip(entries, range(MAX_FILES + 1), strict=False)]
        if len(names) > MAX_FILES:
            raise _wrong_path(path, f"it has more than {MAX_FILES} files")
        for name in names:
            if not any((folder / name).resolve().is_relative_to(root) for root in roots):
                raise _wrong_path(path, f"its {name[:80]!r} is a link out of what is allowed")
        return folder

    def _check_prefix(self, path: str) -> None:
        if not self._prefixes.has(path):
            raise _wrong_path(path, "it is below none of the prefixes that the server allows")


def name_taken(name: str) -> ApiError:
    message = f"The adapter {name!r} exists already: load_inplace adds a version to it."
    return ApiError(409, message, param="lora_name")


def no_adapter(path: str) -> ApiError:
    return ApiError(404, f"There is no adapter at {path[:200]!r}.", param="lora_path")


def _wrong_path(path: str, reason: str) -> ApiError:
    return invalid(f"lora_path {path[:200]!r} cannot be used: {reason}.", "lora_path")

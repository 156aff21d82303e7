"""Copy the files of an adapter from a repository of Hugging Face's hub, as of one commit.

A revision may be moved, so it is looked up once, and what is fetched is of the commit that it meant
then.
"""

import hashlib
import re
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from adapter_store.errors import AdapterInvalid, DownloadStopped, SourceUnavailable, StoreCorrupt
from adapter_store.object_store import JUST_READ, Reading

LOOK_S = 20.0  # for the list of files, and for each wait for bytes
MAX_ATTEMPTS = 3  # that bring nothing, in a row
_URL = re.compile(r"hf://([\w.-]+/[\w.-]+)(?:@([\w./-]+))?", re.ASCII)
_NEEDS = (
    "source {}: hf:// needs the package huggingface-hub; install it with pip install 'reef[hub]'"
)


@dataclass(frozen=True, slots=True)
class HubFolder:
    """Files of one commit. What is in folders of the repository is left out."""

    url: str
    endpoint: str | None
    repository: str
    commit: str
    sizes: Mapping[str, int]
    sha256: Mapping[str, str]  # of the large ones

    @classmethod
    def find(cls, url: str, endpoint: str | None) -> "HubFolder":
        """Look up hf://org/name@revision, without a revision its main branch.

        `endpoint` is a hub's address; None: what the package takes. Raises AdapterInvalid if there
        is no such repository or revision for these credentials, SourceUnavailable.
        """
        match = _URL.fullmatch(url)
        if match is None:
            raise AdapterInvalid(f"source {url[:200]} must be hf://organisation/name@revision")
        repository, revision = match.groups()
        hub = _hub(url)
        with _errors(url, hub):
            info = _look(hub.HfApi(endpoint=endpoint), repository, revision)
        files = {each.rfilename: each for each in info.siblings or () if "/" not in each.rfilename}
        if info.sha is None or any(each.size is None for each in files.values()):
            raise SourceUnavailable(f"{url}: the hub does not tell the commit or the files' sizes")
        sizes = {name: int(each.size) for name, each in files.items()}
        sha256 = {name: each.lfs.sha256 for name, each in files.items() if each.lfs is not None}
        return cls(url, endpoint, repository, info.sha, sizes, sha256)

    def of(self, names: Sequence[str]) -> "HubFolder":
        """Leave out all other files."""
        return replace(self, sizes={name: self.sizes[name] for name in names})

    @property
    def nbytes(self) -> int:
        return sum(self.sizes.values())

    def fetch(self, folder: Path, how: Reading = JUST_READ) -> None:
        for name in self.sizes:
            with (folder / name).open("wb") as file:
                digest, num_failures = hashlib.sha256(), 0
                while file.tell() < self.sizes[name] and num_failures < MAX_ATTEMPTS:
                    begun = file.tell()
                    for piece in self._pieces(name, begun):
                        if not how.is_wanted():
                            raise DownloadStopped(f"{self.url} is not wanted any more")
                        if file.tell() + len(piece) > self.sizes[name]:
                            raise StoreCorrupt(f"{self.url}: {name} is longer than the hub says")
                        file.write(piece)
                        digest.update(piece)
                        how.on_bytes(len(piece))
                    num_failures = 0 if file.tell() > begun else num_failures + 1
                if file.tell() < self.sizes[name]:
                    raise SourceUnavailable(f"{self.url}: {name} is cut again and again")
            if self.sha256.get(name, digest.hexdigest()) != digest.hexdigest():
                raise StoreCorrupt(f"{self.url}: {name} does not have the sha256 of the hub")

    def _pieces(self, name: str, start: int) -> Generator[bytes, None, None]:
        """Read a file from a byte on, until the answer ends or is cut."""
        hub = _hub(self.url)
        where = hub.hf_hub_url(self.repository, name, revision=self.commit, endpoint=self.endpoint)
        headers = {**hub.utils.build_hf_headers(), "Accept-Encoding": "identity"}
        if start:
            headers["Range"] = f"bytes={start}-"
        with (
            _errors(self.url, hub),
            suppress(_cut()),  # what has come is kept; the rest is asked for again
            hub.get_session().stream(
                "GET", where, headers=headers, follow_redirects=True, timeout=LOOK_S
            ) as response,
        ):
            hub.hf_raise_for_status(response)
            if start and response.status_code != 206:
                raise SourceUnavailable(f"{self.url}: {name} cannot be read from its middle on")
            yield from response.iter_raw()


def _look(api: Any, repository: str, revision: str | None) -> Any:
    """Ask for a repository's files, again where a connection breaks."""
    for attempt in range(1, MAX_ATTEMPTS + 1):
        try:
            return api.model_info(
                repository, revision=revision, files_metadata=True, timeout=LOOK_S
            )
        except _cut():
            if attempt == MAX_ATTEMPTS:
                raise
    raise AssertionError("the last attempt returns or raises")


def _cut() -> type[Exception]:
    """Return the class of errors of a connection."""
    import httpx2  # comes with the hub's package

    return httpx2.TransportError


def _hub(url: str) -> Any:
    try:
        import huggingface_hub
    except ImportError as error:
        raise SourceUnavailable(_NEEDS.format(url)) from error
    return huggingface_hub


@contextmanager
def _errors(url: str, hub: Any) -> Generator[None, None, None]:
    """Raise errors of this package for those of the hub's."""
    errors = hub.errors
    absent = (errors.RepositoryNotFoundError, errors.RevisionNotFoundError)
    try:
        yield
    except (AdapterInvalid, DownloadStopped, SourceUnavailable, StoreCorrupt, GeneratorExit):
        raise
    except (*absent, errors.HFValidationError) as error:
        raise AdapterInvalid(
            f"{url}: there is no such repository or revision, or it takes a token (HF_TOKEN)"
        ) from error
    except Exception as error:
        raise SourceUnavailable(f"{url} cannot be read: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__

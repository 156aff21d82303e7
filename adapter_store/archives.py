"""Take the files of an adapter out of a tar archive, and nothing else.

An archive may name any path, link to others, hold devices and headers of any size. Here a member
must be a file with one of the names that an upload may have; Python's tarfile reads the headers.
"""

import io
import tarfile
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import BinaryIO

from adapter_store.errors import AdapterInvalid
from adapter_store.layout import WEIGHTS_NAME
from adapter_store.own_files import UPLOADED_FILES
from adapter_store.peft_config import CONFIG_NAME

FILE_NAMES = tuple(dict.fromkeys((CONFIG_NAME, WEIGHTS_NAME, *UPLOADED_FILES)))
MAX_MEMBERS = 64
PIECE_BYTES = 2**20
_SHOWN = 100  # characters of a name that an error repeats
_WRONG = (tarfile.TarError, ValueError, OverflowError, EOFError, RecursionError)


def check_file_name(name: str) -> str:
    """Return the name; AdapterInvalid unless an upload may have a file of it."""
    if name not in FILE_NAMES:
        raise AdapterInvalid(
            f"{name[:_SHOWN]!r} is not one of the files that are used, so leave it out: "
            f"{', '.join(FILE_NAMES)}"
        )
    return name


def unpack(archive: Path, folder: Path, max_bytes: int) -> None:
    """Write the members of a tar archive, of at most `max_bytes` together, into a folder.

    Raises AdapterInvalid for what is no plain tar archive, and for any other member than a file of
    FILE_NAMES, once, perhaps behind `./`; OSError if a file cannot be written.
    """
    num_bytes = 0
    seen: set[str] = set()
    if archive.stat().st_size < tarfile.BLOCKSIZE:
        raise AdapterInvalid("this is not a whole tar archive: it has not even one block")
    with archive.open("rb") as file, _opened(file) as tar:
        for member in _members(tar):
            name = _name_of(member)
            if name in seen:
                raise AdapterInvalid(f"the archive has {name} twice")
            seen.add(name)
            num_bytes += member.size
            if num_bytes > max_bytes:
                raise AdapterInvalid(
                    f"the files of the archive have {num_bytes} bytes or more, above the limit of "
                    f"{max_bytes}"
                )
            _copy(tar, member, folder / name)
        _check_end(file, tar)


def _check_end(file: BinaryIO, tar: tarfile.TarFile) -> None:
    """Refuse an archive that was cut behind a file, which tarfile takes for its end."""
    last = max(tar.getmembers(), key=lambda member: member.offset_data)
    file.seek(last.offset_data + -(-last.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE)
    if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise AdapterInvalid(f"the archive has no end behind {last.name[:_SHOWN]!r}: it was cut")


def _members(tar: tarfile.TarFile) -> Generator[tarfile.TarInfo, None, None]:
    for number in range(MAX_MEMBERS + 1):
        with _named():
            member = tar.next()
        if member is None:
            return
        if number == MAX_MEMBERS:
            raise AdapterInvalid(f"the archive has more than {MAX_MEMBERS} members")
        if not (member.isdir() and member.name in ("", ".", "./")):  # of `tar -C folder -c .`
            yield member


def _name_of(member: tarfile.TarInfo) -> str:
    shown = repr(member.name[:_SHOWN])
    if member.issym() or member.islnk():
        raise AdapterInvalid(f"the archive has a link, {shown}: only files are taken")
    if member.isdir():
        raise AdapterInvalid(f"the archive has a folder, {shown}: only files are taken")
    if not member.isreg() or member.issparse():
        raise AdapterInvalid(f"the archive has {shown}, which is no plain file")
    return check_file_name(member.name.removeprefix("./"))


def _copy(tar: tarfile.TarFile, member: tarfile.TarInfo, path: Path) -> None:
    with _named():
        source = tar.extractfile(member)
    assert source is not None, "it is a file"
    left = member.size
    with path.open("xb") as target:
        while left:
            with _named():
                piece = source.read(min(left, PIECE_BYTES))
            if not piece:
                raise AdapterInvalid(f"the archive ends within {path.name}")
            target.write(piece)
            left -= len(piece)


@contextmanager
def _opened(file: BinaryIO) -> Generator[tarfile.TarFile, None, None]:
    with ExitStack() as stack:
        with _named():
            tar = stack.enter_context(tarfile.open(fileobj=_BoundedReads(file), mode="r:"))
        yield tar


@contextmanager
def _named() -> Generator[None, None, None]:
    try:
        yield
    except _WRONG as error:
        raise AdapterInvalid(
            f"this is not a whole tar archive, not compressed: {str(error)[:200]}"
        ) from error


class _BoundedReads(io.RawIOBase):
    """A file of which a header cannot have more read into memory than PIECE_BYTES at a time."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def read(self, size: int = -1) -> bytes:
        if size > PIECE_BYTES:
            raise ValueError(f"a header of {size} bytes is above the limit of {PIECE_BYTES}")
        return self._file.read(size)

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

"""A tar archive gives the files of an adapter, or is refused; nothing is written elsewhere."""

import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from adapter_store import archives
from adapter_store.archives import FILE_NAMES, unpack
from adapter_store.errors import AdapterInvalid
from adapter_store.layout import WEIGHTS_NAME
from adapter_store.peft_config import CONFIG_NAME

Add = Callable[[tarfile.TarFile], object]


def member(name: str, content: bytes = b"{}", **fields: object) -> Add:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for field, value in fields.items():
        setattr(info, field, value)
    return lambda tar: tar.addfile(info, io.BytesIO(content))


def special(name: str, kind: bytes, target: str = "") -> Add:
    return member(name, b"", type=kind, linkname=target)


@pytest.fixture
def taken(tmp_path: Path) -> Callable[[bytes], dict[str, bytes]]:
    """Unpack into a folder of its own; what lies beside that must stay as it is."""

    def take(raw: bytes, max_bytes: int = 2**20) -> dict[str, bytes]:
        archive, folder = tmp_path / "archive.tar", tmp_path / "inside" / "folder"
        archive.write_bytes(raw)
        folder.mkdir(parents=True)
        try:
            unpack(archive, folder, max_bytes)
            return {path.name: path.read_bytes() for path in folder.iterdir()}
        finally:
            others = {p for p in tmp_path.rglob("*") if not p.is_relative_to(folder)}
            assert others == {archive, folder.parent}

    return take


def tar_of(*adds: Add, mode: str = "w", **options: object) -> bytes:
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode=mode, **options) as tar:  # type: ignore[call-overload]
        for add in adds:
            add(tar)
    return raw.getvalue()


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_files_come_out_as_they_went_in(
    form: int, taken: Callable[[bytes], dict[str, bytes]]
) -> None:
    weights = bytes(range(256)) * 5000  # more than is copied at a time
    raw = tar_of(
        special("./", tarfile.DIRTYPE),
        member(f"./{CONFIG_NAME}", b'{"r": 1}', uname="somebody", mtime=1.5),
        member(WEIGHTS_NAME, weights),
        format=form,
    )
    assert taken(raw, 2**22) == {CONFIG_NAME: b'{"r": 1}', WEIGHTS_NAME: weights}  # type: ignore[call-arg]


GOOD = member(CONFIG_NAME)
WRONG: dict[str, tuple[tuple[Add, ...], str]] = {
    "a name above the folder": (
        (member(f"../{CONFIG_NAME}"),),
        r"'\.\./adapter_config\.json' is not",
    ),
    "a path": ((member(f"x/{CONFIG_NAME}"),), "'x/adapter_config.json' is not one of the files"),
    "an absolute path": ((member(f"/srv/{CONFIG_NAME}"),), "'/srv/adapter_config.json' is not one"),
    "twice a dot": ((member(f"././{CONFIG_NAME}"),), "is not one of the files"),
    "a backslash": ((member(f"..\\{CONFIG_NAME}"),), "is not one of the files"),
    "a file that is not used": ((GOOD, member("README.md")), "'README.md' is not one of the files"),
    "a long name": ((member("n" * 300),), "is not one of the files"),
    "a symbolic link": ((special(CONFIG_NAME, tarfile.SYMTYPE, "elsewhere"),), "has a link"),
    "a hard link": ((GOOD, special(WEIGHTS_NAME, tarfile.LNKTYPE, CONFIG_NAME)), "has a link"),
    "a folder": ((special("x", tarfile.DIRTYPE),), "has a folder, 'x'"),
    "a folder of a file's name": ((special(CONFIG_NAME, tarfile.DIRTYPE),), "has a folder"),
    "a pipe": ((special(CONFIG_NAME, tarfile.FIFOTYPE),), "is no plain file"),
    "a device": ((special(CONFIG_NAME, tarfile.CHRTYPE),), "is no plain file"),
    "a block device": ((special(CONFIG_NAME, tarfile.BLKTYPE),), "is no plain file"),
    "a file twice": ((GOOD, GOOD), "has adapter_config.json twice"),
    "too many bytes": ((member(WEIGHTS_NAME, b"x" * 3000),), "3000 bytes or more, above the limit"),
    "too many members": ((special(".", tarfile.DIRTYPE),) * 80, "more than 64 members"),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_is_no_file_of_an_adapter_is_refused_by_name(
    what: str, taken: Callable[..., dict[str, bytes]]
) -> None:
    adds, words = WRONG[what]
    with pytest.raises(AdapterInvalid, match=words):
        taken(tar_of(*adds), 2000)


def test_an_archive_that_is_none_or_is_cut_is_refused(
    taken: Callable[..., dict[str, bytes]], tmp_path: Path
) -> None:
    whole = tar_of(GOOD, member(WEIGHTS_NAME, b"w" * 2000))
    packed = tar_of(GOOD, mode="w:gz")
    for cut in (0, 300, 1024, 1100, 2000, 3500, 512 * 7, 512 * 7 + 300):
        with pytest.raises(AdapterInvalid, match=r"not a whole tar archive|ends within|no end"):
            unpack_alone(tmp_path, whole[:cut])
    for raw in (b"no archive" * 100, packed + bytes(1024), whole[:1024] + b"x" * 2048):
        with pytest.raises(AdapterInvalid, match=r"not a whole tar archive|no end"):
            unpack_alone(tmp_path, raw)
    assert len(taken(whole)) == 2


def unpack_alone(folder: Path, raw: bytes) -> None:
    (folder / "one.tar").write_bytes(raw)
    (folder / "out").mkdir()
    try:
        unpack(folder / "one.tar", folder / "out", 2**20)
    finally:
        for path in (folder / "out").iterdir():
            path.unlink()
        (folder / "out").rmdir()
        (folder / "one.tar").unlink()


def test_a_header_of_any_size_takes_no_memory(
    taken: Callable[..., dict[str, bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(archives, "PIECE_BYTES", 2**16)
    huge = member(CONFIG_NAME, pax_headers={"comment": "x" * 2**17})
    with pytest.raises(AdapterInvalid, match=r"a header of .* bytes is above the limit of 65536"):
        taken(tar_of(huge, format=tarfile.PAX_FORMAT))


def test_a_chain_of_headers_ends_as_an_error(taken: Callable[..., dict[str, bytes]]) -> None:
    """Each header is followed by another one: tarfile reads them by calling itself."""
    info = tarfile.TarInfo("././@PaxHeader")
    info.type, info.size = tarfile.XHDTYPE, 0
    with pytest.raises(AdapterInvalid, match="not a whole tar archive"):
        taken(info.tobuf(tarfile.USTAR_FORMAT) * 5000)


def test_the_names_are_those_of_uploads() -> None:
    assert FILE_NAMES[:2] == (CONFIG_NAME, WEIGHTS_NAME) and len(set(FILE_NAMES)) == len(FILE_NAMES)
    assert not any("/" in name for name in FILE_NAMES)

"""Tests how the native library is compiled, found again, and replaced if missing."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from engine.backends.native import build
from engine.backends.native.build import BuildError, compile_library, ensure_library, library_name

ROOT = Path(__file__).parents[3]


def test_the_name_changes_with_the_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = library_name()
    sources = shutil.copytree(build.SOURCES, tmp_path / "src")
    monkeypatch.setattr(build, "SOURCES", sources)
    assert library_name() == before
    (sources / "pool.h").write_text((sources / "pool.h").read_text() + "\n")
    assert library_name() != before


def test_without_a_compiler_the_reason_is_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(BuildError, match=r"no C\+\+ compiler found \(looked for g\+\+"):
        compile_library(tmp_path / "lib")


def test_an_error_of_the_compiler_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sources = tmp_path / "src"
    sources.mkdir()
    (sources / "broken.cpp").write_text("int broken( {")
    monkeypatch.setattr(build, "SOURCES", sources)
    _need_a_compiler()
    with pytest.raises(BuildError, match=r"broken\.cpp"):
        compile_library(tmp_path / "lib")


def test_a_read_only_folder_falls_back_to_the_users_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _need_a_compiler()
    sources = tmp_path / "src"
    sources.mkdir()
    (sources / "pool.cpp").write_text('extern "C" int answer() { return 42; }')
    (tmp_path / "a file").write_text("in the way of a folder")
    monkeypatch.setattr(build, "SOURCES", sources)
    monkeypatch.setattr(build, "LIBRARY_FOLDER", tmp_path / "a file" / "lib")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = ensure_library()
    assert path.parent == tmp_path / "cache" / "reef"
    made = path.stat().st_mtime_ns
    assert ensure_library() == path and path.stat().st_mtime_ns == made, "compiled once"


@pytest.mark.slow  # it compiles everything
def test_a_wheel_brings_the_library_and_its_sources(tmp_path: Path) -> None:
    _need_a_compiler()
    shutil.copytree(
        ROOT,
        tmp_path / "tree",
        ignore=shutil.ignore_patterns(".*", "lib", "build", "*.egg-info", "tests"),
    )
    code = (
        "import sys; from setuptools import build_meta; print(build_meta.build_wheel(sys.argv[1]))"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, str(tmp_path / "dist")],
        cwd=tmp_path / "tree",
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (wheel,) = (tmp_path / "dist").iterdir()
    assert "-py3-none-linux_x86_64" in wheel.name
    shutil.unpack_archive(wheel, tmp_path / "unpacked", "zip")
    package = tmp_path / "unpacked" / "engine" / "backends" / "native"
    assert (package / "lib" / library_name()).exists()
    assert (package / "src" / "pool.cpp").exists()


def _need_a_compiler() -> None:
    if not any(map(shutil.which, build.COMPILERS)):
        pytest.skip("no C++ compiler here")

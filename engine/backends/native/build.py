"""Compiles the native library: once per version of its sources, with the machine's compiler.

The library's name carries a digest of its sources, so a stale one is never loaded. A wheel
contains it; a checkout compiles it at first use, into the folder of the sources or, if that cannot
be written, into the user's cache.
"""

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SOURCES = Path(__file__).parent / "src"
LIBRARY_FOLDER = Path(__file__).parent / "lib"
COMPILERS = ("g++", "clang++", "c++")
FLAGS = ("-std=c++17", "-O3", "-fPIC", "-fvisibility=default", "-Wall", "-Wextra", "-Werror")
AVX512 = (
    *("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512bf16"),
    *("-mavx512vnni", "-mavx512vbmi", "-mavx2", "-mfma", "-mprefer-vector-width=512"),
)
ISAS = {
    "avx2": ("-mavx2", "-mfma"),
    "avx512": AVX512,
}
AMX = (*AVX512, "-mamx-tile", "-mamx-int8", "-mamx-bf16")  # for avx512's amx*.cpp
# compiled once; every other source is compiled once per instruction set
PLAIN = ("layout.cpp", "pack.cpp", "pack4.cpp", "pool.cpp", "program.cpp", "reef.cpp")


class BuildError(RuntimeError):
    """The native library cannot be built or loaded here; the message says why."""


def ensure_library() -> Path:
    """Return the library's path, compiling it if needed. Raises BuildError."""
    _check_platform()
    for folder in _folders():
        if (folder / library_name()).exists():
            return folder / library_name()
    for folder in _folders():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            writable = os.access(folder, os.W_OK)
        except OSError:
            writable = False
        if writable:
            return compile_library(folder)
    raise BuildError(f"none of {', '.join(map(str, _folders()))} can be written")


def library_name() -> str:
    digest = hashlib.sha256()
    for path in sorted(SOURCES.iterdir()):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    digest.update(repr((FLAGS, ISAS, AMX)).encode())
    return f"libreef-{digest.hexdigest()[:16]}.so"


def compile_library(folder: Path, extra_flags: tuple[str, ...] = ()) -> Path:
    """Compile every source for every instruction set and link them into `folder`."""
    _check_platform()
    compiler = next(filter(None, map(shutil.which, COMPILERS)), None)
    if compiler is None:
        raise BuildError(f"no C++ compiler found (looked for {', '.join(COMPILERS)})")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch, ThreadPoolExecutor() as pool:
        jobs = list(_compilations(compiler, Path(scratch), extra_flags))
        list(pool.map(lambda job: _run(job[1]), jobs))
        linked = Path(scratch) / "linked.so"
        objects = [str(obj) for obj, _ in jobs]
        _run([compiler, "-shared", "-pthread", *extra_flags, *objects, "-o", str(linked)])
        target = folder / library_name()
        os.replace(linked, target)  # atomic: another process may compile it at the same time
    return target


def _check_platform() -> None:
    if sys.platform != "linux" or platform.machine() != "x86_64":
        raise BuildError(f"the native kernels are for Linux on x86-64, not {platform.platform()}")


def _folders() -> tuple[Path, Path]:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return LIBRARY_FOLDER, cache / "reef"


def _compilations(compiler: str, scratch: Path, extra_flags: tuple[str, ...]):
    for source in sorted(SOURCES.glob("*.cpp")):
        for isa, flags in _isas(source).items():
            target = scratch / f"{source.stem}-{isa}.o"
            define = [f"-DREEF_ISA={isa}"] if flags else []
            command = [compiler, *FLAGS, *flags, *define, *extra_flags]
            yield target, [*command, "-c", str(source), "-o", str(target)]


def _isas(source: Path) -> dict[str, tuple[str, ...]]:
    if source.name in PLAIN:
        return {"plain": ()}
    return {"avx512": AMX} if source.name.startswith("amx") else ISAS


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise BuildError(f"{' '.join(command)} failed:\n{done.stderr[-4000:]}")

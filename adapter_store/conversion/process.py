"""Convert an upload in a process of its own, which prints lines of JSON.

Its matrix products run on one thread each, as several modules are in work at a time: two pools of
threads would wait for each other. It gives way to whoever serves on the same machine, and its
memory is bounded.

    python -m adapter_store.conversion.process < job.json
"""

import json
import os
import resource
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from adapter_store.conversion.convert import convert, copy_own_files, open_upload
from adapter_store.conversion.options import ConversionOptions
from adapter_store.errors import AdapterInvalid

MAX_THREADS = 4
NICENESS = 10
_LIBRARIES_BYTES = 4 * 2**30  # address space of the program itself and of its small tensors
_COPIES = 12  # of the largest module, in float32, that a thread may have at a time


def main() -> None:
    """Read the job, do it, and print its progress and its end."""
    job: dict[str, Any] = json.load(sys.stdin)
    modules, vocabulary = _shapes(job["modules"]), _shapes(job["vocabulary"])
    num_threads = min(MAX_THREADS, len(os.sched_getaffinity(0)))
    largest = max(4 * out * in_ for out, in_ in modules.values())
    num_bytes = _LIBRARIES_BYTES + num_threads * _COPIES * largest
    resource.setrlimit(resource.RLIMIT_AS, (num_bytes, num_bytes))
    os.nice(NICENESS)
    try:
        _say(_convert(job, modules | vocabulary, num_threads))
    except AdapterInvalid as error:
        _say({"refused": str(error)})
    except MemoryError:
        _say({"refused": f"its conversion needs more memory than {num_bytes / 2**30:.1f} GiB"})


def _convert(
    job: Mapping[str, Any], modules: Mapping[str, tuple[int, int]], num_threads: int
) -> dict[str, Any]:
    upload, folder = Path(job["upload"]), Path(job["folder"])
    options = ConversionOptions(
        lora_rank=job["lora_rank"],
        max_residual=job["max_residual"],
        base_folder=_path(job["base_folder"]),
        initial_folder=_path(job["initial_folder"]),
    )
    source = open_upload(upload, options)
    if source is None:
        return {"record": None}
    record = convert(
        source, modules, options, folder, lambda count: _say({"bytes": count}), num_threads
    )
    copy_own_files(upload, folder)
    return {"record": {"source": record.source, "residuals": dict(record.residuals)}}


def _shapes(listed: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    return {name: (out, in_) for name, (out, in_) in listed.items()}


def _path(name: str | None) -> Path | None:
    return None if name is None else Path(name)


def _say(line: Mapping[str, Any]) -> None:
    print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()

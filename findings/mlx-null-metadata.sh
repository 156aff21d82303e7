#!/usr/bin/env bash
# MLX writes `"__metadata__":null` into the header of every safetensors file without metadata.
#
# Versions:  mlx 0.32.4 (mlx-cpu), safetensors 0.8.0, numpy 2.4.0
# Expected:  no key __metadata__, as the safetensors library writes it. The format says of the key
#            that it holds a map from strings to strings.
# Seen:      the key is there and is null; with metadata it is a map. The safetensors library reads
#            null as no metadata, and so writes another header for the same tensors. (2026-11-30)
# Matters:   a reader that follows the format's words refuses, or fails on, every adapter that
#            mlx-lm saves. Files that are equal for the library have different hashes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
install() { "$folder/venv/bin/pip" install --quiet --disable-pip-version-check "$@"; }
install mlx==0.32.4 mlx-cpu==0.32.4 safetensors==0.8.0 numpy==2.4.0
install --force-reinstall --no-deps mlx==0.32.4 # mlx-cpu's files must not be the last ones
"$folder/venv/bin/python" - "$folder" <<'PYTHON'
import json
import sys
from pathlib import Path

import mlx.core as mx
from safetensors import safe_open
from safetensors.numpy import load_file, save

MISSING = "no such key"


def metadata_of(data: bytes) -> object:
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return header.get("__metadata__", MISSING)


path = Path(sys.argv[1]) / "x.safetensors"
seen = []
for metadata in ({}, {"a": "b"}):
    mx.save_safetensors(str(path), {"x": mx.zeros(2)}, metadata)
    seen.append(metadata_of(path.read_bytes()))
    with safe_open(path, "np") as file:
        read = file.metadata()
    print(f"mlx, metadata {metadata}: {seen[-1]!r}, read by safetensors as {read!r}")
mx.save_safetensors(str(path), {"x": mx.zeros(2)})
seen.append(metadata_of(path.read_bytes()))
seen.append(metadata_of(save(load_file(path))))
print(f"mlx, none given: {seen[2]!r}; the same tensors saved by safetensors: {seen[3]!r}")
if seen != [None, {"a": "b"}, None, MISSING]:
    sys.exit("changed: this finding no longer holds")
PYTHON

#!/usr/bin/env bash
# Processes forked after `import ray.serve` all draw the same ids; after `import ray` they do not.
#
# Versions:  ray 2.60.0 (extra: serve), Python 3.11
# Expected:  an import draws no ids; forks draw different ones either way, as `uuid` does.
# Seen:      importing ray.serve draws an id for each class it decorates, which seeds the library's
#            generator; three forks then draw one and the same ObjectRef. (2026-11-30)
# Matters:   servers that import first and fork then (pre-fork web servers, worker pools) get
#            drivers and workers with equal ids. Workers that start at once store their first
#            object under one id, one ends with "likely discovered a bug in Ray", and `ray.init`
#            waits for it without end.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check 'ray[serve]==2.60.0'
cat >"$folder/forks.py" <<'PYTHON'
import importlib
import os
import sys

importlib.import_module(sys.argv[1])
import ray

for _ in range(3):
    if os.fork() == 0:
        print(ray.ObjectRef.from_random().hex(), flush=True)
        os._exit(0)
    os.wait()
PYTHON
different() { "$folder/venv/bin/python" "$folder/forks.py" "$1" | sort -u | wc -l; }
after_ray=$(different ray)
after_serve=$(different ray.serve)
echo "different ids of three forks: $after_ray after import ray, $after_serve after import ray.serve"
if [ "$after_ray $after_serve" != "3 1" ]; then
    echo "changed: this finding no longer holds" >&2
    exit 1
fi

#!/usr/bin/env bash
# safetensors writes a file that it cannot read: no tensors, and metadata that is an empty dict.
#
# Versions:  safetensors 0.8.0, numpy 2.4.0
# Expected:  an empty dict of metadata is like none: `{}` or `{"__metadata__":{}}` in the header,
#            and a file that loads. With one tensor it is so.
# Seen:      the header is `{},"__metadata__":{}}`, which is not JSON. `save_file` and `save` say
#            nothing; `load_file` and `load` raise SafetensorError. (2026-11-30)
# Matters:   a script that saves a filtered state dict with `metadata={}` finds out when it is loaded.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check safetensors==0.8.0 numpy==2.4.0
"$folder/venv/bin/python" - <<'PYTHON'
import sys

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

CASES = {
    "no tensors, no metadata": ({}, None),
    "no tensors, metadata {'a': 'b'}": ({}, {"a": "b"}),
    "one tensor, metadata {}": ({"x": np.zeros(2)}, {}),
    "no tensors, metadata {}": ({}, {}),
}
seen = []
for name, (tensors, metadata) in CASES.items():
    data = save(tensors, metadata=metadata)
    header = data[8 : 8 + int.from_bytes(data[:8], "little")].rstrip()
    try:
        outcome = f"loads {sorted(load(data))}"
    except SafetensorError as error:
        outcome = f"SafetensorError: {error}"
    seen.append(outcome.startswith("loads"))
    print(f"{name}: {header!r} {outcome}")
if seen != [True, True, True, False]:
    sys.exit("changed: this finding no longer holds")
PYTHON

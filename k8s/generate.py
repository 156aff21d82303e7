"""Copies configs/gpu-cluster.yaml into the serveConfigV2 block of k8s/rayservice.yaml.

    python k8s/generate.py            rewrite the block in place
    python k8s/generate.py --check    change nothing; show the difference and fail if there is one

Works on text alone and does not interpret the configuration.
"""

import argparse
import difflib
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / "configs" / "gpu-cluster.yaml"
MANIFEST = ROOT / "k8s" / "rayservice.yaml"
MARKER = "  serveConfigV2: |"
INDENT = " " * 4


def main() -> int:
    parser = argparse.ArgumentParser(description="Write the Serve config into the RayService.")
    parser.add_argument("--check", action="store_true", help="change nothing, only compare")
    options = parser.parse_args()
    manifest = MANIFEST.read_text()
    wanted = embed(manifest, CONFIG.read_text())
    if not options.check:
        MANIFEST.write_text(wanted)
        return 0
    before, after = manifest.splitlines(True), wanted.splitlines(True)
    sys.stdout.writelines(difflib.unified_diff(before, after, str(MANIFEST), "generated"))
    return int(manifest != wanted)


def embed(manifest: str, config: str) -> str:
    """Return `manifest` with the lines of its serveConfigV2 block replaced by `config`."""
    lines = manifest.splitlines()
    if lines.count(MARKER) != 1:
        count = lines.count(MARKER)
        raise ValueError(f"the manifest has {count} lines {MARKER!r}, wanted exactly one")
    start = lines.index(MARKER) + 1
    end = start
    while end < len(lines) and (not lines[end] or lines[end].startswith(INDENT)):
        end += 1
    block = [INDENT + line if line else "" for line in config.rstrip("\n").splitlines()]
    return "\n".join([*lines[:start], *block, *lines[end:]]) + "\n"


if __name__ == "__main__":
    sys.exit(main())

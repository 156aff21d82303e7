"""Compares the resident memory of a server's processes at two moments."""

from collections.abc import Mapping

OURS = ("engine", "replica", "ingress")
GROWTH = 1.10
MARGIN_MIB = 16.0  # what allocators and caches move anyway


def growth(before: Mapping[str, float], after: Mapping[str, float]) -> list[str]:
    """Name the groups of processes whose largest one has grown by more than a tenth."""
    return [
        f"{group} grew from {before[group]:.0f} to {after[group]:.0f} MiB"
        for group in OURS
        if after.get(group, 0.0) > before[group] * GROWTH + MARGIN_MIB
    ]


def as_text(rss_mib: Mapping[str, float]) -> str:
    return ", ".join(f"{group} {rss_mib.get(group, 0.0):.0f}" for group in OURS) + " MiB"

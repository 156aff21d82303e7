"""Tests sizes in bytes, as written in configs, on the command line and in reports."""

import pytest

from engine.byte_size import format_byte_size, parse_byte_size


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("2GiB", 2 << 30),
        ("1.5 KB", 1500),
        ("7", 7),
        ("64MiB", 64 << 20),
        ("3B", 3),
        ("24GB", 24 * 10**9),
        ("1TB", 10**12),
        (" 2TiB ", 2 << 40),
        ("0", 0),
        ("0.5KiB", 512),
    ],
)
def test_a_size_is_a_number_and_a_unit(text: str, wanted: int) -> None:
    assert parse_byte_size(text) == wanted


@pytest.mark.parametrize("text", ["", "GiB", "-1", "1e3", "2 gib", "2G", "1.GiB", "3 MiB x"])
def test_anything_else_is_refused_with_the_units(text: str) -> None:
    with pytest.raises(ValueError, match=r"is not a size in bytes: .* B, KB, MB, GB, TB, KiB"):
        parse_byte_size(text)


@pytest.mark.parametrize(
    ("num_bytes", "wanted"),
    [
        (512, "0.50 KiB"),
        (3 << 20, "3.00 MiB"),
        (3 << 29, "1.50 GiB"),
        (5000 << 30, "5,000.00 GiB"),
    ],
)
def test_a_size_is_written_in_a_binary_unit(num_bytes: int, wanted: str) -> None:
    assert format_byte_size(num_bytes) == wanted

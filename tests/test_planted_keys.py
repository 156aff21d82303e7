"""The search for keys in logs finds them."""

from pathlib import Path

import pytest

from tests.deployments.support.admin import ADMIN, PUBLISH
from tests.deployments.support.keys import ACME, PROMETHEUS, UMBRELLA, digest
from tests.planted_keys import holds_key, logs_with_keys

KEYS = [ACME, UMBRELLA, PROMETHEUS, PUBLISH, ADMIN]


def test_the_tests_keys_are_told_by_their_form() -> None:
    assert all(holds_key(f"asked with Bearer {key}!") for key in KEYS)
    assert not holds_key(f"reef-usage {digest(ACME)}") and not holds_key("reef-" + "ab" * 20)


@pytest.mark.parametrize("name", ["a.log", "inner/b.err"])
def test_a_log_with_a_key_is_found(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"\xff\n" + f"x {PUBLISH[:-1]}".encode())
    assert logs_with_keys(tmp_path) == []
    path.write_bytes(b"\xff\n" + f"x {PUBLISH} y".encode())
    try:
        assert logs_with_keys(tmp_path) == [str(path)]
    finally:
        path.unlink()

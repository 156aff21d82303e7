"""YAML as we read it: one document, and no key twice."""

from pathlib import Path

import pytest

from deployments.strict_yaml import YamlMistake, read_yaml

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("a: 1\nb: [{a: 2}, {a: 3}]", {"a": 1, "b": [{"a": 2}, {"a": 3}]}),
        ('{"a": null, "b": true}', {"a": None, "b": True}),
        ("1: a\n'1': b", {1: "a", "1": "b"}),
        ("", None),
    ],
)
def test_what_is_clear_is_read(tmp_path: Path, text: str, wanted: object) -> None:
    path = tmp_path / "file"
    path.write_text(text)
    assert read_yaml(path) == wanted


MERGED = """
- [{base: &base {a: 1, b: 2}, over: &over {<<: *base, a: 3}}]
- {<<: *over, a: 4}
"""


def test_a_merged_key_may_be_overridden(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text(MERGED)
    (inner,), outer = read_yaml(path)
    assert inner == {"base": {"a": 1, "b": 2}, "over": {"a": 3, "b": 2}}
    assert outer == {"a": 4, "b": 2}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: 1\nb: 2\na: 3", "'a' comes twice in line 3"),
        ("a:\n  b: 1\n  c: 2\n  b: 3\n", "'b' comes twice in line 4"),
        ('{"a": 1,\n"a": 1}', "'a' comes twice in line 2"),
        ("- 1: x\n  1: y", "1 comes twice in line 2"),
        ("a: [", "in line 2"),
        ("a: 1\n---\na: 2", "in line 2"),
        ("? [1]\n: x", "unhashable"),
        ("a: *nobody", "in line 1"),
        ("!!python/name:os.system x", "in line 1"),
    ],
)
def test_what_is_not_is_refused_with_its_line(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "file"
    path.write_text(text)
    with pytest.raises(YamlMistake, match=words):
        read_yaml(path)


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"a: \xff")
    with pytest.raises(YamlMistake, match="not text"):
        read_yaml(path)


@pytest.mark.parametrize("folder", ["engine", "adapter_store", "deployments", "reef", "k8s"])
def test_nothing_else_reads_yaml(folder: str) -> None:
    """Others may write it."""
    for path in (ROOT / folder).rglob("*.py"):
        if path.name != "strict_yaml.py":
            assert "yaml.load" not in path.read_text() and "safe_load" not in path.read_text(), path

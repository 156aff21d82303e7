"""The README says what is there: every config key, every default, every file of the tree."""

import re
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import BaseModel

from deployments.config import AppConfig, load_config
from deployments.local.serve_yaml import read_application

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def keys_of(section: type[BaseModel], path: str = "") -> list[str]:
    """Dotted paths of all leaves; a list of sections is written `name[]`."""
    found: list[str] = []
    for name, field in section.model_fields.items():
        inner = _section_in(field.annotation)
        is_list = "list[" in str(field.annotation)
        here = f"{path}{name}{'[]' if is_list and inner else ''}"
        found += keys_of(inner, f"{here}.") if inner else [here]
    return found


def _section_in(annotation: Any) -> type[BaseModel] | None:
    for candidate in (annotation, *get_args(annotation)):
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    return None


def documented_keys() -> list[str]:
    """The first cells of the config table; `.name` continues the path of the one before it."""
    table = README.partition("| key | default |")[2].partition("\n\n")[0]
    found: list[str] = []
    for line in table.splitlines()[2:]:
        for key in re.findall(r"`([^`]+)`", line.split("|")[1]):
            parent = found[-1].rpartition(".")[0] if key.startswith(".") else ""
            found.append(parent + key)
    return found


def test_the_config_table_names_every_key_and_no_other() -> None:
    assert sorted(documented_keys()) == sorted(keys_of(AppConfig))


def tree_paths() -> list[str]:
    """Files and folders that the tree's lines begin with, joined to the folders above them."""
    tree = README.partition("## The tree")[2].split("```")[1]
    paths: list[str] = []
    folders: list[str] = []
    for line in filter(None, tree.splitlines()):
        depth = (len(line) - len(line.lstrip())) // 2
        names = re.findall(r"(?:^|(?<=  ))([\w./-]+(?:/|\.py))", line)
        for name in names:
            paths.append("".join(folders[:depth]) + name)
        if names and names[0].endswith("/"):
            folders = [*folders[:depth], names[0]]
    return paths


@pytest.mark.parametrize("path", tree_paths())
def test_what_the_tree_names_exists(path: str) -> None:
    assert (ROOT / path).exists()


def test_the_tree_was_found() -> None:
    assert len(tree_paths()) > 40


@pytest.mark.parametrize("target", ["serve", "test", "lint", "bench"])
def test_the_commands_are_targets_of_the_makefile(target: str) -> None:
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda p: p.name)
def test_every_config_is_accepted(path: Path) -> None:
    load_config(read_application(path)["args"])


def test_the_configs_that_the_readme_names_exist() -> None:
    named = re.findall(r"configs/[\w-]+\.yaml", README)
    assert named and all((ROOT / name).exists() for name in named)

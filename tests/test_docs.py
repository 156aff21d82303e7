"""The documents say what is there: every config key, metric, dependency, file, link and anchor."""

import asyncio
import re
import tomllib
from pathlib import Path
from typing import Any, get_args

import pytest
from prometheus_client.parser import text_string_to_metric_families
from pydantic import BaseModel

from deployments.config import AppConfig, load_config
from deployments.ingress.metrics import Metrics
from deployments.local.serve_yaml import read_application
from deployments.usage.uploader import UploadCounts
from deployments.usage.writer import UsageCounts
from reef.commands import reef
from tests.documents import PAGES, ROOT, anchors, blocks, inline_code, links, table

README = ROOT / "README.md"
ARCHITECTURE = ROOT / "docs" / "architecture.md"
CONFIGURATION = ROOT / "docs" / "configuration.md"
CONTRIBUTING = ROOT / "CONTRIBUTING.md"
DEPENDENCIES = ROOT / "docs" / "dependencies.md"
OPERATIONS = ROOT / "docs" / "operations.md"
VLLM = ROOT / "docs" / "vllm.md"
PYPROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())

# What was true when it was written stays as it is.
HISTORY = {ROOT / "CHANGELOG.md", ROOT / "tests" / "bench" / "LOG.md"}
LIVING_PAGES = [page for page in PAGES if page not in HISTORY]


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


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
    found: list[str] = []
    for cells in table(CONFIGURATION, "| key | default |"):
        for key in re.findall(r"`([^`]+)`", cells[0]):
            parent = found[-1].rpartition(".")[0] if key.startswith(".") else ""
            found.append(parent + key)
    return found


def test_the_config_table_names_every_key_and_no_other() -> None:
    assert sorted(documented_keys()) == sorted(keys_of(AppConfig))


# ---- files ---------------------------------------------------------------------------------


def tree_paths() -> list[str]:
    """Files and folders that the tree's lines begin with, joined to the folders above them."""
    tree = ARCHITECTURE.read_text().partition("## The tree")[2].split("```")[1]
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


def paths_in(code: str) -> list[str]:
    """Paths of this repository in a piece of inline code."""
    found = re.findall(r"(?<![\w./:$-])\w[\w.-]*/[\w./*-]*", code)
    return [path for path in found if (ROOT / path.partition("/")[0]).is_dir()]


@pytest.mark.parametrize("page", LIVING_PAGES, ids=name_of)
def test_paths_in_backticks_exist(page: Path) -> None:
    paths = [path for code in inline_code(page) for path in paths_in(code)]
    assert [path for path in paths if not any(ROOT.glob(path))] == []


def test_paths_in_backticks_are_found() -> None:
    assert paths_in("python k8s/generate.py --check") == ["k8s/generate.py"]
    assert paths_in("https://x/engine/y .venv/bin/python POST /v1/models lab/style") == []


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_to_files_and_headings(page: Path) -> None:
    for link in links(page):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("target", ["serve", "test", "lint", "bench"])
def test_the_commands_are_targets_of_the_makefile(target: str) -> None:
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("[!s]*.yaml")), ids=str)
def test_every_config_is_accepted(path: Path) -> None:
    load_config(read_application(path)["args"])


def test_the_configs_that_the_documents_name_exist() -> None:
    text = "".join(page.read_text() for page in LIVING_PAGES)
    named = re.findall(r"configs/[\w-]+\.yaml", text)
    assert named and all((ROOT / name).exists() for name in named)


# ---- the README's form ---------------------------------------------------------------------


def test_the_readme_stays_short_and_begins_with_the_status() -> None:
    lines = README.read_text().splitlines()
    assert len(lines) <= 150
    assert any("Status" in line for line in lines[:10])


# ---- tables --------------------------------------------------------------------------------


def series() -> set[str]:
    """As they are called in a scrape."""
    metrics = Metrics(max_adapter_series=1)
    metrics.show_usage(lambda: UsageCounts(0, 0, 0, 0, 0, UploadCounts()))
    scrape = asyncio.run(metrics.render({})).decode()
    families = text_string_to_metric_families(scrape)
    return {f"{f.name}_total" if f.type == "counter" else f.name for f in families}


def test_every_metric_is_described() -> None:
    rows = [*table(OPERATIONS, "| series |"), *table(VLLM, "| series |")]
    assert {name for cells in rows for name in re.findall(r"`([^`]+)`", cells[0])} == series()


def test_every_command_is_described() -> None:
    rows = table(OPERATIONS, "| `reef ...` |")
    assert {name for cells in rows for name in re.findall(r"`([^`]+)`", cells[0])} == set(
        reef.commands
    )


def packages() -> set[str]:
    project = PYPROJECT["project"]
    wanted = [project["dependencies"], *project["optional-dependencies"].values()]
    return {re.split(r"[\[<>=]", entry)[0] for group in wanted for entry in group}


def test_every_dependency_has_its_reason() -> None:
    cells = ", ".join(row[0] for row in table(DEPENDENCIES, "| package |"))
    named = {re.split(r"[\[ ]", name)[0] for name in re.sub(r"\(.*?\)", "", cells).split(", ")}
    assert named == packages()


def test_every_marker_is_explained() -> None:
    markers = PYPROJECT["tool"]["pytest"]["ini_options"]["markers"]
    rows = table(CONTRIBUTING, "| marker |")
    assert [cells[0].strip("`") for cells in rows] == [m.partition(":")[0] for m in markers]


def test_every_package_is_in_the_map_of_tests() -> None:
    named = {
        path.rstrip("/")
        for cells in table(CONTRIBUTING, "| code |")
        for path in re.findall(r"`([^`]+)`", cells[0])
    }
    found = {
        str(path.parent.relative_to(ROOT))
        for top in ("adapter_store", "deployments", "engine", "reef")
        for path in (ROOT / top).rglob("__init__.py")
    }
    assert found - named == set()


# ---- blocks --------------------------------------------------------------------------------


def test_every_block_says_how_it_is_checked() -> None:
    known = {"", "yaml", "sh", "sh server", "python server"}
    unknown = [
        f"{block.name}: {block.info}"
        for block in blocks()
        if block.info not in known and not re.match(r"sh norun: \w", block.info)
    ]
    assert unknown == []

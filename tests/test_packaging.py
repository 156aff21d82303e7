"""What the distribution holds and is called, and that every place says the same version."""

import re
import tomllib
from itertools import chain
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from setuptools import find_packages

from scripts.lock import read_versions

ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
VERSION = PYPROJECT["project"]["version"]


def test_the_wheel_holds_what_serves_and_nothing_else() -> None:
    include = PYPROJECT["tool"]["setuptools"]["packages"]["find"]["include"]
    found = find_packages(str(ROOT), include=include)
    assert {name.split(".")[0] for name in found} == {
        "adapter_store",
        "deployments",
        "engine",
        "reef",
    }


def test_no_registry_accepts_the_wheel() -> None:
    assert "Private :: Do Not Upload" in PYPROJECT["project"]["classifiers"]


def test_every_place_says_the_same_version() -> None:
    kustomization = yaml.safe_load((ROOT / "k8s" / "kustomization.yaml").read_text())
    assert [image["newTag"] for image in kustomization["images"]] == [VERSION]
    for name in ("docs/kubernetes.md", "k8s/Dockerfile"):
        tags = re.findall(r"/reef:([\w.]+)", (ROOT / name).read_text())
        assert tags and set(tags) == {VERSION}, name
    for name in ("README.md", "CHANGELOG.md"):
        numbers = re.findall(r"(?<![\d.])\d+\.\d+\.\d+(?![\d.])", (ROOT / name).read_text())
        assert VERSION in numbers, name


# ---- the lock ------------------------------------------------------------------------------


def locked() -> dict[str, str]:
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    pins = [line.partition("==") for line in lines if not line.startswith("#")]
    assert all(pin[1] for pin in pins), "a line pins no version"
    return {canonicalize_name(name): version for name, _, version in pins}


def wanted() -> list[Requirement]:
    project = PYPROJECT["project"]
    extras = project["optional-dependencies"].values()
    return [Requirement(text) for text in [*project["dependencies"], *chain(*extras)]]


@pytest.mark.parametrize("requirement", wanted(), ids=str)
def test_the_lock_holds_a_version_that_is_wanted(requirement: Requirement) -> None:
    assert requirement.specifier.contains(locked()[canonicalize_name(requirement.name)])


def test_the_lock_is_for_every_machine_without_a_gpu() -> None:
    """A version may not name a build (+cpu), nor a line a place to download from."""
    assert all(re.fullmatch(r"[\w.]+", version) for version in locked().values())
    assert not any(name.startswith(("nvidia-", "cuda-")) for name in locked())


REPORT = {
    "install": [
        {"metadata": {"name": "reef", "version": "0.1.0"}},
        {"metadata": {"name": "torch", "version": "2.13.0+cpu"}},
        {"metadata": {"name": "Typing_Extensions", "version": "4.16.0"}},
    ]
}


def test_a_lock_is_read_from_what_pip_reports() -> None:
    assert read_versions(REPORT) == {"torch": "2.13.0", "typing-extensions": "4.16.0"}


# ---- checks before a commit and after a push -----------------------------------------------


def test_the_workflow_runs_what_the_makefile_has() -> None:
    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text()
    named = re.findall(r"make (\w+)|target: (\w+)", workflow)
    targets = {first or second for first, second in named}
    assert targets == {"lint", "test", "coverage", "slow"}
    makefile = (ROOT / "Makefile").read_text()
    assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets)


def test_every_hook_is_a_tool_of_the_environment() -> None:
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    assert [repo["repo"] for repo in config["repos"]] == ["local"]
    entries = [hook["entry"].split()[0] for hook in config["repos"][0]["hooks"]]
    tools = [entry.removeprefix(".venv/bin/") for entry in entries if "/" in entry]
    assert set(tools) <= locked().keys() and len(tools) == 4

"""What the distribution holds and is called, and that every place says the same version."""

import re
import tomllib
from pathlib import Path

import yaml
from setuptools import find_packages

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
    for name in ("README.md", "k8s/Dockerfile"):
        tags = re.findall(r"/reef:([\w.]+)", (ROOT / name).read_text())
        assert tags and set(tags) == {VERSION}, name

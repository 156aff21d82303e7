"""The Dockerfile, read and not built: what goes in, and as whom it runs."""

import tomllib
from fnmatch import fnmatch

import pytest

from tests.k8s.manifests import FOLDER, ROOT, pod_templates

INSTRUCTIONS = [
    line.split(maxsplit=1)
    for line in (FOLDER / "Dockerfile").read_text().replace("\\\n", " ").splitlines()
    if line and not line.startswith("#")
]
SETUPTOOLS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
PACKAGES = {pattern.rstrip("*") for pattern in SETUPTOOLS["packages"]["find"]["include"]}
NOT_SERVED = {"examples"}
BUILT = ROOT / "engine" / "backends" / "native" / "lib"  # by setup.py


def arguments(instruction: str) -> list[str]:
    return [rest for name, rest in INSTRUCTIONS if name == instruction]


def copied() -> list[str]:
    return [source for rest in arguments("COPY") for source in rest.split()[:-1]]


def test_the_image_holds_the_packages_and_what_installing_them_needs() -> None:
    needed = {"pyproject.toml", "setup.py", "README.md", "LICENSE"}
    assert set(copied()) == (PACKAGES - NOT_SERVED) | needed


def test_the_build_sees_what_it_copies_and_nothing_else() -> None:
    lines = (FOLDER / "Dockerfile.dockerignore").read_text().splitlines()
    assert lines[1] == "*"  # below the comment: all is left out, then some let in
    allowed = [line.removeprefix("!") for line in lines if line.startswith("!")]
    assert allowed == copied()
    assert all((ROOT / name).exists() for name in allowed)


def test_the_image_runs_as_the_user_of_the_pods() -> None:
    for template in pod_templates().values():
        context = template["spec"]["securityContext"]
        assert arguments("USER") == [f"{context['runAsUser']}:{context['runAsGroup']}"]


@pytest.mark.parametrize("package", sorted(PACKAGES - NOT_SERVED))
def test_every_file_beside_the_code_is_package_data(package: str) -> None:
    """What is not, is there in a checkout and missing in the image."""
    everywhere, *others = SETUPTOOLS["package-data"].items()
    assert everywhere[0] == "*"
    patterns = [f"*/{pattern}" for pattern in everywhere[1]]
    patterns += [f"*/{name.replace('.', '/')}/{p}" for name, own in others for p in own]
    for path in (ROOT / package).rglob("*"):
        if path.is_file() and path.suffix not in (".py", ".pyc") and path.parent != BUILT:
            assert any(fnmatch(str(path), pattern) for pattern in patterns), path

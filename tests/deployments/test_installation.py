"""Packages that belong together, and what only a checkout has."""

from pathlib import Path

import pytest

import engine
from deployments import installation
from deployments.installation import WrongInstallation, check_one_installation, checkout_root
from deployments.local import serve

ROOT = Path(__file__).parents[2]


def test_the_packages_of_this_checkout_belong_together() -> None:
    check_one_installation()


@pytest.mark.parametrize("place", ["/elsewhere/engine/__init__.py", None])
def test_a_package_of_another_place_is_named(
    place: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "__file__", place)
    with pytest.raises(WrongInstallation, match=r"'engine' is imported from .*, not from"):
        check_one_installation()


def test_an_application_is_not_built_of_two_installations(monkeypatch: pytest.MonkeyPatch) -> None:
    import tests.deployments.support.quiet_ray  # noqa: F401
    from deployments.app import build_app

    monkeypatch.setattr(engine, "__file__", "/elsewhere/engine/__init__.py")
    with pytest.raises(WrongInstallation):
        build_app({})


def test_the_checkout_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert checkout_root("examples/demo") == ROOT
    monkeypatch.setattr(installation, "ROOT", tmp_path)
    with pytest.raises(WrongInstallation, match="examples/demo is only in a checkout"):
        checkout_root("examples/demo")


def test_the_demo_is_not_made_without_a_checkout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(installation, "ROOT", tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(WrongInstallation, match="examples/demo is only in a checkout"):
        serve._make_demo()

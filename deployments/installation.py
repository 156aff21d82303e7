"""Finds where this project's packages are installed, and checks that they belong together.

Their names are plain words. A folder of the same name that comes first on the import path, or a
second copy of the project, hides one of them and not the others.
"""

import importlib
from pathlib import Path

PACKAGES = ("deployments", "engine", "adapter_store")
ROOT = Path(__file__).resolve().parents[1]


class WrongInstallation(Exception):
    """The packages do not belong together, or a needed part is not installed."""


def check_one_installation() -> None:
    """Raise WrongInstallation unless all packages come from the folder of this one."""
    for name in PACKAGES:
        found = importlib.import_module(name).__file__
        if found is None or Path(found).resolve() != ROOT / name / "__init__.py":
            where = found or "a folder that is not this project's"
            raise WrongInstallation(
                f"the package {name!r} is imported from {where}, not from {ROOT / name}: another "
                "folder or package of that name comes first on the import path; start from another "
                "folder, or install into an environment of its own"
            )


def checkout_root(part: str) -> Path:
    """Return the checkout of the packages. Raises WrongInstallation if it lacks `part`."""
    if not (ROOT / "pyproject.toml").is_file() or not (ROOT / part).exists():
        raise WrongInstallation(
            f"{part} is only in a checkout of the repository, and the packages are installed in "
            f"{ROOT} without one"
        )
    return ROOT

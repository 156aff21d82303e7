"""Compiles the native kernels into the package; everything else is in pyproject.toml.

Without a compiler the package is still whole: it says so, and computes with torch.
"""

import sys
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
sys.path.insert(0, str(ROOT))

from engine.backends.native.build import LIBRARY_FOLDER, BuildError, compile_library  # noqa: E402


class BuildWithKernels(build_py):
    def run(self) -> None:
        super().run()
        root = ROOT if self.editable_mode else Path(self.build_lib)
        try:
            compile_library(root / LIBRARY_FOLDER.relative_to(ROOT))
        except BuildError as error:
            print(f"warning: the native CPU kernels are not built: {error}", file=sys.stderr)


class PlatformDistribution(Distribution):
    def has_ext_modules(self) -> bool:
        return True


class PlatformWheel(bdist_wheel):
    """For one platform, because of the library, but for every Python."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(
    distclass=PlatformDistribution,
    cmdclass={"build_py": BuildWithKernels, "bdist_wheel": PlatformWheel},
)

"""Provide the `reef` command and the version. Importing this is fast: no torch, no Ray."""

from importlib.metadata import version

__version__ = version("reef")

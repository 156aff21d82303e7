"""Imports ray.serve, so that what it warns of while it is imported is not taken for ours."""

import warnings

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import ray.serve  # noqa: F401

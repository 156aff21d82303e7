"""KubeRay's own schemas of the kinds in use, where there are some."""

import os
from pathlib import Path

import pytest

from tests.k8s.crd_schema import Crd, read_crd
from tests.k8s.manifests import is_kuberay, resources


@pytest.fixture(scope="session")
def crds() -> dict[tuple[str, str], Crd]:
    folder = os.environ.get("KUBERAY_CRDS")
    if folder is None:
        pytest.skip("KUBERAY_CRDS is not set: the folder of KubeRay's CRDs, ray.io_*.yaml")
    kinds = {r["kind"] for r in resources().values() if is_kuberay(r)}
    paths = [Path(folder) / f"ray.io_{kind.lower()}s.yaml" for kind in sorted(kinds)]
    return {key: crd for path in paths for key, crd in read_crd(path).items()}

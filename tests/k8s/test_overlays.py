"""Each overlay, as kustomize makes it, against the schemas; and what it changes in the base."""

import shutil
import subprocess
from functools import cache
from typing import Any

import kubernetes_validate
import pytest
import yaml

from tests.k8s.crd_schema import Crd
from tests.k8s.manifests import ROOT, Resource, is_kuberay, read
from tests.k8s.test_manifests import KUBERNETES, pod

FOLDER = ROOT / "k8s-overlays"
OVERLAYS = sorted(path.name for path in FOLDER.iterdir())


@cache
def built(overlay: str) -> tuple[Resource, ...]:
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl, which builds the overlays, is not installed")
    command = ["kubectl", "kustomize", str(FOLDER / overlay)]
    made = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert made.returncode == 0, made.stderr
    return tuple(yaml.safe_load_all(made.stdout))


def service(overlay: str) -> Any:
    (found,) = [each for each in built(overlay) if each["kind"] == "RayService"]
    return found


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_an_overlays_service_fits_kuberays_schema(
    overlay: str, crds: dict[tuple[str, str], Crd]
) -> None:
    made = service(overlay)
    assert crds[made["apiVersion"], made["kind"]].errors(made) == []


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_all_else_of_an_overlay_fits_kubernetes_and_is_in_one_namespace(overlay: str) -> None:
    for resource in built(overlay):
        if not is_kuberay(resource):
            kubernetes_validate.validate(resource, KUBERNETES, strict=True)
        if resource["kind"] != "Namespace":
            assert resource["metadata"]["namespace"] == "reef"
    (group,) = service(overlay)["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    kubernetes_validate.validate(pod(group["template"]), KUBERNETES, strict=True)


def test_an_incremental_upgrade_asks_for_at_most_a_quarter_more() -> None:
    strategy = service("incremental-upgrade")["spec"]["upgradeStrategy"]
    assert strategy["type"] == "NewClusterWithIncrementalUpgrade"
    options = strategy["clusterUpgradeOptions"]
    assert 10 <= options["maxSurgePercent"] <= 25
    assert options["stepSizePercent"] <= options["maxSurgePercent"]


def test_a_queued_service_waits_for_a_fixed_number_of_pods() -> None:
    made = service("kueue")
    assert made["spec"]["suspend"] is True
    assert made["metadata"]["labels"]["kueue.x-k8s.io/queue-name"]
    cluster = made["spec"]["rayClusterConfig"]
    assert cluster["enableInTreeAutoscaling"] is False
    (group,) = cluster["workerGroupSpecs"]
    assert group["replicas"] == group["minReplicas"] == group["maxReplicas"]


def test_a_claimed_gpu_replaces_the_counted_one() -> None:
    (group,) = service("dra")["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    (claim,) = group["template"]["spec"]["resourceClaims"]
    (container,) = group["template"]["spec"]["containers"]
    assert container["resources"]["claims"] == [{"name": claim["name"]}]
    assert not any("nvidia" in name for name in container["resources"]["limits"])
    templates = [r for r in built("dra") if r["kind"] == "ResourceClaimTemplate"]
    assert [t["metadata"]["name"] for t in templates] == [claim["resourceClaimTemplateName"]]
    before = read("rayservice.yaml")["spec"]["rayClusterConfig"]["workerGroupSpecs"][0]
    counted = before["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"]
    assert group["rayStartParams"]["num-gpus"] == counted

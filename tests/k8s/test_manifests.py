"""Each manifest against its schema, and the manifests against each other.

No API server, operator or scheduler takes part: what they do with all this is not shown here.
"""

from typing import Any

import kubernetes_validate
import pytest

from tests.k8s.crd_schema import Crd
from tests.k8s.manifests import (
    NOT_DEPLOYED,
    Resource,
    file_names,
    is_kuberay,
    pod_templates,
    ray_cluster,
    ray_container,
    read,
    read_all,
    resources,
)

KUBERNETES = "1.34"
RESOURCES = resources()
TEMPLATES = pod_templates()


# ---- schemas -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [n for n in RESOURCES if is_kuberay(RESOURCES[n])])
def test_a_kuberay_object_fits_its_crd(name: str, crds: dict[tuple[str, str], Crd]) -> None:
    resource = RESOURCES[name]
    assert crds[resource["apiVersion"], resource["kind"]].errors(resource) == []


@pytest.mark.parametrize("name", [n for n in RESOURCES if not is_kuberay(RESOURCES[n])])
def test_every_other_object_is_of_a_core_kind_and_fits_it(name: str) -> None:
    kubernetes_validate.validate(RESOURCES[name], KUBERNETES, strict=True)


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_pod_template_makes_a_valid_pod(name: str) -> None:
    kubernetes_validate.validate(pod(TEMPLATES[name]), KUBERNETES, strict=True)


def pod(template: Resource) -> Resource:
    return {"apiVersion": "v1", "kind": "Pod"} | template


def test_the_schemas_of_core_kinds_refuse_slips_and_kinds_that_they_do_not_know() -> None:
    service = read("rayservice.yaml")
    with pytest.raises(kubernetes_validate.SchemaNotFoundError):
        kubernetes_validate.validate(service, KUBERNETES, strict=True)
    head = TEMPLATES["head"]
    container = ray_container(head) | {"imagePullPolice": "Always"}
    wrong = pod(head) | {"spec": head["spec"] | {"containers": [container]}}
    with pytest.raises(kubernetes_validate.ValidationError, match="imagePullPolice"):
        kubernetes_validate.validate(wrong, KUBERNETES, strict=True)


# ---- the kustomization ---------------------------------------------------------------------


def test_the_kustomization_lists_exactly_the_files_that_exist() -> None:
    kustomization = read("kustomization.yaml")
    assert kustomization["resources"] == sorted(set(file_names()) - NOT_DEPLOYED)
    assert set(kustomization) == {"apiVersion", "kind", "namespace", "resources", "images"}


def test_the_kustomization_names_the_namespace_that_is_made() -> None:
    assert read("kustomization.yaml")["namespace"] == read("namespace.yaml")["metadata"]["name"]
    assert not any("namespace" in resource["metadata"] for resource in RESOURCES.values())


def test_all_pods_run_the_one_image_that_the_kustomization_pins() -> None:
    (image,) = read("kustomization.yaml")["images"]
    assert {ray_container(template)["image"] for template in TEMPLATES.values()} == {image["name"]}
    assert image["newTag"] not in ("", "latest")


# ---- secrets -------------------------------------------------------------------------------


def test_the_example_lists_the_secrets_in_use_with_their_keys_and_no_values() -> None:
    examples = read_all("secrets.example.yaml")
    listed = {
        secret["metadata"]["name"]: secret["metadata"]["annotations"]["reef/keys"].split(", ")
        for secret in examples
    }
    assert listed == secrets_in_use()
    assert not any(secret.keys() & {"data", "stringData"} for secret in examples)


def secrets_in_use() -> dict[str, list[str]]:
    used = {ray_cluster()["authOptions"]["secretName"]: ["auth_token"]}
    for template in TEMPLATES.values():
        for volume in template["spec"]["volumes"]:
            if "secret" in volume:
                keys = [item["key"] for item in volume["secret"]["items"]]
                used[volume["secret"]["secretName"]] = keys
    for entry in read("ingress.yaml")["spec"]["tls"]:
        used[entry["secretName"]] = ["tls.crt", "tls.key"]
    return used


def test_between_ray_processes_a_token_is_asked_for() -> None:
    assert ray_cluster()["authOptions"]["mode"] == "token"


# ---- pods ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_pod_may_write_to_its_own_scratch_space_alone(name: str) -> None:
    spec = TEMPLATES[name]["spec"]
    volumes = {volume["name"]: volume for volume in spec["volumes"]}
    mounts = ray_container(TEMPLATES[name])["volumeMounts"]
    assert {mount["name"] for mount in mounts} == set(volumes)
    for mount in mounts:
        assert ("emptyDir" in volumes[mount["name"]]) != mount.get("readOnly", False), mount


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_pod_is_confined_as_the_namespace_demands(name: str) -> None:
    assert len(TEMPLATES[name]["spec"]["containers"]) == 1
    own = TEMPLATES[name]["spec"]["securityContext"]
    assert own["runAsNonRoot"] is True
    assert own["runAsUser"] > 0
    assert own["seccompProfile"] == {"type": "RuntimeDefault"}
    assert_confined(ray_container(TEMPLATES[name])["securityContext"])


def test_the_autoscaler_that_kuberay_adds_is_confined_too() -> None:
    assert_confined(ray_cluster()["autoscalerOptions"]["securityContext"])


def assert_confined(context: dict[str, Any]) -> None:
    assert context == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_pod_is_probed_and_bounded(name: str) -> None:
    container = ray_container(TEMPLATES[name])
    assert {"livenessProbe", "readinessProbe"} <= set(container)
    assert container["resources"]["requests"] == container["resources"]["limits"]
    assert {"cpu", "memory"} <= set(container["resources"]["limits"])


def test_a_worker_has_time_to_drain_before_it_is_killed() -> None:
    for group in ray_cluster()["workerGroupSpecs"]:
        drain_s = ray_container(group["template"])["lifecycle"]["preStop"]["sleep"]["seconds"]
        assert 0 < drain_s < group["template"]["spec"]["terminationGracePeriodSeconds"]


# ---- the network ---------------------------------------------------------------------------

OURS = {"app.kubernetes.io/part-of": "reef"}
OPERATOR = {"app.kubernetes.io/name": "kuberay-operator"}
ALL = None  # every port


def open_ports(namespace: str, labels: dict[str, str]) -> set[int] | None:
    """The ports of our pods that a pod elsewhere may connect to."""
    ports: set[int] = set()
    for rule in read("networkpolicy.yaml")["spec"]["ingress"]:
        if any(is_peer(peer, namespace, labels) for peer in rule["from"]):
            if "ports" not in rule:
                return ALL
            ports |= {port["port"] for port in rule["ports"]}
    return ports


def is_peer(peer: Resource, namespace: str, labels: dict[str, str]) -> bool:
    own = {"kubernetes.io/metadata.name": "reef"}
    wanted = peer.get("namespaceSelector", {"matchLabels": own})["matchLabels"]
    if not wanted.items() <= {"kubernetes.io/metadata.name": namespace}.items():
        return False
    return peer.get("podSelector", {"matchLabels": {}})["matchLabels"].items() <= labels.items()


@pytest.mark.parametrize(
    ("namespace", "labels", "ports"),
    [
        ("reef", OURS, ALL),
        ("reef", {}, set()),
        ("elsewhere", {}, set()),
        ("elsewhere", OURS, set()),
        ("ingress-nginx", {}, {8000}),
        ("kuberay-system", OPERATOR, {8265}),
        ("kuberay-system", {}, set()),
        ("elsewhere", OPERATOR, set()),
    ],
)
def test_only_these_ports_are_open_to_these_pods(
    namespace: str, labels: dict[str, str], ports: set[int] | None
) -> None:
    assert open_ports(namespace, labels) == ports


def test_the_network_policy_covers_every_pod_and_all_that_comes_in() -> None:
    spec = read("networkpolicy.yaml")["spec"]
    assert spec["policyTypes"] == ["Ingress"]
    for template in TEMPLATES.values():
        assert spec["podSelector"]["matchLabels"].items() <= template["metadata"]["labels"].items()


def test_the_ingress_shows_the_api_alone_and_finds_kuberays_service() -> None:
    (rule,) = read("ingress.yaml")["spec"]["rules"]
    (path,) = rule["http"]["paths"]
    assert path["path"] == "/v1"
    service = {"name": read("rayservice.yaml")["metadata"]["name"] + "-serve-svc"}
    assert path["backend"]["service"] == service | {"port": {"number": 8000}}

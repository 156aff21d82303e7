"""What lies in k8s/, read once per call and handed out as plain data."""

from pathlib import Path
from typing import Any

import yaml

from deployments.strict_yaml import StrictLoader

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "k8s"
NOT_DEPLOYED = {"kustomization.yaml", "secrets.example.yaml"}

Resource = dict[str, Any]


def read_all(name: str) -> list[Resource]:
    return list(yaml.load_all((FOLDER / name).read_text(), StrictLoader))


def read(name: str) -> Resource:
    (resource,) = read_all(name)
    return resource


def file_names() -> list[str]:
    return sorted(path.name for path in FOLDER.glob("*.yaml"))


def resources() -> dict[str, Resource]:
    """All Kubernetes objects, the example secrets too, by `file kind name`."""
    names = [name for name in file_names() if name != "kustomization.yaml"]
    found = [(name, resource) for name in names for resource in read_all(name)]
    return {f"{n} {r['kind']} {r['metadata']['name']}": r for n, r in found}


def is_kuberay(resource: Resource) -> bool:
    return resource["apiVersion"].startswith("ray.io/")


def ray_cluster() -> Resource:
    return read("rayservice.yaml")["spec"]["rayClusterConfig"]


def pod_templates() -> dict[str, Resource]:
    """The head's and each worker group's pod template."""
    cluster = ray_cluster()
    workers = {group["groupName"]: group["template"] for group in cluster["workerGroupSpecs"]}
    return {"head": cluster["headGroupSpec"]["template"]} | workers


def ray_container(template: Resource) -> Resource:
    """KubeRay takes the first container for Ray's."""
    return template["spec"]["containers"][0]


def environment(template: Resource) -> dict[str, str]:
    return {entry["name"]: entry["value"] for entry in ray_container(template)["env"]}

"""The converter from CRDs to JSON Schema: what it refuses, and what it must let pass."""

import copy
from typing import Any

import pytest

from tests.k8s.crd_schema import OPEN, Crd, crd_versions, to_crd
from tests.k8s.manifests import read

SPEC: dict[str, Any] = {
    "type": "object",
    "required": ["name", "size", "mode"],
    "properties": {
        "name": {"type": "string"},
        "mode": {"type": "string", "enum": ["a", "b"], "default": "a"},
        "size": {
            "anyOf": [{"type": "integer"}, {"type": "string"}],
            "pattern": "^[0-9]+(Ki|Mi|Gi)?$",
            "x-kubernetes-int-or-string": True,
        },
        "note": {"type": "string", "nullable": True},
        "labels": {"type": "object", "additionalProperties": {"type": "string"}},
        "anything": {"type": "object", OPEN: True, "properties": {"a": {"type": "integer"}}},
        "nothing": {"type": "object"},
        "tags": {"type": "array", "items": {"type": "string"}, "x-kubernetes-list-type": "set"},
        "parts": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["id"],
                "properties": {"id": {"type": "integer"}},
                "x-kubernetes-validations": [{"rule": "self.id > 0"}],
            },
        },
    },
    "x-kubernetes-validations": [{"rule": "self.mode == oldSelf.mode", "message": "immutable"}],
}
SCHEMA = {"type": "object", "properties": {"spec": SPEC}}


def errors(**spec: object) -> list[str]:
    resource = {"apiVersion": "reef/v1", "kind": "Thing", "metadata": {"name": "x"}}
    return to_crd(SCHEMA).errors(resource | {"spec": {"name": "n", "size": 1} | spec})


@pytest.mark.parametrize(
    "spec",
    [
        {},  # mode has a default
        {"size": "12Gi"},
        {"note": None},
        {"labels": {"any": "thing"}},
        {"anything": {"a": 1, "b": {"c": []}}},
        {"nothing": {}},
        {"tags": ["a", "b"]},
        {"parts": [{"id": 1}]},
    ],
)
def test_what_the_server_takes_passes(spec: dict[str, object]) -> None:
    assert errors(**spec) == []


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"nam": "x"}, "'nam' was unexpected"),
        ({"name": None}, "None is not of type 'string'"),
        ({"mode": "c"}, "'c' is not one of"),
        ({"size": 1.5}, "1.5 is not of type"),
        ({"size": "12 Gi"}, "does not match"),
        ({"labels": {"any": 1}}, "1 is not of type 'string'"),
        ({"anything": {"a": "1"}}, "'1' is not of type 'integer'"),
        ({"nothing": {"a": 1}}, "'a' was unexpected"),
        ({"tags": ["a", "a"]}, "non-unique"),
        ({"parts": [{}]}, "'id' is a required property"),
        ({"parts": [{"id": 1, "idd": 1}]}, "'idd' was unexpected"),
    ],
)
def test_what_is_wrong_is_told_once_and_with_its_place(
    spec: dict[str, object], message: str
) -> None:
    (error,) = errors(**spec)
    assert error.startswith("$.spec")
    assert message in error


def test_a_misspelt_section_beside_the_spec_is_refused() -> None:
    (error,) = to_crd(SCHEMA).errors({"metadata": {}, "spek": {}})
    assert "'spek' was unexpected" in error


def test_rules_that_are_not_evaluated_are_listed_with_their_place() -> None:
    assert to_crd(SCHEMA).cel_rules == [
        "$.spec: self.mode == oldSelf.mode",
        "$.spec.parts[]: self.id > 0",
    ]


def test_converting_leaves_the_schema_alone() -> None:
    before = copy.deepcopy(SCHEMA)
    to_crd(SCHEMA)
    assert before == SCHEMA


def test_only_served_versions_are_known() -> None:
    versions = [
        {"name": name, "served": name == "v2", "schema": {"openAPIV3Schema": SCHEMA}}
        for name in ("v1", "v2")
    ]
    spec = {"group": "reef", "names": {"kind": "Thing"}, "versions": versions}
    assert list(crd_versions({"spec": spec})) == [("reef/v2", "Thing")]


# ---- KubeRay's own schema ------------------------------------------------------------------


def misspell(resource: dict[str, Any], path: tuple[str | int, ...], wrong: str | None) -> None:
    """Rename the key at the end of the path, or remove it."""
    *parents, last = path
    at: Any = resource
    for key in parents:
        at = at[key]
    value = at.pop(last)
    if wrong is not None:
        at[wrong] = value


CONTAINERS = ("spec", "rayClusterConfig", "workerGroupSpecs", 0, "template", "spec", "containers")
CLUSTER = ("spec", "rayClusterConfig")


@pytest.mark.parametrize(
    ("path", "wrong", "message"),
    [
        (("spec", "serveConfigV2"), "serveConfigv2", "'serveConfigv2' was unexpected"),
        ((*CONTAINERS, 0, "imagePullPolicy"), "imagePullPolice", "'imagePullPolice' was unexp"),
        ((*CONTAINERS, 0, "name"), None, "'name' is a required property"),
        ((*CLUSTER, "authOptions", "mode"), "Mode", "'Mode' was unexpected"),
        ((*CLUSTER, "headGroupSpec"), None, "'headGroupSpec' is a required property"),
    ],
)
def test_a_slip_in_the_ray_service_is_found(
    crds: dict[tuple[str, str], Crd],
    path: tuple[str | int, ...],
    wrong: str | None,
    message: str,
) -> None:
    service = read("rayservice.yaml")
    misspell(service, path, wrong)
    (error,) = crds[service["apiVersion"], service["kind"]].errors(service)
    assert message in error

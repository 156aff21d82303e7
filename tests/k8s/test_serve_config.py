"""The configuration inside the RayService: generated, understood by Serve and by us, and fitting
the pods around it."""

import subprocess
import sys
import tomllib
import typing
import warnings
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel
from pydantic.warnings import PydanticDeprecatedSince20

from deployments.config import load_config
from deployments.config_sections import parse_bytes
from deployments.haproxy_launcher import BINARY_VARIABLE
from deployments.local.serve_yaml import read_application
from k8s.generate import MARKER, embed
from tests.k8s.manifests import (
    FOLDER,
    ROOT,
    environment,
    pod_templates,
    ray_cluster,
    ray_container,
    read,
)

with warnings.catch_warnings():
    warnings.simplefilter("ignore", PydanticDeprecatedSince20)  # Ray's, as it is imported
    from ray import serve
    from ray.serve.schema import ServeDeploySchema

    from deployments.app import FAST_PATH, INGRESS_DRAIN_S, build_app

CONFIG = ROOT / "configs" / "gpu-cluster.yaml"
SERVE_CONFIG: dict[str, Any] = yaml.safe_load(read("rayservice.yaml")["spec"]["serveConfigV2"])
ARGS = SERVE_CONFIG["applications"][0]["args"]
WORKERS = ray_cluster()["workerGroupSpecs"]


# ---- generated -----------------------------------------------------------------------------


def test_the_ray_service_holds_the_configuration_as_it_is_now() -> None:
    command = [sys.executable, str(FOLDER / "generate.py"), "--check"]
    checked = subprocess.run(command, capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert read("rayservice.yaml")["spec"]["serveConfigV2"] == CONFIG.read_text()


AROUND = f"spec:\n{MARKER}\n    old: 1\n\n    older:\n    - 2\n  rest: true\n"


def test_embedding_replaces_the_block_and_nothing_else() -> None:
    config = "# why\na:\n- 1\n\nb: 2\n"
    made = embed(AROUND, config)
    assert yaml.safe_load(made) == {"spec": {"serveConfigV2": config, "rest": True}}
    assert embed(made, config) == made


@pytest.mark.parametrize("manifest", ["spec: {}\n", AROUND + AROUND])
def test_a_manifest_without_exactly_one_block_is_refused(manifest: str) -> None:
    with pytest.raises(ValueError, match="wanted exactly one"):
        embed(manifest, "a: 1\n")


# ---- understood ----------------------------------------------------------------------------


def unknown_keys(model: type[BaseModel], values: object, path: str = "$") -> list[str]:
    """Keys that Serve would take and ignore: its schema lets any pass."""
    if isinstance(values, list):
        return [key for n, v in enumerate(values) for key in unknown_keys(model, v, f"{path}[{n}]")]
    if not isinstance(values, dict):
        return []
    unknown: list[str] = []
    for key, value in values.items():
        field = model.model_fields.get(key)
        if field is None:
            unknown.append(f"{path}.{key}")
        else:
            for inner in models_in(field.annotation):
                unknown += unknown_keys(inner, value, f"{path}.{key}")
    return unknown


def models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in typing.get_args(annotation) for model in models_in(part)]


def test_serve_understands_every_key_of_the_configuration() -> None:
    assert unknown_keys(ServeDeploySchema, SERVE_CONFIG) == []
    ServeDeploySchema.model_validate(SERVE_CONFIG)


@pytest.mark.parametrize(
    ("config", "unknown"),
    [
        ({"applicationz": []}, "$.applicationz"),
        ({"http_options": {"prot": 1}}, "$.http_options.prot"),
        ({"applications": [{"route_prefiks": "/"}]}, "$.applications[0].route_prefiks"),
        (
            {"applications": [{"deployments": [{"num_replicaz": 2}]}]},
            "$.applications[0].deployments[0].num_replicaz",
        ),
    ],
)
def test_keys_that_serve_would_ignore_are_found(config: dict[str, Any], unknown: str) -> None:
    assert unknown_keys(ServeDeploySchema, config) == [unknown]


def test_the_import_path_is_the_applications_builder(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(read("rayservice.yaml")["spec"]["serveConfigV2"])
    application = read_application(path)
    assert application["import_path"] == f"{build_app.__module__}:{build_app.__name__}"


def test_we_understand_every_argument() -> None:
    assert len(load_config(ARGS).models) == 1


def test_the_import_path_builds_the_application(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in FAST_PATH:
        monkeypatch.setenv(name, "1")
    assert isinstance(build_app(ARGS), serve.Application)


# ---- fitting -------------------------------------------------------------------------------


def test_the_switches_of_the_fast_path_are_on_everywhere() -> None:
    environments = {name: environment(template) for name, template in pod_templates().items()}
    wanted = dict.fromkeys(FAST_PATH, "1") | {"RAY_USAGE_STATS_ENABLED": "0"}
    for found in environments.values():
        assert found == environments["head"]
        assert wanted.items() <= found.items()


def test_haproxy_is_started_by_our_launcher_and_lets_answers_finish() -> None:
    variables = environment(pod_templates()["head"])
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    launcher = Path(variables[BINARY_VARIABLE])
    assert launcher.parent == Path("/usr/local/bin"), "where pip puts it in the image"
    assert project["scripts"][launcher.name] == "deployments.haproxy_launcher:main"
    assert float(variables["RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S"]) > INGRESS_DRAIN_S


def test_rays_memory_monitor_is_off() -> None:
    for template in pod_templates().values():
        assert environment(template)["RAY_memory_monitor_refresh_ms"] == "0"


def test_the_cluster_runs_the_ray_that_the_package_asks_for() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert f"ray[serve]=={ray_cluster()['rayVersion']}" in project["dependencies"]


def test_the_gpu_pods_hold_all_replicas_and_beside_them_the_ingress() -> None:
    (model,), (group,) = ARGS["models"], WORKERS
    replicas, limits = model["replicas"], ray_container(group["template"])["resources"]["limits"]
    num_gpus = int(limits["nvidia.com/gpu"])
    assert group["minReplicas"] * num_gpus == replicas["min"] * replicas["num_gpus"]
    assert group["maxReplicas"] * num_gpus == replicas["max"] * replicas["num_gpus"]
    assert int(limits["cpu"]) >= replicas["num_cpus"] + ARGS["ingress"]["num_cpus"]


def test_the_pods_are_reached_where_serve_listens() -> None:
    options = SERVE_CONFIG["http_options"]
    assert options["host"] == "0.0.0.0"
    for template in pod_templates().values():
        ports = {port["name"]: port["containerPort"] for port in ray_container(template)["ports"]}
        assert ports["serve"] == options["port"]


def test_a_worker_that_ends_leaves_its_requests_the_time_that_they_are_promised() -> None:
    for group in WORKERS:
        drain_s = ray_container(group["template"])["lifecycle"]["preStop"]["sleep"]["seconds"]
        assert drain_s >= max(model.replicas.drain_s for model in load_config(ARGS).models)


def test_nothing_of_ours_is_placed_on_the_head() -> None:
    assert ray_cluster()["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert read("rayservice.yaml")["spec"]["excludeHeadPodFromServeSvc"] is True
    asked = [model["replicas"]["num_cpus"] for model in ARGS["models"]]
    assert min([*asked, ARGS["ingress"]["num_cpus"]]) > 0


def test_every_path_of_the_configuration_is_mounted_on_the_workers() -> None:
    paths = [model["source"] for model in ARGS["models"]]
    paths += [ARGS["adapters"]["disk_path"], ARGS["tenancy"]["keys_file"]]
    for group in WORKERS:
        container, variables = ray_container(group["template"]), environment(group["template"])
        mounts = {Path(mount["mountPath"]) for mount in container["volumeMounts"]}
        files = [variables["AWS_SHARED_CREDENTIALS_FILE"], variables["AWS_CONFIG_FILE"]]
        for path in map(Path, paths + files):
            assert mounts & set(path.parents), path


def test_every_file_from_a_secret_is_where_its_reader_looks() -> None:
    for group in WORKERS:
        variables = environment(group["template"])
        wanted = {ARGS["tenancy"]["keys_file"], variables["AWS_SHARED_CREDENTIALS_FILE"]}
        assert secret_files(group["template"]) == wanted | {variables["AWS_CONFIG_FILE"]}


def secret_files(template: dict[str, Any]) -> set[str]:
    mounts = {m["name"]: m["mountPath"] for m in ray_container(template)["volumeMounts"]}
    return {
        f"{mounts[volume['name']]}/{item['path']}"
        for volume in template["spec"]["volumes"]
        if "secret" in volume
        for item in volume["secret"]["items"]
    }


def test_caches_fit_the_space_that_the_pods_have() -> None:
    for group in WORKERS:
        limits = ray_container(group["template"])["resources"]["limits"]
        volumes = {volume["name"]: volume for volume in group["template"]["spec"]["volumes"]}
        cache_bytes = quantity(volumes["cache"]["emptyDir"]["sizeLimit"])
        assert size(ARGS["adapters"]["disk_bytes"]) < cache_bytes
        assert cache_bytes <= quantity(limits["ephemeral-storage"])
        assert size(ARGS["adapters"]["host_bytes"]) < quantity(limits["memory"])


def size(text: str) -> int:
    value = parse_bytes(text)
    assert isinstance(value, int)
    return value


def quantity(text: str) -> int:
    """Kubernetes writes 1Gi where we write 1GiB."""
    return size(text + "B")

"""Private names of libraries, each as the code relies on it: what docs/private-apis.md lists."""

import tests.deployments.support.quiet_ray  # noqa: F401

# isort: split
import ast
import inspect
import logging
import re
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from ray import _raylet
from ray._private import node as ray_node
from ray._private import services
from ray._private.parameter import RayParams
from ray.serve import context, request_router
from ray.serve._private import client, constants, haproxy, logging_utils, replica, router
from ray.serve._private.handle_options import InitHandleOptions
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import LoggingConfig
from torch.nn import functional

from deployments import serve_logging
from deployments.app import FAST_PATH
from deployments.local import lean_ray, ray_worker
from deployments.local.ray_head import ray_environment

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/private-apis.md").read_text()
PACKAGES = ("engine", "deployments", "adapter_store", "reef", "examples", "k8s", "tests")


def parameters(function: Any) -> list[str]:
    return list(inspect.signature(function).parameters)


# ---- Ray -------------------------------------------------------------------------------------


def test_ray_tells_the_address_of_serve() -> None:
    assert parameters(context._get_global_client) == ["raise_if_no_controller_running"]
    assert isinstance(client.ServeControllerClient.http_config, property)


def test_ray_chooses_a_replica_without_reserving_a_slot() -> None:
    assert hasattr(DeploymentHandle, "choose_replica")
    assert 'pop("_reserve", True)' in inspect.getsource(router)


def test_ray_takes_a_folder_and_an_address_of_its_own() -> None:
    source = inspect.getsource(ray.init)
    for name in ("_temp_dir", "_node_ip_address"):
        assert f'kwargs.pop("{name}"' in source, f"ray.init has lost {name}"


def test_ray_starts_its_head_by_the_functions_that_are_replaced() -> None:
    """That it starts without what they leave out, `tests/deployments/test_ray.py` shows."""
    assert "ray._private.node.Node(" in inspect.getsource(ray.init)
    api_server = parameters(ray_node.Node.start_api_server)
    assert api_server == ["self", "include_dashboard", "raise_on_failure"]
    for name in ("setup_worker_path", "include_log_monitor", "no_monitor"):
        assert name in parameters(RayParams.__init__)
    raylet = inspect.getsource(services.start_raylet)
    assert "process_info = start_ray_process(\n        command,\n" in raylet
    for option in (*lean_ray.AGENTS, "--session_dir", "--node_id"):
        assert f'"{option}=' in raylet
    known = {getattr(_raylet, name) for name in dir(_raylet) if name.endswith("_PORT_NAME")}
    assert set(chain.from_iterable(lean_ray.AGENTS.values())) <= known


def test_rays_own_worker_script_takes_the_words_that_ours_leaves_out() -> None:
    source = (Path(ray.__file__).parent / "_private/workers/setup_worker.py").read_text()
    for word in (ray_worker.LANGUAGE, ray_worker.CONTEXT):
        assert f'"{word.partition("=")[0]}"' in source


@pytest.fixture
def serve_logger() -> Iterator[logging.Logger]:
    """Ray's logger, and our own as they were before."""
    loggers = [logging.getLogger(name) for name in (serve_logging.SERVE, *serve_logging.OURS)]
    before = [(each, each.handlers[:], each.propagate, each.level) for each in loggers]
    yield loggers[0]
    for handler in loggers[0].handlers:
        file = getattr(handler, "target", handler)
        handler.close()
        file.close()
    for each, each.handlers, each.propagate, level in before:
        each.setLevel(level)


def test_the_log_file_of_a_replica_is_behind_rays_buffer(
    serve_logger: logging.Logger, tmp_path: Path
) -> None:
    logging_utils.configure_component_logger(
        component_name="Engine",
        component_id="replica",
        logging_config=LoggingConfig(logs_dir=str(tmp_path)),
        max_bytes=10_000,
        backup_count=1,
        buffer_size=1000,
    )
    serve_logging.log_to_serves_file()
    logging.getLogger("engine").warning("seen at once")
    assert ["seen at once" in path.read_text() for path in tmp_path.iterdir()] == [True]


def test_ray_opens_a_replicas_grpc_port_after_the_replica_is_made() -> None:
    source = inspect.getsource(replica)
    assert 'add_port_to_grpc_server(self._server, "[::]:0")' in source
    initialize = source[source.index("    async def initialize(") :]
    assert initialize.index("initialize_callable(") < initialize.index("_on_initialized()")


def test_ray_runs_the_named_binary_with_its_configuration() -> None:
    """What the launcher changes in it, `test_haproxy_launcher.py` shows."""
    source = inspect.getsource(haproxy)
    assert 'args = [haproxy_bin, "-db", "-f", self.config_file_path]' in source
    assert hasattr(haproxy.HAProxyApi, "_generate_config_file_internal")


SERVE_VARIABLES = {n for n in ray_environment(Path("folder")) if n.startswith("RAY_SERVE_")}


@pytest.mark.parametrize("name", sorted(SERVE_VARIABLES | set(FAST_PATH)))
def test_serve_reads_the_environment_variable(name: str) -> None:
    assert f'"{name}"' in inspect.getsource(constants)


@pytest.mark.parametrize("name", sorted(set(ray_environment(Path("folder"))) - SERVE_VARIABLES))
def test_ray_reads_the_environment_variable(name: str) -> None:
    folder = Path(ray.__file__).parent
    sources = (path.read_text() for path in folder.glob("_*/**/*.py"))
    raylet = (folder / "core/src/ray/raylet/raylet").read_bytes()
    in_raylet = name.removeprefix("RAY_").encode() in raylet
    assert in_raylet or any(f'"{name}"' in source for source in sources)


def test_ray_takes_loopback_for_a_nodes_address_where_it_is_told_that_it_is_alone() -> None:
    assert "if not ray_constants.ENABLE_RAY_CLUSTER:" in inspect.getsource(
        services.get_node_ip_address
    )


def test_ray_has_what_the_router_reads_and_sets() -> None:
    fields = request_router.PendingRequest.__annotations__
    assert "args" in fields and "should_backoff" in fields["routing_context"].__annotations__
    assert isinstance(request_router.RequestRouter.curr_replicas, property)
    assert isinstance(request_router.RunningReplica.routing_stats, property)
    for name in ("initialize_state", "update_replicas", "choose_replicas"):
        assert hasattr(request_router.RequestRouter, name), name


def test_a_handle_can_be_told_where_its_router_runs() -> None:
    assert hasattr(DeploymentHandle, "_init")
    assert "_run_router_in_separate_loop" in parameters(InitHandleOptions)
    assert "_blocking" in parameters(client.ServeControllerClient.deploy_apps)


# ---- torch -----------------------------------------------------------------------------------


def test_torch_multiplies_in_fp8_with_scales_per_row_into_a_given_tensor() -> None:
    x, weight = torch.ones(16, 32), torch.full((16, 32), 2.0)
    out = torch.empty(16, 16, dtype=torch.bfloat16)
    torch._scaled_mm(
        x.to(torch.float8_e4m3fn),
        weight.to(torch.float8_e4m3fn).t(),
        scale_a=torch.full((16, 1), 0.5),
        scale_b=torch.ones(1, 16),
        bias=torch.ones(16, dtype=torch.bfloat16),
        out_dtype=torch.bfloat16,
        use_fast_accum=True,
        out=out,
    )
    assert (out == 33).all()


def test_torchs_public_scaled_mm_still_takes_no_out() -> None:
    """Once it does, the private one can go."""
    assert "out" not in parameters(functional.scaled_mm)


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch without oneDNN")
def test_torch_packs_weights_for_onednn() -> None:
    assert isinstance(torch.ops.mkldnn._is_mkldnn_bf16_supported(), bool)
    x, weight, bias = torch.randn(3, 8), torch.randn(4, 8), torch.randn(4)
    packed = torch.ops.mkldnn._reorder_linear_weight(weight)
    found = torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
    torch.testing.assert_close(found, functional.linear(x, weight, bias))


def test_torch_has_what_the_tests_of_streams_are_written_with() -> None:
    from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
    from torch.utils._pytree import tree_leaves

    assert tree_leaves(([1], {"a": 2})) == [1, 2]
    assert inspect.isclass(TorchDispatchMode)
    with _disable_current_modes():
        pass


def test_torch_wraps_a_module_for_activation_checkpointing() -> None:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    assert parameters(checkpoint_wrapper)[0] == "module"


def test_torch_can_keep_a_device_busy() -> None:
    assert callable(torch.cuda._sleep)


# ---- Triton ----------------------------------------------------------------------------------


def test_triton_has_an_exact_logarithm() -> None:
    from triton.language.extra.cuda import libdevice

    assert callable(libdevice.log)


def test_triton_says_what_it_specializes_for() -> None:
    from triton._C.libtriton import native_specialize_impl
    from triton.backends.compiler import BaseBackend, GPUTarget
    from triton.runtime.interpreter import InterpretedFunction

    seen = [native_specialize_impl(BaseBackend, value, False, True, True) for value in (16, 17)]
    assert seen[0] != seen[1], "a multiple of 16"
    assert hasattr(InterpretedFunction, "run") and GPUTarget("cuda", 80, 32)


# ---- the list is complete --------------------------------------------------------------------


def python_files() -> list[Path]:
    found = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
    return [path for path in found if path != Path(__file__)]


def is_foreign(module: str) -> bool:
    top = module.split(".")[0]
    return top not in PACKAGES and top not in sys.stdlib_module_names and find_spec(top) is not None


def is_private(name: str) -> bool:
    return name.startswith("_") and name[1:2].islower()


def private_names(tree: ast.Module) -> Iterator[str]:
    """Private names that are imported from a library, read from it, or passed to a call."""
    roots = {a.asname or a.name.split(".")[0]: a.name for a in imports(tree) if is_foreign(a.name)}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and is_foreign(node.module or ""):
            names = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
            yield from filter(is_private, names)
        elif isinstance(node, ast.Attribute) and is_private(node.attr):
            if root(node) in roots:
                yield node.attr
        elif isinstance(node, ast.keyword) and is_private(node.arg or ""):
            yield node.arg or ""


def imports(tree: ast.Module) -> Iterator[ast.alias]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from node.names


def root(node: ast.expr) -> str:
    while isinstance(node, ast.Attribute):
        node = node.value
    return node.id if isinstance(node, ast.Name) else ""


def test_every_private_name_is_listed() -> None:
    unlisted = [
        f"{path.relative_to(ROOT)}: {name}"
        for path in python_files()
        for name in private_names(ast.parse(path.read_text()))
        if not re.search(rf"\b{name}\b", PAGE)
    ]
    assert unlisted == [], "docs/private-apis.md must name them, with a test here"


def test_the_search_finds_each_kind_of_use() -> None:
    source = "import torch\nfrom ray._a import _b\ntorch.x._c(_d=1)\nself._e\ntorch.__f__"
    assert sorted(private_names(ast.parse(source))) == ["_a", "_b", "_c", "_d"]

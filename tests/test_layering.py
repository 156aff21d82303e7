"""Who may import what. The floors hold for every import statement, and for the simulator's path
also for everything that such an import pulls in."""

import ast
import subprocess
import sys
from collections.abc import Iterable
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OURS = ("engine", "adapter_store", "deployments", "reef")

MANIFEST = ("adapter_store.layout", "adapter_store.errors")
# What every backend may import: nothing of another backend
SHARED = (
    "engine.announcer",
    "engine.backends.kv_cache",
    "engine.backends.loaded",
    "engine.backends.row_outputs",
    "engine.backends.rows",
    "engine.backends.runner",
    "engine.backends.sampler",
    "engine.backends.sync_runner",
    "engine.config",
    "engine.lora",
    "engine.messages",
    "engine.model",
    "engine.scheduler",
    "engine.settle",
    "engine.sizes",
)
# What the engine knows of its backends
SEAM = (
    "engine.backends.load",
    "engine.backends.loaded",
    "engine.backends.needs",
    "engine.backends.runner",
)

# package: what of ours it may import; the longest matching package decides
FLOORS = {
    "engine.scheduler": ("engine.scheduler",),
    "adapter_store": ("adapter_store",),
    "deployments.policy": ("deployments.policy",),
    "deployments.simulator": (
        "deployments.policy",
        "deployments.simulator",
        "deployments.strict_yaml",
        "engine.figure",
        "engine.scheduler",
    ),
    "engine.announcer": (),
    "engine.figure": (),
    "engine.model": ("engine.announcer", "engine.model"),
    "engine.lora": (
        "engine.lora",
        "engine.messages",
        "engine.model",
        "engine.scheduler.popularity",
        *MANIFEST,
    ),
    "engine.sizes": ("engine.model",),
    "engine.settle": ("engine.config", "engine.model"),
    "engine.plan": (
        "engine.byte_size",
        "engine.figure",
        "engine.model",
        "engine.plan",
        "engine.sizes",
    ),
    "engine.backends": SHARED,
    "engine.backends.torch": (*SHARED, "engine.backends.torch"),
    "engine.backends.native": (*SHARED, "engine.backends.native"),
    "engine.backends.cuda": (*SHARED, "engine.backends.cuda"),
    "engine.backends.load": (*SHARED, "engine.backends"),
    "engine.backends.needs": (*SHARED, "engine.backends"),
    "engine": (
        *(f"engine.{p.stem}" for p in (ROOT / "engine").iterdir() if p.stem != "backends"),
        *SEAM,
        *MANIFEST,
    ),
    "deployments": ("engine", "adapter_store", "deployments"),
    "reef": OURS,
}
# Within deployments, what knows neither HTTP nor Ray.
NO_HTTP = (
    "deployments.text",
    "deployments.fleet",
    "deployments.replica",
    "deployments.tenants",
    "deployments.usage",
    "deployments.simulator",
)
NO_RAY = (
    "deployments.text",
    "deployments.tenants",
    "deployments.usage",
    "deployments.policy",
    "deployments.simulator",
)
STDLIB_ONLY = ("engine.scheduler", "deployments.policy")
NO_TORCH = (
    "adapter_store",
    "deployments",
    "reef",
    "engine.announcer",
    "engine.client",
    "engine.liveness",
    "engine.process_handle",
    "engine.process_usage",
    "engine.messages",
    "engine.config",
    "engine.grammar.channel",
    "engine.grammar.checker",
    "engine.grammar.mask_memory",
    "engine.grammar.matchers",
    "engine.grammar.messages",
    "engine.grammar.process",
)
RAY_ONLY_IN = "deployments"


@cache
def modules() -> dict[str, Path]:
    found: dict[str, Path] = {}
    for package in OURS:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(p for p in parts if p != "__init__")] = path
    return found


def imports_of(path: Path) -> list[str]:
    """All of them, also those inside functions."""
    return imported_by(path, ast.walk(ast.parse(path.read_text())))


def imported_by(path: Path, nodes: Iterable[ast.AST]) -> list[str]:
    """`from package import name` is of package.name where that is a module of ours."""
    ours, names = modules(), list[str]()
    for node in nodes:
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{path}: relative import"
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            names += [name if name in ours else node.module for name in inner]
    return names


def needed_at_import(path: Path) -> list[str]:
    """What importing the module imports: nothing that waits in a function or for a type checker."""
    waiting: list[ast.AST] = list(ast.parse(path.read_text()).body)
    nodes: list[ast.AST] = []
    while waiting:
        node = waiting.pop()
        nodes.append(node)
        is_typing = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        if not is_typing and not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            waiting += ast.iter_child_nodes(node)
    return imported_by(path, nodes)


def is_in(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


def is_in_any(module: str, packages: Iterable[str]) -> bool:
    return any(is_in(module, package) for package in packages)


def floor_of(module: str) -> str:
    return max((p for p in FLOORS if is_in(module, p)), key=len)


@pytest.mark.parametrize("module", modules())
def test_imports_stay_on_their_floor(module: str) -> None:
    floor = floor_of(module)
    for name in imports_of(modules()[module]):
        top = name.split(".")[0]
        if top in OURS:
            assert any(is_in(name, allowed) for allowed in FLOORS[floor]), f"{module}: {name}"
        elif floor in STDLIB_ONLY:
            assert top in sys.stdlib_module_names, f"{module} imports {name}"
        if top == "ray":
            assert floor == RAY_ONLY_IN, f"{module} imports ray"
        if top == "torch":
            assert not any(is_in(module, p) for p in NO_TORCH), f"{module} imports torch"


@pytest.mark.parametrize("module", [m for m in modules() if is_in_any(m, NO_HTTP)])
def test_only_the_ingress_knows_http(module: str) -> None:
    for name in imports_of(modules()[module]):
        assert name.split(".")[0] not in ("starlette", "http"), f"{module} imports {name}"
        assert not is_in(name, "deployments.ingress"), f"{module} imports {name}"


@pytest.mark.parametrize("module", [m for m in modules() if is_in_any(m, NO_RAY)])
def test_text_tenants_and_policies_do_not_know_ray(module: str) -> None:
    assert not any(is_in(name, "ray") for name in imports_of(modules()[module]))


def test_no_module_is_part_of_an_import_circle() -> None:
    graph = {
        module: [name for name in needed_at_import(path) if name in modules() and name != module]
        for module, path in modules().items()
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" <- ".join(error.args[1]))


@pytest.mark.parametrize("package", STDLIB_ONLY)
def test_importing_the_simulators_path_pulls_in_nothing_else(package: str) -> None:
    """Transitively: an import that is allowed must not drag a forbidden one along."""
    names = [m for m in modules() if is_in(m, package)]
    script = (
        "import sys; before = set(sys.modules)\n"
        + "".join(f"import {name}\n" for name in names)
        + "print(*{m.split('.')[0] for m in set(sys.modules) - before})"
    )
    result = subprocess.run(
        [sys.executable, "-S", "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert set(result.stdout.split()) <= set(sys.stdlib_module_names) | {package.split(".")[0]}


@pytest.mark.parametrize(
    "module", ["engine.client", "adapter_store.store", "adapter_store.manifest"]
)
def test_importing_for_the_serving_plane_leaves_torch_out(module: str) -> None:
    script = f"import sys, {module}; print('torch' in sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "False"


@pytest.mark.parametrize("package", [p for p in modules() if modules()[p].name == "__init__.py"])
def test_package_files_hold_a_docstring_and_nothing_else(package: str) -> None:
    body = ast.parse(modules()[package].read_text()).body
    if package == "reef":  # and the version, where people look for it
        assert ast.unparse(body.pop()) == "__version__ = version('reef')"
        assert isinstance(body.pop(), ast.ImportFrom)
    assert len(body) == 1 and isinstance(body[0], ast.Expr)

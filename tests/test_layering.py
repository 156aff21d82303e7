"""Who may import what. The floors hold for every import statement, and for the simulator's path
also for everything that such an import pulls in."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OURS = ("engine", "adapter_store", "deployments", "reef")

# package: what of ours it may import; the longest matching package decides
FLOORS = {
    "engine.scheduler": ("engine.scheduler",),
    "adapter_store": ("adapter_store",),
    "deployments.policy": ("deployments.policy",),
    "engine": ("engine", "adapter_store.manifest", "adapter_store.errors"),
    "deployments": ("engine", "adapter_store", "deployments"),
    "reef": OURS,
}
STDLIB_ONLY = ("engine.scheduler", "deployments.policy")
NO_TORCH = (
    "adapter_store",
    "deployments",
    "reef",
    "engine.client",
    "engine.messages",
    "engine.config",
)
RAY_ONLY_IN = "deployments"


def modules() -> dict[str, Path]:
    found: dict[str, Path] = {}
    for package in OURS:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(p for p in parts if p != "__init__")] = path
    return found


def imports_of(path: Path) -> list[str]:
    names: list[str] = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.append(node.module or "")
    return names


def is_in(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


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

"""Compiles Triton kernels for GPUs that need not be present, and reports figures of the code.

    python -m tests.engine.cuda.aot [word]     one JSON line for each case that has the word

Runs as a separate process: a kernel that was imported for the interpreter cannot be compiled.
"""

import importlib
import json
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ARCHITECTURES = (80, 90)
# Per program. An sm_80 has 163 KiB; sm_86 and sm_89, which get the same code, have less.
MAX_SHARED_BYTES = {80: 99 * 1024, 90: 227 * 1024}
MAX_REGISTERS = 64 * 1024  # per multiprocessor


@dataclass(frozen=True)
class AotCase:
    """One specialization of one kernel, and limits on its compiled code.

    `signature` gives Triton's type of every argument in order, "constexpr" for constants; those
    in `divisible` are multiples of 16, as the launcher guarantees.
    """

    name: str
    kernel: str  # module:function
    signature: dict[str, str]
    constants: dict[str, Any]
    divisible: tuple[str, ...] = ()
    num_warps: int = 4
    num_stages: int = 3
    max_registers: int = 255
    allow_scalar_loads: bool = False  # 2-byte loads from global memory
    needs: tuple[str, ...] = ()  # words that the sm_90 PTX must contain, such as cp.async


@dataclass(frozen=True)
class Compiled:
    name: str
    architecture: int
    registers: int
    stack_bytes: int  # local memory: spills, and arrays indexed at run time
    shared_bytes: int
    scalar_loads: int  # 2-byte loads from global memory
    wide_loads: int  # 16-byte loads and asynchronous copies
    missing: list[str] = field(default_factory=list)  # words of `needs` that are absent


def all_cases() -> list[AotCase]:
    """Collect CASES of every module of this package named aot_*."""
    import tests.engine.cuda as package

    names = [m.name for m in pkgutil.iter_modules(package.__path__) if m.name.startswith("aot_")]
    modules = [importlib.import_module(f"{package.__name__}.{name}") for name in sorted(names)]
    return [case for module in modules for case in module.CASES]


def compile_case(case: AotCase, architecture: int) -> Compiled:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module, function = case.kernel.split(":")
    kernel = getattr(importlib.import_module(module), function)
    places = {name: i for i, name in enumerate(case.signature)}
    source = ASTSource(
        fn=kernel,
        signature=case.signature,
        constexprs=case.constants,
        attrs={(places[name],): [["tt.divisibility", 16]] for name in case.divisible},
    )
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    ptx: str = compiled.asm["ptx"]
    usage = _resource_usage(compiled.asm["cubin"])
    return Compiled(
        name=case.name,
        architecture=architecture,
        registers=usage["REG"],
        stack_bytes=usage["STACK"] + usage["LOCAL"],
        shared_bytes=compiled.metadata.shared,
        scalar_loads=len(re.findall(r"ld\.global(?:\.\w+)*\.b16\b(?!\.)", ptx)),
        wide_loads=len(re.findall(r"cp\.async\.c[ga]\.shared|ld\.global(?:\.\w+)*\.v4", ptx)),
        missing=[word for word in case.needs if architecture == 90 and word not in ptx],
    )


def _resource_usage(cubin: bytes) -> dict[str, int]:
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}


def run_all(word: str = "") -> list[Compiled]:
    """Compile every case for every architecture, in another process."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", __name__, word]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    return [Compiled(**json.loads(line)) for line in done.stdout.splitlines()]


def main() -> None:
    word = sys.argv[1] if len(sys.argv) > 1 else ""
    for case in all_cases():
        if word in case.name:
            for architecture in ARCHITECTURES:
                print(json.dumps(asdict(compile_case(case, architecture))), flush=True)


if __name__ == "__main__":
    main()

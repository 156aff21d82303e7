"""The GPU engine measured: every part beside its roofline and its goal, in one table.

    python -m tests.bench.gpu --parts attention linears --rows rows.txt     on a CUDA device
    TRITON_INTERPRET=1 python -m tests.bench.gpu --tiny                     here: does it run?

Random weights of Llama-3-8B's shape, made on the device. `check` runs the tests that need a GPU.
Each part takes less than ten minutes.
"""

import argparse
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch

from tests.bench import gpu_kernels, gpu_peft, gpu_steps
from tests.bench.environment import ROOT, append_row, header
from tests.bench.gpu_kernels import Setting
from tests.bench.gpu_model import LLAMA_8B, TINY
from tests.bench.gpu_report import Part, Row, report, table
from tests.bench.gpu_roofline import measure


def main() -> None:
    options = _parse()
    is_tiny: bool = options.tiny
    device = torch.device("cpu" if is_tiny else "cuda")
    roofline = measure(device, tiny=is_tiny)
    shape = TINY if is_tiny else LLAMA_8B
    dtype = torch.float32 if is_tiny else torch.bfloat16
    setting = Setting(device, dtype, shape, roofline, is_tiny)
    parts = [part for part in _parts(setting) if part.name in options.parts]
    append_row(options.rows, f"{header(0)} | gpu | {shape.name} | {dtype} | {roofline}")
    rows = report(parts, options.rows, is_judged=not is_tiny)
    print(f"\n{table(rows)}")
    if any(row.note.startswith("failed") for row in rows):
        raise SystemExit(1)


def _parts(setting: Setting) -> list[Part]:
    kernels = {
        "attention": gpu_kernels.decode_attention,
        "prefill-attention": gpu_kernels.prefill_attention,
        "linears": gpu_kernels.linears,
        "adapters": gpu_kernels.adapters,
    }
    steps = {"bf16": "none", "nf4": "nf4", "fp8": "fp8"}
    return [
        Part("check", partial(_check, setting.tiny)),
        *(Part(name, partial(work, setting)) for name, work in kernels.items()),
        *(Part(name, partial(gpu_steps.decode, setting, form)) for name, form in steps.items()),
        Part("peft", partial(gpu_peft.beside_peft, setting)),
    ]


PARTS = (
    *("check", "attention", "prefill-attention", "linears", "adapters"),
    *("bf16", "nf4", "fp8", "peft"),
)


def _check(is_tiny: bool) -> Iterator[Row]:
    """The same engine tests that pass without a GPU, on one."""
    if is_tiny:
        yield Row("tests that need a GPU", None, "", note="not run: there is none")
        return
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests/engine"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    summary = done.stdout.strip().rpartition("\n")[2]
    if done.returncode:
        print(done.stdout[-8000:])
        raise RuntimeError(f"pytest -m gpu: {summary}")
    yield Row("tests that need a GPU", 0.0, "failures", note=summary)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, on the CPU")
    parser.add_argument("--rows", type=Path, help="append every row to this file, too")
    return parser.parse_args()


if __name__ == "__main__":
    main()

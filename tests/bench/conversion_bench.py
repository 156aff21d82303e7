"""Measures how long it takes to convert an upload of a given size, by its form.

    python -m tests.bench.conversion_bench --megabytes 100

Modules are 4096 x 4096, random, as many as make the size. Only the conversion is timed, with the
start of its process: not the checks and the copy of what comes out, which every upload pays.
"""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from adapter_store.bases import BaseModel
from adapter_store.conversion.options import ConversionOptions
from adapter_store.conversion.upload import converted_upload
from tests.bench.environment import append_row, header

SIZE = 4096
Shapes = Mapping[str, tuple[int, ...]]
# form: the tensors of one module, and the keys of the config
FORMS: Mapping[str, tuple[Shapes, Mapping[str, Any]]] = {
    "MLX": (
        {"lora_a": (SIZE, 16), "lora_b": (16, SIZE)},
        {"lora_parameters": {"scale": 20.0}},
    ),
    "LoHa, rank 8": (
        {f"hada_w{i}_{s}": (SIZE, 8) if s == "a" else (8, SIZE) for i in (1, 2) for s in "ab"},
        {"peft_type": "LOHA", "r": 8, "alpha": 8},
    ),
    "LoHa, rank 64": (
        {f"hada_w{i}_{s}": (SIZE, 64) if s == "a" else (64, SIZE) for i in (1, 2) for s in "ab"},
        {"peft_type": "LOHA", "r": 64, "alpha": 64},
    ),
    "LoKr, factor 8": (
        {"lokr_w1": (8, 8), "lokr_w2": (SIZE // 8, SIZE // 8)},
        {"peft_type": "LOKR", "r": 512, "alpha": 8},
    ),
    "OFT, blocks of 32": (
        {"oft_R.weight": (SIZE // 32, 32 * 31 // 2)},
        {"peft_type": "OFT", "oft_block_size": 32},
    ),
    "whole model": ({"weight": (SIZE, SIZE)}, {}),
}


def main() -> int:
    options = _parse()
    conditions = header(0)
    for form in options.forms or FORMS:
        with tempfile.TemporaryDirectory() as name:
            folder, num_modules = Path(name), write(Path(name), form, options.megabytes * 10**6)
            seconds, cpu_seconds = measure(folder, num_modules, options.lora_rank)
        append_row(
            options.rows,
            f"{conditions} | conversion | {form}, {num_modules} modules of {SIZE} x {SIZE}, "
            f"{options.megabytes} MB, rank {options.lora_rank} | "
            f"{seconds:.1f} s, {cpu_seconds:.1f} CPU s",
        )
    return 0


def write(folder: Path, form: str, nbytes: int) -> int:
    """Write an upload of about this size, and the base that it needs; return its modules."""
    shapes, config = FORMS[form]
    num_modules = round(nbytes / sum(4 * int(np.prod(shape)) for shape in shapes.values())) or 1
    random = np.random.default_rng(0)
    is_peft, is_model = "peft_type" in config, form == "whole model"
    tensors = {
        f"{'base_model.model.' if is_peft else ''}{_module(i)}.{part}": random.standard_normal(
            shape, dtype=np.float32
        )
        * np.float32(0.01)
        for i in range(num_modules)
        for part, shape in shapes.items()
    }
    (folder / "upload").mkdir()
    (folder / "base").mkdir()
    names = {"MLX": "adapters", "whole model": "model"}
    save_file(tensors, folder / "upload" / f"{names.get(form, 'adapter_model')}.safetensors")
    text = json.dumps({**config, "target_modules": ["q_proj"]})
    (folder / "upload" / ("config.json" if is_model else "adapter_config.json")).write_text(text)
    if is_model or config.get("peft_type") == "OFT":
        weight = random.standard_normal((SIZE, SIZE), dtype=np.float32).astype(np.float16)
        weights = {f"{_module(i)}.weight": weight for i in range(num_modules)}
        save_file(weights, folder / "base" / "model.safetensors")
        (folder / "base" / "config.json").write_text(text)
    return num_modules


def measure(folder: Path, num_modules: int, lora_rank: int) -> tuple[float, float]:
    """Convert the upload; return the seconds, and those of all processors together."""
    options = ConversionOptions(lora_rank, max_residual=0.999, base_folder=folder / "base")
    base = BaseModel("", {_module(i): (SIZE, SIZE) for i in range(num_modules)})
    start_s, start_cpu_s = time.perf_counter(), _cpu_s()
    with converted_upload(folder / "upload", base, options, folder / "scratch", lambda _: None):
        return time.perf_counter() - start_s, _cpu_s() - start_cpu_s


def _cpu_s() -> float:
    """Return the processor seconds of this process and of those that it has started."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def _module(number: int) -> str:
    return f"model.layers.{number}.self_attn.q_proj"


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--megabytes", type=int, default=100)
    parser.add_argument("--lora-rank", type=int, default=64)
    parser.add_argument("--forms", nargs="*", choices=list(FORMS))
    parser.add_argument("--rows", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    raise SystemExit(main())

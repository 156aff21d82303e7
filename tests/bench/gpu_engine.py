"""Measures the whole engine on a GPU: its start from a checkpoint, and steps with the scheduler.

python -m tests.bench.gpu_engine FOLDER [BYTES]    seconds until it can serve
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import torch
from safetensors.torch import save_file

from engine.config import EngineConfig
from engine.engine import Engine
from engine.messages import GenerateRequest
from engine.scheduler.request import SamplingParams
from tests.bench.environment import ROOT
from tests.bench.gpu_clock import release
from tests.bench.gpu_report import Goal, Row, attempt
from tests.bench.gpu_runner import SLEEP_CYCLES
from tests.bench.gpu_setting import Setting
from tests.bench.models import Shape, write_config

LAYERS_PER_FILE = 8
QUICK_BYTES = 2**31


def engine(setting: Setting) -> Iterator[Row]:
    """Write a checkpoint, whose pages are then in host memory, and measure start and steps."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        start = time.perf_counter()
        nbytes = write_checkpoint(setting, folder)
        took = time.perf_counter() - start
        release(setting.device)
        yield Row("checkpoint written", took, "s", note=f"{nbytes / 1e9:.2f} GB")
        yield from attempt("start", _starts(setting, folder), "9")
        yield from attempt("engine steps", _steps(setting, folder), "7")


def write_checkpoint(setting: Setting, folder: Path) -> int:
    """Write random weights to several files; returns their bytes."""
    write_config(setting.shape, folder)
    weight_map: dict[str, str] = {}
    total = 0
    for i, tensors in enumerate(_pieces(setting)):
        file = f"model-{i:05d}.safetensors"
        save_file({k: t.cpu() for k, t in tensors.items()}, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
        total += sum(t.nbytes for t in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def _pieces(setting: Setting) -> Iterator[dict[str, torch.Tensor]]:
    shape = setting.shape
    names = list(range(shape.num_layers))
    for first in range(0, shape.num_layers, LAYERS_PER_FILE):
        layers = names[first : first + LAYERS_PER_FILE]
        yield {k: t for layer in layers for k, t in _layer(setting, shape, layer).items()}
    size = shape.vocab_size, shape.hidden_size
    rest = {"model.embed_tokens.weight": _noise(setting, *size)}
    rest["model.norm.weight"] = _ones(setting, shape.hidden_size)
    if not shape.tied:
        rest["lm_head.weight"] = _noise(setting, *size)
    yield rest


def _layer(setting: Setting, shape: Shape, layer: int) -> dict[str, torch.Tensor]:
    prefix = f"model.layers.{layer}"
    tensors = {
        f"{prefix}.{module}.weight": _noise(setting, *size)
        for module, size in shape.linears.items()
    }
    if shape.qkv_bias:
        for module in ("q_proj", "k_proj", "v_proj"):
            rows, _ = shape.linears[f"self_attn.{module}"]
            tensors[f"{prefix}.self_attn.{module}.bias"] = _noise(setting, rows)
    for norm in ("input_layernorm", "post_attention_layernorm"):
        tensors[f"{prefix}.{norm}.weight"] = _ones(setting, shape.hidden_size)
    return tensors


def _noise(setting: Setting, *size: int) -> torch.Tensor:
    return setting.noise(*size).mul_(0.02).bfloat16()


def _ones(setting: Setting, size: int) -> torch.Tensor:
    return torch.ones(size, dtype=torch.bfloat16, device=setting.device)


# ==== start ====


def _starts(setting: Setting, folder: Path) -> Iterator[Row]:
    """Start twice: first without compiled kernels, then with those of the first start."""
    with TemporaryDirectory() as cache:
        for which in ("kernels to compile", "kernels compiled before"):
            start = time.perf_counter()
            done = subprocess.run(
                [sys.executable, "-m", "tests.bench.gpu_engine", str(folder), *_memory(setting)],
                cwd=ROOT,
                env=os.environ | {"TRITON_CACHE_DIR": cache},
                capture_output=True,
                text=True,
                timeout=240,
            )
            if done.returncode:
                raise RuntimeError(f"it ended with {done.returncode}: {done.stderr[-1500:]}")
            kernels, load_s = done.stdout.split()[-2], float(done.stdout.split()[-1])
            _check_kernels(kernels)
            took = time.perf_counter() - start
            goal = Goal(load_s, "a second", at_most=60.0, target="9")
            note = f"by {kernels}; with Python's and torch's own {took:.1f} s"
            yield Row(f"start from page cache, {which}", load_s, "s", goal, note)


def _check_kernels(kernels: str) -> None:
    """Raise if Triton kernels are not used: if they fail its test, the engine uses torch."""
    if _on_gpu() and kernels != "triton":
        raise RuntimeError(f"the engine computes with {kernels}: its log says why")


def _memory(setting: Setting) -> list[str]:
    """Limit the memory if other parts run concurrently; else the engine uses all."""
    return [] if setting.is_judged else [str(QUICK_BYTES)]


def config_of(folder: Path, rows: int, memory_bytes: int | None) -> EngineConfig:
    on_gpu = _on_gpu()
    return EngineConfig(
        source=str(folder),
        device="cuda" if on_gpu else "cpu",
        kernels="auto" if on_gpu else "torch",
        max_num_seqs=rows,
        max_num_batched_tokens=2048,
        memory_bytes=memory_bytes,
        enable_prefix_caching=False,
    )


# ==== steps ====


def _steps(setting: Setting, folder: Path) -> Iterator[Row]:
    """Compare the period of pure decode steps with the time that the device alone needs."""
    rows, context = setting.pick((256, 1024), (32, 64), (2, 8))
    made = Engine(config_of(folder, rows, None if setting.is_judged else QUICK_BYTES))
    try:
        _check_kernels(made.info.kernels)
        _fill(made, rows, context)
        step_s = median(_timed(made.step) for _ in range(setting.pick(80, 6, 3)))
        device_s = median(_device_s(made) for _ in range(9)) if _on_gpu() else float("nan")
    finally:
        made.close()
    bound = 0.05 if rows == 256 else None
    goal = Goal(step_s / device_s - 1, "the device's time of a step", at_most=bound, target="7")
    note = f"{rows / step_s:.0f} tokens/s; the device needs {device_s * 1e3:.2f} ms"
    yield Row(f"engine: decode x{rows}, base", step_s * 1e3, "ms", goal, note)


def _fill(made: Engine, rows: int, context: int) -> None:
    """Run until all requests decode, with many tokens left."""
    more = rows * context // 1024 + 200  # the first decode while the last prompts run
    sampling = SamplingParams(max_tokens=more, temperature=0.0, ignore_eos=True)
    for i in range(rows):
        prompt = [(7 * i + j) % 1000 + 3 for j in range(context)]
        made.add_request(GenerateRequest(f"r{i}", prompt, sampling))
    made.step()
    while made.scheduler.num_waiting or _is_filling(made, context):
        made.step()
    for _ in range(4):
        made.step()


def _is_filling(made: Engine, context: int) -> bool:
    return any(r.num_computed_tokens < context for r in made.scheduler.running)


def _timed(step: Callable[[], object]) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def _device_s(made: Engine) -> float:
    """Return the device's seconds of a step that is launched whole while the device sleeps."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    torch.cuda._sleep(SLEEP_CYCLES)
    start.record()
    made.step()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def _on_gpu() -> bool:
    return torch.cuda.is_available()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("memory_bytes", type=int, nargs="?")
    options = parser.parse_args()
    made = Engine(config_of(options.folder, 256, options.memory_bytes))
    made.close()
    print(made.info.kernels, made.info.load_s)


if __name__ == "__main__":
    main()

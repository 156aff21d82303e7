"""Measures the GPU engine: every part against its roofline and its goal, in one table.

    python -m tests.bench.gpu --quick                          on a GPU: does everything run?
    python -m tests.bench.gpu --parts bf16 --rows rows.jsonl   on a GPU: how fast?
    python -m tests.bench.gpu --profile bf16                   on a GPU: where a step's time goes
    python -m tests.bench.gpu --plan                           list parts, their targets and seconds
    TRITON_INTERPRET=1 python -m tests.bench.gpu --tiny        in the interpreter

Uses random weights of Llama-3-8B's shape, made on the device. Each part is a separate process, so
that a failed part does not affect the next. A part stops early when its seconds are over, and is
killed if it does not. A row is written to the file as soon as it is measured.
"""

import argparse
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from tests.bench import (
    gpu_adapters,
    gpu_attention,
    gpu_engine,
    gpu_kinds,
    gpu_linears,
    gpu_loading,
    gpu_peft,
    gpu_profile,
    gpu_steps,
)
from tests.bench.environment import ROOT, header
from tests.bench.gpu_clock import Budget, release
from tests.bench.gpu_model import LLAMA_8B, QUICK, TINY
from tests.bench.gpu_report import Row, Rows, attempt, missing, read_records, summary
from tests.bench.gpu_roofline import Roofline, measure, rows_of
from tests.bench.gpu_setting import Setting

GRACE_S = 45  # beyond a part's own seconds, before it is killed
LEAST_S = 25  # a part that would get less is not started
AT_ONCE = 8  # parts of a quick run that run concurrently


@dataclass(frozen=True, slots=True)
class Part:
    name: str
    seconds: int  # after which it starts no new measurement
    targets: str
    run: Callable[[Setting, argparse.Namespace], Iterable[Row]]


PARTS = (
    Part("roofline", 20, "", lambda s, _: rows_of(s.roofline, s.device)),
    Part("attention", 50, "5", lambda s, _: gpu_attention.decode_attention(s)),
    Part("prefill-attention", 60, "5", lambda s, _: gpu_attention.prefill_attention(s)),
    Part("adapters", 50, "2", lambda s, _: gpu_adapters.adapters(s)),
    Part("vllm-lora", 60, "6", lambda s, _: gpu_adapters.beside_vllm(s)),
    Part("bf16", 120, "1 2 3 7", lambda s, _: gpu_steps.decode(s, "none")),
    Part("kinds", 90, "2", lambda s, _: gpu_kinds.kinds(s)),
    Part("loading", 70, "8 9", lambda s, _: gpu_loading.loading(s)),
    Part("crossovers", 170, "4", lambda s, o: gpu_linears.fill_table(s, o.crossovers)),
    Part("linears", 70, "4", lambda s, _: gpu_linears.linears(s)),
    Part("nf4", 110, "1 2 3", lambda s, _: gpu_steps.decode(s, "nf4")),
    Part("fp8", 90, "2 3", lambda s, _: gpu_steps.decode(s, "fp8")),
    Part("engine", 190, "7 9", lambda s, _: gpu_engine.engine(s)),
    Part("peft", 100, "6", lambda s, _: gpu_peft.beside_peft(s)),
    Part("check", 180, "10", lambda s, _: _check(s)),
)
BY_NAME = {part.name: part for part in PARTS}


def main() -> None:
    options = _parse()
    if options.plan:
        print(_plan(options.parts))
    elif options.only:
        raise SystemExit(_run_here(options))
    elif options.profile:
        for table in gpu_profile.profile_steps(_setting(options), options.profile):
            print(f"{table}\n", flush=True)
    elif options.quick:
        raise SystemExit(_run_quick(options))
    else:
        raise SystemExit(_run_all(options))


def _plan(names: Iterable[str]) -> str:
    parts = [BY_NAME[name] for name in names]
    lines = [f"{p.name:18} {p.seconds:4} s   targets {p.targets or '-'}" for p in parts]
    total = sum(p.seconds for p in parts)
    return "\n".join([*lines, f"{'together at most':18} {total:4} s, each with its start"])


# ==== all parts, one process each ====


def _run_all(options: argparse.Namespace) -> int:
    end_s = time.monotonic() + options.seconds
    with TemporaryDirectory() as folder:
        file = options.rows or Path(folder) / "rows.jsonl"
        file.touch()
        first = file.stat().st_size
        failed = [name for name in options.parts if not _run_part(name, options, file, end_s)]
        new = Path(folder) / "new.jsonl"
        new.write_bytes(file.read_bytes()[first:])
        print(f"\n{summary(read_records([new]))}", flush=True)
    if failed:
        print(f"failed: {', '.join(failed)}", flush=True)
    return 1 if failed else 0


def _run_part(name: str, options: argparse.Namespace, file: Path, end_s: float) -> bool:
    left_s = end_s - time.monotonic()
    rows = Rows(file, _context(options), is_judged=not options.tiny)
    if left_s < LEAST_S:
        rows.add(name, missing(f"part {name}", f"no time left of {options.seconds:.0f} s"))
        return True
    budget_s = left_s - 10 if options.tiny else min(BY_NAME[name].seconds, left_s - 10)
    command = _command(name, options, file, budget_s, _measured(file))
    start = time.monotonic()
    print(f"\n==== {name}, at most {budget_s:.0f} s", flush=True)
    code = _run_process(command, min(budget_s + GRACE_S, left_s), None)
    print(f"==== {name} took {time.monotonic() - start:.0f} s", flush=True)
    if code is None or code not in (0, 1):  # 1: its own rows say what failed
        why = "ended: it took too long" if code is None else f"failed: it ended with {code}"
        rows.add(name, missing(f"part {name}", why))
    return code == 0


def _command(
    name: str, options: argparse.Namespace, file: Path | None, budget_s: float, roofline: str
) -> list[str]:
    command = [sys.executable, "-m", "tests.bench.gpu", "--only", name]
    command += ["--seconds", f"{budget_s:.0f}", "--commit", options.commit]
    command += ["--rows", str(file.resolve())] if file else []
    command += ["--roofline", roofline] if roofline else []
    command += ["--crossovers", str(options.crossovers.resolve())] if options.crossovers else []
    return command + [f"--{mode}" for mode in ("tiny", "quick") if getattr(options, mode)]


def _run_process(command: list[str], seconds: float, output: Path | None) -> int | None:
    """Return its exit status; None if it and its children had to be killed."""
    with open(output or os.devnull, "wb") as file:
        stream = file if output else None
        process = subprocess.Popen(command, cwd=ROOT, stdout=stream, stderr=stream, process_group=0)
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            _kill(process)
            process.wait()
            return None
        except BaseException:
            _kill(process)
            raise


def _kill(process: "subprocess.Popen[bytes]") -> None:
    """Kill it with its children. It was not waited for yet, so the group id is still its own."""
    os.killpg(process.pid, signal.SIGKILL)


def _measured(file: Path) -> str:
    """Return the rates that an earlier part wrote to the file; empty if there are none."""
    found = [r["roofline"] for r in read_records([file]) if r.get("part") == "roofline"]
    return ",".join(str(rate) for rate in found[-1]) if found else ""


# ==== one part, in this process ====


def _run_here(options: argparse.Namespace) -> int:
    setting = _setting(options)
    rates = setting.roofline.bytes_per_s, setting.roofline.flops_per_s
    context = _context(options) | {"shape": setting.shape.name, "roofline": rates}
    rows = Rows(options.rows, context, is_judged=setting.is_judged)
    part = BY_NAME[options.only]
    with torch.inference_mode():
        for row in attempt(f"part {part.name}", part.run(setting, options)):
            rows.add(part.name, row)
    if setting.budget.is_spent:
        rows.add(part.name, Row(f"seconds of {part.name}", options.seconds, "s", note="all spent"))
    return 1 if rows.has_failed else 0


def _setting(options: argparse.Namespace) -> Setting:
    device = torch.device("cpu" if options.tiny else "cuda")
    budget = Budget(1e9 if options.tiny else options.seconds)
    roofline = options.roofline or measure(device, small=options.tiny or options.quick)
    release(device)
    shape = TINY if options.tiny else QUICK if options.quick else LLAMA_8B
    dtype = torch.float32 if options.tiny else torch.bfloat16
    return Setting(device, dtype, shape, roofline, budget, options.tiny, options.quick)


def _context(options: argparse.Namespace) -> dict[str, Any]:
    """Describe the conditions of every row of this run."""
    on_gpu = torch.cuda.is_available()
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    for name in ("triton", "transformers", "peft", "bitsandbytes", "flashinfer-python"):
        with suppress(PackageNotFoundError):
            versions[name] = version(name)
    return {
        "commit": options.commit,
        "machine": torch.cuda.get_device_name() if on_gpu else platform.processor() or "CPU",
        "versions": versions,
        "model": "random weights of Llama-3-8B's shape",
        "seed": 0,
        "date": time.strftime("%Y-%m-%d"),
    }


def _check(setting: Setting) -> Iterator[Row]:
    """Run the engine tests that need a GPU."""
    if not setting.is_judged:
        yield missing("tests that need a GPU", "not run with the others")
        return
    command = [sys.executable, "-m", "pytest", "--tb=short", "-m", "gpu", "tests/engine"]
    done = subprocess.run(command, cwd=ROOT)
    if done.returncode:
        raise RuntimeError(f"pytest -m gpu ended with {done.returncode}")
    yield Row("tests that need a GPU", 0.0, "failures")


# ==== does everything run? ====


def _run_quick(options: argparse.Namespace) -> int:
    """Run parts concurrently, with two layers and few rounds; this compiles their kernels too."""
    failed: list[str] = []
    with TemporaryDirectory() as folder, ThreadPoolExecutor(AT_ONCE) as pool:
        names = [name for name in options.parts if name != "check"]
        made = {pool.submit(_quick_part, name, options, Path(folder)): name for name in names}
        for future in as_completed(made):
            text, is_fine = future.result()
            failed += [] if is_fine else [made[future]]
            print(text, flush=True)
    print(f"failed: {', '.join(failed)}" if failed else "every part runs", flush=True)
    return 1 if failed else 0


def _quick_part(name: str, options: argparse.Namespace, folder: Path) -> tuple[str, bool]:
    start, output = time.monotonic(), folder / f"{name}.txt"
    file = folder / f"{name}.jsonl"
    command = _command(name, options, file, options.seconds, "")
    code = _run_process(command, options.seconds, output)
    took = time.monotonic() - start
    records = read_records([file]) if file.exists() else []
    absent = [f"{r['row']}: {r['note']}" for r in records if r["value"] is None]
    text = f"quick {name}: {len(records)} rows, exit {code}, {took:.0f} s"
    text = "\n    not measured: ".join([text, *absent])
    if code != 0:
        tail = output.read_text(errors="replace").splitlines()[-25:]
        text = "\n    | ".join([text, *tail])
    return text, code == 0


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--parts", nargs="+", choices=list(BY_NAME), default=list(BY_NAME))
    parser.add_argument("--rows", type=Path, help="append every row to this file, as JSON")
    parser.add_argument("--seconds", type=float, default=570, help="of all parts together")
    parser.add_argument("--crossovers", type=Path, help="write the measured table here, too")
    parser.add_argument("--commit", default="", help="where this is no git checkout")
    parser.add_argument("--plan", action="store_true", help="print the parts, and run none")
    parser.add_argument("--profile", choices=list(gpu_profile.FORMS))
    modes = parser.add_mutually_exclusive_group()
    modes.add_argument("--tiny", action="store_true", help="tiny shapes, on the CPU")
    modes.add_argument("--quick", action="store_true", help="two layers, to see that all runs")
    parser.add_argument("--only", choices=list(BY_NAME), help=argparse.SUPPRESS)
    parser.add_argument("--roofline", type=_roofline, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.commit = options.commit or _commit()
    return options


def _commit() -> str:
    try:
        return header(0).partition(" | ")[0]
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def _roofline(text: str) -> Roofline:
    bytes_per_s, flops_per_s = text.split(",")
    return Roofline(float(bytes_per_s), float(flops_per_s))


if __name__ == "__main__":
    main()

"""Tests the reports of the GPU benchmark, of runs that fail and of runs that do not."""

import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from engine.backends.cuda.triton import crossovers
from tests.bench import gpu, gpu_clock, gpu_crossovers, gpu_linears, gpu_vllm_lora
from tests.bench.gpu_report import Goal, Row, Rows, as_record, attempt, read_records, summary


def row(name: str, share: float, target: str = "1") -> Row:
    return Row(name, share, "ms", Goal(share, "the roofline", at_least=0.7, target=target))


# ==== rows ====


@pytest.mark.parametrize(
    ("share", "is_met"), [(0.7, True), (0.71, True), (0.69, False), (math.nan, False)]
)
def test_a_goal_is_met_from_its_bound_on(share: float, is_met: bool) -> None:
    assert Goal(share, "x", at_least=0.7).is_met == is_met
    assert Goal(-share, "x", at_most=-0.7).is_met == is_met


def test_each_row_is_in_the_file_before_the_next_is_measured(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    rows = Rows(file, {"commit": "abc", "machine": "card"}, is_judged=True)

    def measuring() -> Iterator[Row]:
        yield row("first", 0.9)
        assert [r["row"] for r in read_records([file])] == ["first"]
        raise ValueError("broken\nin two lines")

    for made in attempt("part", measuring(), "1"):
        rows.add("part", made)
    first, failed = read_records([file])
    assert (first["met"], first["commit"], first["machine"]) == (True, "abc", "card")
    assert failed["value"] is None and failed["target"] == "1"
    assert failed["note"] == "failed: ValueError: broken in two lines"
    assert rows.has_failed


def test_no_number_is_no_measurement(tmp_path: Path) -> None:
    rows = Rows(tmp_path / "rows.jsonl", {}, is_judged=True)
    rows.add("part", row("unknown", math.nan))
    text = (tmp_path / "rows.jsonl").read_text()
    assert "NaN" not in text
    assert json.loads(text)["value"] is None


def test_speed_in_the_interpreter_is_not_judged() -> None:
    assert "met" not in as_record("part", row("slow", 0.1), is_judged=False)


def test_a_row_counts_as_it_was_measured_last(tmp_path: Path) -> None:
    a, b = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    Rows(a, {}, is_judged=True).add("part", row("x", 0.1))
    Rows(b, {}, is_judged=True).add("part", row("x", 0.9))
    b.write_text(b.read_text() + '{"part": "part", "row": "half')
    assert [r["share"] for r in read_records([a, b])] == [0.9]


def test_a_summary_says_the_worst_first_and_is_never_too_long() -> None:
    made = [row(f"good {i}", 0.8) for i in range(500)] + [row("bad", 0.2)]
    text = summary([as_record("part", r, is_judged=True) for r in made], most=4000)
    assert len(text) <= 4000
    lines = text.splitlines()
    assert lines[0].startswith("target 1 | MISSED | 500 met, 1 missed")
    assert lines[9] == "MISSED | 1 bad | 0.2 ms | 0.200 of the roofline (>= 0.7)"
    assert lines[-1].startswith("... and ")


# ==== parts ====


def test_a_process_that_hangs_is_ended() -> None:
    assert gpu._run_process([sys.executable, "-c", "while True: pass"], 0.5, None) is None
    assert gpu._run_process([sys.executable, "-c", "raise SystemExit(3)"], 30, None) == 3


def test_a_part_that_dies_leaves_a_row_and_the_next_one_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "rows.jsonl"
    arguments = ["gpu", "--tiny", "--commit", "abc", "--rows", str(file)]
    monkeypatch.setattr(sys, "argv", [*arguments, "--parts", "fp8", "roofline"])
    options, command = gpu._parse(), gpu._command
    dying = [sys.executable, "-c", "import os; os.abort()"]
    monkeypatch.setattr(gpu, "_command", lambda n, *a: dying if n == "fp8" else command(n, *a))
    assert gpu._run_all(options) == 1
    died, copy, multiply = read_records([file])
    assert died["row"] == "part fp8" and "ended with -6" in died["note"]
    assert copy["row"] == "copy bandwidth" and copy["value"] > 0 and multiply["unit"] == "TFLOP/s"
    assert {r["commit"] for r in (died, copy, multiply)} == {"abc"}
    assert "failed: fp8" in capfd.readouterr().out


def test_a_quick_run_says_what_does_not_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    parts = ["roofline", "fp8", "check"]
    monkeypatch.setattr(sys, "argv", ["gpu", "--tiny", "--commit", "abc", "--parts", *parts])
    programs = {"fp8": "print('cannot compile'); raise SystemExit(1)", "roofline": ""}
    monkeypatch.setattr(gpu, "_command", lambda n, *a: [sys.executable, "-c", programs[n]])
    assert gpu._run_quick(gpu._parse()) == 1
    text = capsys.readouterr().out
    assert "quick fp8: 0 rows, exit 1" in text and "    | cannot compile" in text
    assert "quick roofline: 0 rows, exit 0" in text
    assert text.endswith("failed: fp8\n")


def test_a_later_part_gets_the_rates_that_were_measured(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    Rows(file, {"roofline": (4e12, 7e14)}, is_judged=True).add("roofline", row("copy", 1.0))
    assert gpu._measured(file) == "4000000000000.0,700000000000000.0"
    assert str(gpu._roofline(gpu._measured(file))) == "4000 GB/s, 700.0 TFLOP/s"


# ==== times ====


def test_what_is_compared_takes_turns() -> None:
    calls: list[str] = []
    works = {name: (lambda name=name: calls.append(name)) for name in "ab"}
    gpu_clock.medians_s(works, torch.device("cpu"), rounds=3, warmup=1)
    assert "".join(calls) == "ab" + "ababab"


# ==== the table that the dispatcher reads ====


def test_the_dispatcher_reads_what_was_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = tmp_path / "crossovers.json"
    table.write_text('{"devices": {"other": []}}')
    monkeypatch.setattr(crossovers, "TABLE", table)
    tiles = crossovers.GemmTiles(16, 128, 4, 4, split_k=2)
    fastest = [
        crossovers.Choice(4, "bitsandbytes"),
        crossovers.Choice(8, "fused", tiles),
        crossovers.Choice(16, "fused", tiles),
        crossovers.Choice(256, "dequantize"),
    ]
    found = [gpu_crossovers.Found(choice, 1e-6, {}) for choice in fastest]
    made = gpu_crossovers.entry("nf4", 6144, 4096, found)
    gpu_linears.write_table("card", [made], tmp_path / "copy.json")
    shape = crossovers.Shape("nf4", 6144, 4096)
    read = crossovers.choices_for(shape, 64, "card", 132, table=tmp_path / "copy.json")
    assert read == (fastest[0], fastest[2], crossovers.Choice(None, "dequantize"))
    assert "other" in json.loads(table.read_text())["devices"]


# ==== vLLM's kernels ====

KERNELS = {
    "lora_shrink_op": "lora_shrink",
    "lora_expand_op": "lora_expand",
    "lora_kernel_metadata": "LoRAKernelMeta",
}


@pytest.fixture
def fresh_modules(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with monkeypatch.context() as patch:
        patch.setattr(sys, "modules", sys.modules.copy())
        gpu_vllm_lora.load_kernels.cache_clear()
        yield
    gpu_vllm_lora.load_kernels.cache_clear()


def vllm_package(folder: Path) -> None:
    """Make a package that cannot be imported here, with kernels that import from it."""
    ops = folder / "vllm" / "lora" / "ops" / "triton_ops"
    ops.mkdir(parents=True)
    for package in (folder / "vllm", ops.parent, ops):
        (package / "__init__.py").write_text("raise ImportError('compiled code is missing')")
    (folder / "vllm" / "envs.py").write_text("DUAL = False")
    for file, name in KERNELS.items():
        text = (
            "from vllm import envs\n"
            "from vllm.logger import init_logger\n"
            "from vllm.platforms import current_platform\n"
            "from vllm.triton_utils import tl, triton\n"
            "from vllm.utils.torch_utils import async_tensor_h2d, direct_register_custom_op\n"
            f"def _{name}(): return {name!r}, envs.DUAL\n"
            "try:\n    direct_register_custom_op(op_name='x')\n"
            f"except AttributeError:\n    {name} = _{name}\n"
        )
        (ops / f"{file}.py").write_text(text)


def test_kernels_are_loaded_without_the_package_around_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fresh_modules: None
) -> None:
    vllm_package(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    kernels = gpu_vllm_lora.load_kernels()
    assert kernels.shrink() == ("lora_shrink", False)
    assert kernels.expand() == ("lora_expand", False)


def test_without_vllm_the_reason_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fresh_modules: None
) -> None:
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(gpu_vllm_lora.Unavailable, match="not on the path"):
        gpu_vllm_lora.load_kernels()

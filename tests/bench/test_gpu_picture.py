"""Tests the picture of decode steps, from rows of real steps in the interpreter."""

import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

from tests.bench import gpu_picture
from tests.bench.gpu_clock import Budget
from tests.bench.gpu_model import TINY
from tests.bench.gpu_report import Rows, read_records
from tests.bench.gpu_roofline import Roofline
from tests.bench.gpu_runner import RANK, Bench
from tests.bench.gpu_setting import Setting
from tests.bench.gpu_steps import decode_rows

SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    device, roofline = torch.device("cpu"), Roofline(1e6, 1e12)  # so slow that the floor is visible
    setting = Setting(device, torch.float32, TINY, roofline, Budget(1e9), tiny=True)
    file = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    with torch.inference_mode():
        bench = Bench(setting, "none")
        lane = bench.lane(1)
        lane.load([RANK])
        written = Rows(file, {"machine": "a <card>"}, is_judged=False)
        for row in decode_rows(bench, lane, "none", 1):
            written.add("bf16", row)
    return file


def test_a_bar_is_as_high_as_its_step_was_long(rows: Path) -> None:
    (record,) = [r for r in read_records([rows]) if r["row"] == "none: decode x1, distinct"]
    (bar,) = gpu_picture.bars_of(read_records([rows]))
    assert (bar.batch, bar.step_ms) == (1, record["value"])
    floor = {name: record["numbers"][name] for name in ("weights_ms", "kv_ms", "lora_ms")}
    assert all(milliseconds > 0 for milliseconds in floor.values())
    longer = gpu_picture.Bar("nf4", 2, floor, 3 * sum(floor.values()))
    root = ElementTree.fromstring(gpu_picture.draw([longer], ""))
    heights = [float(r.attrib["height"]) for r in root.iter(f"{SVG}rect")][-4:]
    assert sum(heights) == pytest.approx(gpu_picture.HEIGHT, abs=0.5)
    assert heights[3] == pytest.approx(gpu_picture.HEIGHT * 2 / 3, abs=0.5)
    assert heights[0] / sum(heights[:3]) == pytest.approx(
        floor["weights_ms"] / sum(floor.values()), abs=0.01
    )


@pytest.mark.parametrize("highest", [0.3, 1.0, 8.9, 9.1, 24.7, 99.9, 1234.5])
def test_the_axis_has_round_numbers(highest: float) -> None:
    ticks = gpu_picture._ticks(highest)
    assert ticks[0] == 0 and ticks[-1] <= highest < ticks[-1] + 1.001 * ticks[1]
    assert 4 <= len(ticks) <= 9


def test_the_command_writes_a_picture_for_light_and_dark(
    rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    picture = tmp_path / "steps.svg"
    monkeypatch.setattr(sys, "argv", ["gpu_picture", str(rows), "-o", str(picture)])
    gpu_picture.main()
    text = picture.read_text()
    ElementTree.fromstring(text)
    assert "prefers-color-scheme:dark" in text and "a &lt;card&gt;" in text


def test_rows_without_steps_are_no_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    empty = tmp_path / "rows.jsonl"
    empty.touch()
    arguments = ["gpu_picture", str(empty), "-o", str(tmp_path / "x.svg")]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit, match="no row of a decode step"):
        gpu_picture.main()
    assert not (tmp_path / "x.svg").exists()

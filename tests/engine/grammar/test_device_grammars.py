"""Grammars on the DeviceRunner, which launches a step before it knows the last one's tokens."""

from collections.abc import Callable
from pathlib import Path

import pytest

from engine.backends.cuda.forward import StepLimits
from engine.engine import Engine
from engine.messages import AdapterFolder
from tests.engine.cuda.test_device_engine import late_device
from tests.engine.grammar.test_grammar_engine import mixed
from tests.engine.support.driver import make_engine, texts, write_mixed_adapters
from tests.engine.support.grammars import run_all

MAX_MODEL_LEN = 512


@pytest.fixture
def adapters(byte_folder: Path, tmp_path: Path) -> list[AdapterFolder]:
    return write_mixed_adapters(byte_folder, tmp_path)


@pytest.fixture
def on_device(byte_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], Engine]:
    def make(uses_graphs: bool) -> Engine:
        limits = StepLimits(16, 64, MAX_MODEL_LEN, 4)
        with late_device(monkeypatch, limits, 2**23, uses_graphs):
            return make_engine(byte_folder, memory_bytes=2**23, max_model_len=MAX_MODEL_LEN)

    return make


@pytest.mark.parametrize("uses_graphs", [True, False], ids=["graphs", "eager"])
def test_outputs_are_those_of_the_engine_without_pipelining(
    on_device: Callable[[bool], Engine],
    byte_folder: Path,
    adapters: list[AdapterFolder],
    uses_graphs: bool,
) -> None:
    plain = make_engine(byte_folder, max_model_len=MAX_MODEL_LEN)
    expected = texts(run_all(plain, mixed(adapters)))
    plain.close()
    engine = on_device(uses_graphs)
    assert engine.runner.pipeline_depth == 1
    assert texts(run_all(engine, mixed(adapters))) == expected
    engine.close()

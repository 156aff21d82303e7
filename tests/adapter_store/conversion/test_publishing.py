"""`reef publish --convert` stores what a conversion made, and what it missed."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from adapter_store.bases import BaseModel
from adapter_store.conversion.options import ConversionOptions
from adapter_store.layout import WEIGHTS_NAME
from adapter_store.manifest import parse_manifest
from adapter_store.store import AdapterStore
from reef.__main__ import main
from tests.adapter_store.adapters import changed
from tests.adapter_store.conversion.test_methods import train


@pytest.fixture(scope="module")
def lokr_folder(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lokr")
    train(folder, base_folder, "LoKr", r=4)
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")
    return folder


@pytest.fixture
def call(
    tmp_path: Path, base_folder: Path, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    root = ["--root", f"file://{tmp_path}/store", "--cache", f"{tmp_path}/cache"]

    def run(folder: Path, *options: str) -> tuple[int, str, str]:
        arguments = ["publish", str(folder), "--name", "a", "--base", str(base_folder)]
        code = main([*arguments, *options, *root])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def test_what_was_converted_is_published_with_its_residuals(
    call: Callable[..., tuple[int, str, str]], lokr_folder: Path, tmp_path: Path
) -> None:
    options = ("--convert", "--convert-rank", "12", "--max-residual", "0.9")
    code, line, notes = call(lokr_folder, *options)
    assert code == 0 and line.startswith("published public/a@1 as ")
    assert "converted from LOKR at rank 12; factors miss 0." in notes
    assert call(lokr_folder, *options)[1] == line  # the same numbers each time
    store = AdapterStore(f"file://{tmp_path}/store", tmp_path / "cache", 2**20)
    manifest = store.manifest(store.resolve("public", "a"))
    assert manifest.conversion is not None and manifest.conversion.source == "LOKR"
    assert set(manifest.conversion.residuals) == set(manifest.modules)
    assert 0 < manifest.conversion.max_residual < 0.9
    assert parse_manifest(manifest.to_json(), manifest.digest) == manifest
    folder = store.ensure_local(manifest.digest)
    assert len(load_file(folder / WEIGHTS_NAME)) == 2 * len(manifest.modules) == 12
    assert store.own_files(manifest.digest).template is not None
    assert list((tmp_path / "cache" / ".uploads").iterdir()) == []


def test_a_residual_above_the_limit_is_refused(
    call: Callable[..., tuple[int, str, str]], lokr_folder: Path
) -> None:
    code, out, err = call(lokr_folder, "--convert", "--convert-rank", "2")
    assert (code, out) == (2, "") and "factors of rank 2 miss 0." in err and "0.05 is" in err


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ((), "peft_type='LOKR' is not served, only 'LORA'; --convert"),
        (("--convert-rank", "8"), "need --convert"),
        (("--convert", "--convert-rank", "0"), "the rank must be in 1..1024"),
        (("--convert", "--max-residual", "1"), r"the largest residual must be in [0, 1)"),
    ],
)
def test_wrong_options_are_refused(
    options: tuple[str, ...],
    reason: str,
    call: Callable[..., tuple[int, str, str]],
    lokr_folder: Path,
) -> None:
    code, out, err = call(lokr_folder, *options)
    assert (code, out) == (2, "") and reason in err


def test_a_small_file_that_stands_for_a_huge_matrix_is_refused(
    call: Callable[..., tuple[int, str, str]], lokr_folder: Path, tmp_path: Path
) -> None:
    huge = np.ones((2**18, 1), np.float32)

    def widen(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        name = next(name for name in tensors if name.endswith("lokr_w2"))
        del tensors[name]
        return tensors | {f"{name}_a": huge, f"{name}_b": np.ascontiguousarray(huge.T)}

    folder = changed(lokr_folder, tmp_path / "huge", {"r": 1, "rank_pattern": {}}, widen)
    code, out, err = call(folder, "--convert")
    assert (code, out) == (2, "") and "needs more memory than" in err


def test_a_peft_lora_folder_is_published_as_it_is(
    call: Callable[..., tuple[int, str, str]], peft_folder: Path
) -> None:
    code, line, notes = call(peft_folder, "--convert")
    assert code == 0 and "nothing was converted" in notes
    assert call(peft_folder)[1] == line


def test_options_have_ranges(base: BaseModel) -> None:
    assert ConversionOptions().lora_rank is None
    with pytest.raises(ValueError, match="not 2000"):
        ConversionOptions(lora_rank=2000)

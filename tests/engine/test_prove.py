"""`reef prove`: the verdict of the engine, with real bases, adapters and a store."""

import gc
from collections.abc import Callable
from pathlib import Path

import pytest

from engine import adapter_loader
from engine.lora.weights import AdapterLoadError
from engine.proof import proofs
from reef.__main__ import main
from tests.engine.support.driver import write_adapter
from tests.engine.support.tiny import write_tiny

Prove = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folders = [tmp_path_factory.mktemp(f"base{i}") for i in range(2)]
    return [write_tiny(folders[0], "qwen2").folder, write_tiny(folders[1], "llama").folder]


@pytest.fixture(scope="module")
def options(bases: list[Path], tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Publish an adapter that acts and one of zeros."""
    folder = tmp_path_factory.mktemp("store")
    options = ["--root", f"file://{folder}/root", "--cache", str(folder / "cache")]
    for name, alpha in (("acts", 16), ("zeros", 0)):
        upload = write_adapter(bases[0], folder / name, lora_alpha=alpha).path
        assert main(["publish", upload, "--name", name, "--base", str(bases[0]), *options]) == 0
    return options


@pytest.fixture
def prove(options: list[str], capsys: pytest.CaptureFixture[str]) -> Prove:
    def call(name: str, model: Path, *more: str) -> tuple[int, str, str]:
        code = main(["prove", name, "--model", str(model), *more, *options])
        captured = capsys.readouterr()
        gc.collect()  # an engine is a cycle of objects, and holds 2 GiB
        return code, captured.out, captured.err

    return call


@pytest.mark.parametrize("quantization", ["none", "int8"])
def test_an_adapter_that_acts_is_proven(
    prove: Prove,
    bases: list[Path],
    quantization: str,
    options: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    code, out, err = prove("acts@1", bases[0], "--quantization", quantization)
    assert (code, err) == (0, "")
    assert out.startswith("public/acts@1 changes the logprobs of a probe by up to ")
    assert main(["list", *options]) == 0
    acts, *_ = capsys.readouterr().out.splitlines()
    assert acts.startswith("public/acts@1") and "  proven  latest" in acts


def test_one_that_changes_nothing_is_a_warning(prove: Prove, bases: list[Path]) -> None:
    code, out, err = prove("zeros", bases[0])
    assert code == 0 and "every B is zero" in err and "by up to 0;" in out


def test_one_that_a_server_would_refuse_ends_with_its_reason(
    prove: Prove, bases: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    read = proofs.take_logprobs
    monkeypatch.setattr(proofs, "take_logprobs", lambda outputs: [-1.0] * len(read(outputs)))
    code, out, err = prove("acts", bases[0])
    assert (code, out) == (1, "") and "does not act as its weights say" in err


def test_one_that_cannot_be_loaded_has_failed(
    prove: Prove,
    bases: list[Path],
    options: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*_: object) -> None:
        raise AdapterLoadError("its A is not what this machine computes")

    monkeypatch.setattr(adapter_loader, "load_lora", refuse)
    code, _, err = prove("zeros", bases[0])
    assert code == 1 and "its A is not what this machine computes" in err
    assert main(["list", *options]) == 0
    *_, zeros = capsys.readouterr().out.splitlines()
    assert zeros.startswith("public/zeros@1") and "  failed  latest" in zeros


def test_another_base_an_unknown_name_and_a_bad_format_are_refused(
    prove: Prove, bases: list[Path]
) -> None:
    code, _, err = prove("acts", bases[1])
    assert code != 0 and "public/acts@1 was made for base " in err
    code, _, err = prove("absent", bases[0])
    assert code != 0 and "absent" in err
    code, _, err = prove("acts", bases[0], "--quantization", "int3")
    assert code != 0 and "quantization='int3' is not one of none, int8" in err

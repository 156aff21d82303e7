"""Tests the plan's numbers against actual bytes."""

import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors import safe_open

from engine.backends.kv_cache import allocate_kv_cache
from engine.backends.torch.ops import torch_build
from engine.lora.load import load_lora
from engine.messages import AdapterFolder
from engine.model.loader import load_decoder
from engine.plan.picture import memory_shares
from engine.sizes import (
    FORMATS,
    LinearShape,
    Load,
    Machine,
    ModelSize,
    WeightFormat,
    adapter_bytes,
    kv_bytes,
    largest_batch,
    largest_distinct_batch,
    read_model_size,
    step_floor,
    weight_bytes,
)
from reef.__main__ import main
from tests.engine.support.tiny import MODEL_TYPES, write_tiny

CPU = torch.device("cpu")
LOAD = Load(memory_bytes=2**21, context=40, lora_rank=4)
GIVEN = ["--bandwidth", "10", "--flops", "0.1"]


def file_bytes(folder: Path) -> int:
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        return sum(file.get_tensor(key).nbytes for key in file.keys())  # noqa: SIM118


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_weight_bytes_are_those_of_the_checkpoints_tensors(tmp_path: Path, model_type: str) -> None:
    write_tiny(tmp_path, model_type)
    size = read_model_size(tmp_path)
    assert weight_bytes(size, size.form) == file_bytes(tmp_path)
    assert size.form.name == "float32"


def test_a_tied_head_takes_no_bytes_and_bfloat16_half_as_many(tmp_path: Path) -> None:
    write_tiny(tmp_path, "qwen2", dtype=torch.bfloat16, tie_word_embeddings=True)
    size = read_model_size(tmp_path)
    assert size.form.name == "bfloat16"
    assert weight_bytes(size, size.form) == file_bytes(tmp_path)
    assert size.num_head == 0 and size.num_embedding > 0


def test_formats_of_few_bits_count_their_scales() -> None:
    int8, nf4, int4 = (form for form in FORMATS if form.name in ("int8", "nf4", "int4"))
    odd = LinearShape("o", in_features=43, out_features=3)  # 129 values: three blocks of nf4
    assert int8.linear_bytes(odd) == 129 + 3 * 4
    assert nf4.linear_bytes(odd) == 65 + 3 * 4
    assert int4.linear_bytes(odd) == 65 + 5 + 3 * 4


@pytest.mark.parametrize("num_tokens", [1, 16, 40])
def test_kv_bytes_are_those_of_the_tensor_that_holds_them(tmp_path: Path, num_tokens: int) -> None:
    write_tiny(tmp_path)
    size = read_model_size(tmp_path)
    num_blocks = -(-num_tokens // 16)
    tensor = allocate_kv_cache(num_blocks, 16, size.spec, torch.bfloat16, CPU)
    assert kv_bytes(size, torch.bfloat16, num_tokens, 16) == tensor.nbytes


@pytest.mark.parametrize(
    ("targets", "attention_only"),
    [
        (["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"], False),
        (["q_proj", "k_proj", "v_proj", "o_proj"], True),
    ],
)
def test_adapter_bytes_are_those_of_a_loaded_adapter(
    tmp_path: Path, targets: list[str], attention_only: bool
) -> None:
    tiny = write_tiny(tmp_path / "base", "qwen2")
    config = LoraConfig(r=5, target_modules=targets, task_type="CAUSAL_LM")
    get_peft_model(tiny.reference, config).save_pretrained(tmp_path / "adapter")
    decoder = load_decoder(tmp_path / "base", torch_build(CPU, torch.float32), max_model_len=32)
    folder = AdapterFolder("digest", str(tmp_path / "adapter"))
    loaded = load_lora(folder, decoder.lora_sites, torch.float32)
    size = read_model_size(tmp_path / "base")
    planned = adapter_bytes(size, torch.float32, 5, attention_only=attention_only)
    assert planned == loaded.nbytes


# ==== how many fit ====


@pytest.fixture
def size(tmp_path: Path) -> ModelSize:
    write_tiny(tmp_path / "model")
    return read_model_size(tmp_path / "model")


@pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.name)
@pytest.mark.parametrize("num_adapters", [0, 3])
def test_the_largest_batch_fits_and_one_more_does_not(
    size: ModelSize, form: WeightFormat, num_adapters: int
) -> None:
    batch = largest_batch(size, form, LOAD, num_adapters)
    fixed = weight_bytes(size, form) + num_adapters * adapter_bytes(size, form.dtype, 4)
    each = kv_bytes(size, form.dtype, 40, 16)
    assert batch > 0
    assert fixed + batch * each <= LOAD.memory_bytes < fixed + (batch + 1) * each


@pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.name)
def test_a_distinct_batch_is_the_largest_that_fits_with_its_own_adapters(
    size: ModelSize, form: WeightFormat
) -> None:
    batch = largest_distinct_batch(size, form, LOAD)
    assert batch > 0
    assert largest_batch(size, form, LOAD, batch) >= batch
    assert largest_batch(size, form, LOAD, batch + 1) < batch + 1


def test_no_batch_fits_if_the_weights_do_not(size: ModelSize) -> None:
    small = Load(memory_bytes=1000, context=40, lora_rank=4)
    assert largest_batch(size, FORMATS[0], small, 0) == 0
    assert largest_distinct_batch(size, FORMATS[0], small) == 0


@pytest.mark.parametrize("num_adapters", [0, 8])
def test_the_shares_of_memory_add_up_to_it(size: ModelSize, num_adapters: int) -> None:
    shares = memory_shares(size, LOAD, num_adapters)
    assert sum(shares.values()) == LOAD.memory_bytes
    assert min(shares.values()) >= 0


# ==== the floor ====


def test_the_floor_of_one_row_reads_everything_once(size: ModelSize) -> None:
    machine = Machine(bytes_per_s=1.0, flops_per_s=float("inf"), source="a test")
    embedding = 4 * size.num_embedding  # a row per token is not counted
    expected = weight_bytes(size, FORMATS[0]) - embedding + 40 * 2 * 3 * 2 * 16 * 4
    assert step_floor(size, LOAD, machine, 1, 0).step_s == expected
    expected += adapter_bytes(size, torch.float32, 4)
    assert step_floor(size, LOAD, machine, 1, 1).step_s == expected


def test_a_rows_operations_do_not_depend_on_how_many_adapters_there_are(size: ModelSize) -> None:
    machine = Machine(bytes_per_s=float("inf"), flops_per_s=1.0, source="a test")
    base, one, eight = (step_floor(size, LOAD, machine, 8, n).step_s for n in (0, 1, 8))
    assert base < one == eight
    assert one == 8 * step_floor(size, LOAD, machine, 1, 1).step_s
    lora = 2 * 4 * sum(linear.in_features + linear.out_features for linear in size.linears)
    assert one - base == 8 * lora


# ==== the command ====


def test_the_report_states_the_checkpoints_bytes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_tiny(tmp_path)
    assert main(["plan", str(tmp_path), "--context", "100", *GIVEN]) == 0
    text = capsys.readouterr().out
    assert f"{file_bytes(tmp_path):,} bytes" in text
    assert "2 x 3 x 2 x 16 x 4 = 768 bytes" in text
    assert "10.0 GB/s" in text and "as given" in text


def test_a_folder_without_a_config_is_refused_in_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", str(tmp_path), *GIVEN]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1 and str(tmp_path / "config.json") in captured.err


def test_a_context_longer_than_the_model_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_tiny(tmp_path)
    assert main(["plan", str(tmp_path), "--context", "257", *GIVEN]) == 2
    assert "257 is outside 1..256" in capsys.readouterr().err


@pytest.mark.parametrize(
    "bad", [["--memory", "3x"], ["--context", "0"], ["--rank", "-1"], ["--flops", "nan"]]
)
def test_a_bad_argument_is_named(
    tmp_path: Path, bad: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", str(tmp_path), *bad]) == 2
    assert f"'{bad[0]}'" in capsys.readouterr().err


@pytest.mark.parametrize("suffix", [".svg", ".png"])
def test_the_picture_is_the_same_each_time(tmp_path: Path, suffix: str) -> None:
    write_tiny(tmp_path)
    first, second = tmp_path / f"first{suffix}", tmp_path / f"second{suffix}"
    for path in (first, second):
        options = ["plan", str(tmp_path), "--context", "100", *GIVEN, "--picture", str(path)]
        assert main(options) == 0
    assert first.read_bytes() == second.read_bytes()


def test_a_missing_matplotlib_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_tiny(tmp_path)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    options = [
        "plan",
        str(tmp_path),
        "--context",
        "100",
        *GIVEN,
        "--picture",
        str(tmp_path / "a.svg"),
    ]
    assert main(options) == 2
    assert "pip install matplotlib" in capsys.readouterr().err

"""What the command line of mlx-lm trains is converted, and answers as in MLX."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from adapter_store.bases import describe_base
from tests.adapter_store.training import convert_and_check
from tests.deployments.support.tiny_models import make_base

ROOT = Path(__file__).parents[2]
PYTHON = ROOT / ".venv-trainers" / "bin" / "python"
TOKEN_IDS = [3, 44, 25, 17, 8, 99, 101]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


def run(*arguments: object) -> str:
    assert PYTHON.exists(), "no environment for trainers: `make .venv-trainers/stamp`"
    command = [PYTHON, *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mlx") / "base"
    make_base(folder, 512)
    config = json.loads((folder / "config.json").read_text())
    config["rope_theta"] = config["rope_parameters"]["rope_theta"]  # mlx-lm looks nowhere else
    (folder / "config.json").write_text(json.dumps(config))
    data = folder.with_name("data")
    data.mkdir()
    for name in ("train", "valid"):
        lines = [json.dumps({"text": f"{name} {number} " * 4}) for number in range(8)]
        (data / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_an_adapter_of_its_command_line_answers_as_in_mlx(
    base_folder: Path, tmp_path: Path, kind: str
) -> None:
    trained, published = tmp_path / "trained", tmp_path / "published"
    options = ["--iters", 4, "--batch-size", 2, "--num-layers", 1, "--learning-rate", 0.02]
    folders = ["--model", base_folder, "--data", base_folder.with_name("data")]
    options += ["--fine-tune-type", kind, "--adapter-path", trained]
    run("-m", "mlx_lm", "lora", "--train", *folders, *options)
    base = describe_base(base_folder, tmp_path / "hashes", lambda _: None)
    record, _ = convert_and_check(trained, published, base)
    assert record.source == "MLX" and not record.residuals
    script = Path(__file__).with_name("mlx_logits.py")
    theirs = torch.tensor(json.loads(run(script, base_folder, trained, *TOKEN_IDS)))
    plain, ours = logits(base_folder), logits(base_folder, published)
    assert (plain - theirs).abs().max() > 0.05, "the training changed what is said"
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-3)


@torch.no_grad()
def logits(base_folder: Path, adapter: Path | None = None) -> torch.Tensor:
    model: Any = AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float32)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, str(adapter))
    return model(torch.tensor([TOKEN_IDS])).logits[0]

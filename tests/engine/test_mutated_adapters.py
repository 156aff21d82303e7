"""An adapter that was changed at random is refused with a reason, or served as PEFT runs it."""

import copy
import json
import shutil
import warnings
from collections import Counter
from pathlib import Path

import pytest
import torch
from peft import PeftModel

from adapter_store.bases import describe_base
from adapter_store.errors import AdapterInvalid
from adapter_store.manifest import prepare
from adapter_store.peft_config import CONFIG_NAME, IGNORED_KEYS
from engine.engine import Engine
from engine.messages import AdapterFolder, GenerateRequest
from tests.engine.support.driver import greedy, make_engine, prompt_of, run
from tests.engine.support.kinds import load_plain, write_kind
from tests.engine.support.mutations import Mutant
from tests.engine.support.tiny import Tiny, write_tiny

PROMPT = prompt_of(9, seed=1)
SOURCES = {
    "plain": {},
    "patterns": {
        "use_rslora": True,
        "rank_pattern": {"layers.1.mlp.up_proj": 2},
        "alpha_pattern": {"q_proj": 5},
    },
    "DoRA": {"use_dora": True},
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return write_tiny(tmp_path_factory.mktemp("base"), "qwen2")


@pytest.fixture(scope="module")
def sources(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("sources")
    return [
        Path(write_kind(tiny.folder, folder / name, **config).path)
        for name, config in SOURCES.items()
    ]


@pytest.mark.parametrize(
    "num_mutants", [100, pytest.param(1000, marks=pytest.mark.slow)], ids=["some", "many"]
)
def test_a_mutant_is_refused_with_a_reason_or_served_as_peft_runs_it(
    num_mutants: int, tiny: Tiny, sources: list[Path], tmp_path: Path
) -> None:
    base = describe_base(tiny.folder, tmp_path, lambda _: None)
    engine, plain = make_engine(tiny.folder), load_plain(tiny.folder)
    counts: Counter[str] = Counter()
    for seed in range(num_mutants):
        mutant = Mutant(sources[seed % len(sources)], seed)
        uploaded, for_peft = tmp_path / f"u{seed}", tmp_path / f"p{seed}"
        mutant.write(uploaded, for_peft)
        try:
            prepared = prepare(uploaded, base, lambda _: None)
        except AdapterInvalid as error:
            assert len(str(error)) > 20, mutant.steps
            counts["refused"] += 1
        else:
            (uploaded / CONFIG_NAME).write_bytes(prepared.config)
            adapter = AdapterFolder(f"{seed}-{prepared.manifest.digest}", str(uploaded))
            expected = by_peft(plain, for_peft)
            for token_id, value in served(engine, adapter):
                assert value == pytest.approx(expected[token_id].item(), abs=1e-4), mutant.steps
            counts["served"] += 1
        shutil.rmtree(uploaded)
        shutil.rmtree(for_peft)
    assert min(counts["refused"], counts["served"]) > num_mutants // 5, counts


def served(engine: Engine, adapter: AdapterFolder) -> tuple[tuple[int, float], ...]:
    """Return the most likely next tokens with their log probabilities."""
    request = GenerateRequest("r", PROMPT, greedy(1, logprobs=20), adapter_folder=adapter)
    result = run(engine, [request])["r", 0]
    assert result.logprobs, result
    return result.logprobs[0].top


def by_peft(plain: torch.nn.Module, folder: Path) -> torch.Tensor:
    """Return the log probabilities of all next tokens.

    PEFT raises for some values of keys that are ignored here; then it gets their defaults.
    """
    try:
        return _by_peft(plain, folder)
    except (TypeError, ValueError, AttributeError):
        config = json.loads((folder / CONFIG_NAME).read_text())
        kept = {key: value for key, value in config.items() if key not in IGNORED_KEYS}
        (folder / CONFIG_NAME).write_text(json.dumps({"task_type": "CAUSAL_LM"} | kept))
        return _by_peft(plain, folder)


@torch.inference_mode()
def _by_peft(plain: torch.nn.Module, folder: Path) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = PeftModel.from_pretrained(copy.deepcopy(plain), str(folder)).eval()
        return model(torch.tensor([PROMPT])).logits[0, -1].log_softmax(-1)

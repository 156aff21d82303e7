"""A model that was trained as a whole, served as an adapter of its base, has its own logits."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from adapter_store.layout import LoraLayout, read_lora_layout
from tests.engine.support.extracted import SOME, check, extract
from tests.engine.support.kinds import load_plain, quiet
from tests.engine.support.tiny import VOCAB_SIZE, write_tiny

EMBEDDING, HEAD = "model.embed_tokens", "lm_head"
MATRICES = ("embed_tokens", "lm_head", "norm", "bias")


def tune(
    folder: Path, base: Path, *changed: str, rows: list[int] | None = None, **save: Any
) -> Any:
    """Change parameters whose names hold one of `changed`; of the vocabulary perhaps some rows."""
    model = load_plain(base)
    if save.get("untied"):
        model.config.tie_word_embeddings = False
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())
    if size := save.get("vocab_size"):
        model.resize_token_embeddings(size, mean_resizing=False)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not any(part in name for part in changed):
                continue
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith("_proj.weight"):  # of rank 2
                noise = noise[:, :2] @ noise[:2, : parameter.shape[1]]
            if rows is not None and any(part in name for part in ("embed", "lm_head")):
                parameter[rows] += 0.3 * noise[rows]
            else:
                parameter += 0.2 * noise
    model.save_pretrained(folder)
    return model.eval()


def shape_of(layout: LoraLayout) -> tuple[set[str], set[str], dict[str, int]]:
    """Return modules with factors, parameters that are replaced, and numbers of rows."""
    rows = {name: len(rows.token_ids) for name, rows in layout.token_rows.items()}
    return set(layout.modules), set(layout.replaced), rows


CASES: dict[str, tuple[dict[str, Any], dict[str, Any], set[str], dict[str, int]]] = {
    # the base, the tuning, the vocabulary's matrices that are whole, and rows of the others
    "rows": ({}, {"rows": SOME}, set(), {EMBEDDING: 3, HEAD: 3}),
    "whole": ({}, {}, {EMBEDDING, HEAD}, {}),
    "tied rows": ({"tie_word_embeddings": True}, {"rows": SOME}, set(), {EMBEDDING: 3}),
    "tied": ({"tie_word_embeddings": True}, {}, {EMBEDDING}, {}),
    "no longer tied": (
        {"tie_word_embeddings": True},
        {"rows": SOME, "untied": True},
        {EMBEDDING, HEAD},
        {},
    ),
    "more tokens": ({}, {"vocab_size": VOCAB_SIZE + 5}, {EMBEDDING, HEAD}, {}),
}


@pytest.mark.parametrize(
    ("of_base", "tuning", "whole", "rows"),
    [
        pytest.param(*case, id=name, marks=pytest.mark.slow if name in ("tied", "whole") else ())
        for name, case in CASES.items()
    ],
)
def test_changed_norms_biases_embeddings_and_output_layers_are_served_exactly(
    of_base: dict[str, Any],
    tuning: dict[str, Any],
    whole: set[str],
    rows: dict[str, int],
    tmp_path: Path,
) -> None:
    base = write_tiny(tmp_path / "base", "qwen2", **of_base).folder
    model = tune(tmp_path / "tuned", base, "q_proj.weight", "down_proj", *MATRICES, **tuning)
    record, adapter = extract(tmp_path / "tuned", base, tmp_path / "adapter")
    modules, replaced, found_rows = shape_of(read_lora_layout(Path(adapter.path)))
    assert {name.rpartition(".")[2] for name in modules} == {"q_proj", "down_proj"}
    assert set(record.residuals) == modules and record.max_residual < 1e-6
    ends = {name.removeprefix("model.layers.") for name in replaced}
    assert {f"{name}.weight" for name in whole} == {n for n in ends if "embed" in n or "lm_" in n}
    assert "0.self_attn.q_proj.bias" in ends and "model.norm.weight" in ends
    assert found_rows == rows
    check(base, adapter, model, VOCAB_SIZE + 5 * ("vocab_size" in tuning))
    if "vocab_size" not in tuning and "untied" not in tuning:  # PEFT itself runs the folder alike
        with quiet(), torch.inference_mode():
            loaded = PeftModel.from_pretrained(load_plain(base), adapter.path).eval()
            prompt = torch.tensor([[*SOME, 5]])
            torch.testing.assert_close(
                loaded(prompt).logits, model(prompt).logits, rtol=0, atol=1e-4
            )


def test_a_model_whose_norms_alone_have_changed_is_an_adapter(tmp_path: Path) -> None:
    base = write_tiny(tmp_path / "base").folder
    model = tune(tmp_path / "tuned", base, "layernorm")
    record, adapter = extract(tmp_path / "tuned", base, tmp_path / "adapter")
    assert not record.residuals
    check(base, adapter, model, VOCAB_SIZE)

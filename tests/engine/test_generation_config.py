"""Tests what is read of end tokens and sampling defaults from a model folder."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import GenerationConfig

from engine.generation_config import (
    read_eos_token_ids,
    read_named_eos_token_ids,
    read_sampling_defaults,
)
from engine.model.spec import ModelError
from engine.scheduler.request import SamplingDefaults


def write(folder: Path, name: str, content: Any) -> None:
    (folder / f"{name}.json").write_text(json.dumps(content))


def test_the_generation_config_decides_what_ends_a_text(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"eos_token_id": 2}')
    assert read_eos_token_ids(tmp_path) == (2,)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7, 8]}')
    assert read_eos_token_ids(tmp_path) == (7, 8)
    (tmp_path / "generation_config.json").write_text("{}")
    assert read_eos_token_ids(tmp_path) == (2,)


@pytest.mark.parametrize("token", ["<|im_end|>", {"content": "<|im_end|>", "lstrip": False}])
@pytest.mark.parametrize(
    ("config", "tokenizer"),
    [
        ({"added_tokens_decoder": {"9": {"content": "<|im_end|>"}}}, None),
        ({}, {"added_tokens": [{"id": 9, "content": "<|im_end|>"}]}),
        ({}, {"model": {"vocab": {"a": 1, "<|im_end|>": 9}}}),
        (
            {"added_tokens_decoder": {"1": {"content": "x"}}},
            {"model": {"vocab": {"<|im_end|>": 9}}},
        ),
    ],
)
def test_the_tokenizers_end_token_ends_a_text_too(
    token: Any, config: dict[str, Any], tokenizer: Any, tmp_path: Path
) -> None:
    write(tmp_path, "config", {"eos_token_id": 2})
    write(tmp_path, "tokenizer_config", {"eos_token": token, **config})
    if tokenizer is not None:
        write(tmp_path, "tokenizer", tokenizer)
    assert read_eos_token_ids(tmp_path) == (2, 9)
    assert read_named_eos_token_ids(tmp_path) == (2,)
    write(tmp_path, "generation_config", {"eos_token_id": [9, 7]})
    assert read_eos_token_ids(tmp_path) == (9, 7)


@pytest.mark.parametrize(
    "tokenizer_config", [{}, {"eos_token": None}, {"eos_token": "</s>"}, {"eos_token": {}}]
)
def test_a_tokenizer_without_an_end_token_adds_none(
    tokenizer_config: dict[str, Any], tmp_path: Path
) -> None:
    write(tmp_path, "config", {"eos_token_id": 2})
    write(tmp_path, "tokenizer_config", tokenizer_config)
    write(tmp_path, "tokenizer", {"model": {"vocab": [["a", 0.0]]}})
    assert read_eos_token_ids(tmp_path) == (2,)


@pytest.mark.parametrize("eos", ["</s>", [2, "x"], {"id": 2}, 2.0, True])
def test_an_end_token_that_is_no_id_is_refused_by_name(eos: Any, tmp_path: Path) -> None:
    write(tmp_path, "config", {"eos_token_id": eos})
    with pytest.raises(ModelError, match=r"config\.json: eos_token_id"):
        read_eos_token_ids(tmp_path)


def test_sampling_defaults_are_those_that_transformers_saves(tmp_path: Path) -> None:
    config = GenerationConfig(
        do_sample=True, temperature=0.6, top_p=0.9, top_k=20, min_p=0.05, repetition_penalty=1.05
    )
    config.save_pretrained(tmp_path)
    assert read_sampling_defaults(tmp_path) == SamplingDefaults(0.6, 0.9, 20, 0.05, 1.05)


def test_what_the_file_leaves_out_has_no_default(tmp_path: Path) -> None:
    assert read_sampling_defaults(tmp_path) == SamplingDefaults()
    write(tmp_path, "generation_config", {"top_k": -1, "temperature": None, "eos_token_id": 2})
    assert read_sampling_defaults(tmp_path) == SamplingDefaults(top_k=0)


@pytest.mark.parametrize(
    "content", [{"temperature": -1}, {"top_p": "0.9"}, {"top_k": True}, {"top_k": 0.5}]
)
def test_a_default_that_no_request_may_have_is_refused_by_name(
    content: dict[str, Any], tmp_path: Path
) -> None:
    write(tmp_path, "generation_config", content)
    with pytest.raises(ModelError, match=rf"generation_config\.json: {next(iter(content))}"):
        read_sampling_defaults(tmp_path)

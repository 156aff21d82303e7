"""What transformers makes of a folder's tokenizer, foretold and asked for. transformers decides."""

import json
import logging
import subprocess
import sys
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers, trainers
from tokenizers.models import BPE, WordLevel
from transformers import AutoTokenizer

from deployments.text.ask_transformers import TransformersFailed, ask_transformers, build
from deployments.text.auto_tokenizer import describe_difference
from deployments.text.vocabulary import Vocabulary

TEXTS = [
    "in 1984 the cats ran, and 27 of them didn't return.",
    "  two spaces,\n\n\tthen a tab; cafe\u0301, café, the end ",
    "the",
    "",
]
CORPUS = [*TEXTS, "the cats and the end of the year 1984, 1985, 1986; café café"] * 3


def byte_level(pre_tokenizer: pre_tokenizers.PreTokenizer, normalizer: Any = None) -> Tokenizer:
    tokenizer = Tokenizer(BPE())
    tokenizer.normalizer = normalizer  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.pre_tokenizer = pre_tokenizer  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=340, initial_alphabet=alphabet, special_tokens=["<|endoftext|>"]
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def with_spaces(
    normalizer: normalizers.Normalizer | None, pre_tokenizer: pre_tokenizers.PreTokenizer | None
) -> Tokenizer:
    """Sentencepiece's kind: words begin with a low line, unknown characters are bytes."""
    tokenizer = Tokenizer(BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()  # pyright: ignore
    by_byte = [f"<0x{byte:02X}>" for byte in range(256)]
    special = ["<unk>", "<s>", "</s>", *by_byte]
    tokenizer.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=340, special_tokens=special)
    )
    document = json.loads(tokenizer.to_str())
    document["added_tokens"] = document["added_tokens"][:3]  # the bytes are ordinary tokens
    tokenizer = Tokenizer.from_str(json.dumps(document))
    if normalizer is not None:
        tokenizer.normalizer = normalizer  # pyright: ignore
    if pre_tokenizer is None:
        document = json.loads(tokenizer.to_str()) | {"pre_tokenizer": None}
        return Tokenizer.from_str(json.dumps(document))
    tokenizer.pre_tokenizer = pre_tokenizer  # pyright: ignore
    return tokenizer


def llama_2() -> Tokenizer:
    steps: list[normalizers.Normalizer] = [
        normalizers.Prepend("\u2581"),
        normalizers.Replace(" ", "\u2581"),
    ]
    return with_spaces(normalizers.Sequence(steps), None)


def llama_5() -> Tokenizer:
    return with_spaces(None, pre_tokenizers.Metaspace(prepend_scheme="first", split=False))


def gemma() -> Tokenizer:
    spaces = pre_tokenizers.Split(" ", "merged_with_previous")
    return with_spaces(normalizers.Replace(" ", "\u2581"), spaces)


def qwen() -> Tokenizer:
    words = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    steps: list[pre_tokenizers.PreTokenizer] = [
        pre_tokenizers.Split(Regex(words), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False),
    ]
    return byte_level(pre_tokenizers.Sequence(steps), normalizers.NFC())


def gpt2() -> Tokenizer:
    return byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False))


def digits() -> Tokenizer:
    steps: list[pre_tokenizers.PreTokenizer] = [
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
    ]
    tokenizer = gpt2()  # with merges of digits
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)  # pyright: ignore
    return tokenizer


FILES: dict[str, Callable[[], Tokenizer]] = {
    "digits": digits,
    "gemma": gemma,
    "gpt2": gpt2,
    "llama 2": llama_2,
    "llama 5": llama_5,
    "qwen": qwen,
}
TYPES = ("gemma2", "gemma3_text", "granite", "llama", "mistral", "phi3", "qwen2", "qwen3")
CLASSES = (
    None,
    "GPT2Tokenizer",
    "GemmaTokenizer",
    "LlamaTokenizer",
    "LlamaTokenizerFast",
    "PreTrainedTokenizerFast",
    "Qwen2Tokenizer",
    "Qwen2TokenizerFast",
    "TokenizersBackend",
)


@pytest.fixture(scope="module")
def files() -> dict[str, str]:
    return {name: make().to_str() for name, make in FILES.items()}


def write(
    folder: Path, tokenizer: str, declared: str | None, model_type: str, **more: Any
) -> Tokenizer:
    folder.mkdir(exist_ok=True)
    config = more if declared is None else {"tokenizer_class": declared, **more}
    (folder / "tokenizer.json").write_text(tokenizer)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    return Tokenizer.from_str(tokenizer)


def transformers_tokenizer(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder)


def parts(tokenizer: Tokenizer) -> tuple[Any, Any]:
    document = json.loads(tokenizer.to_str())
    return document["normalizer"], document["pre_tokenizer"]


@pytest.mark.parametrize("model_type", TYPES)
def test_what_transformers_replaces_is_foretold(
    model_type: str, files: dict[str, str], tmp_path: Path
) -> None:
    for declared, (name, text) in product(CLASSES, files.items()):
        ours = write(tmp_path, text, declared, model_type)
        theirs = transformers_tokenizer(tmp_path)
        difference = describe_difference(tmp_path, ours)
        about = f"{name}, {declared}: {difference}"
        if difference is None:
            ids = [theirs.encode(text, add_special_tokens=False) for text in TEXTS]
            assert [ours.encode(text).ids for text in TEXTS] == ids, about
            continue
        for part, before, after in zip(
            ("normalizer", "pre_tokenizer"),
            parts(ours),
            parts(theirs.backend_tokenizer),
            strict=True,
        ):
            assert (before != after) or f" {part}" not in difference, about
        assert f"tokenizer_class {declared}, model_type {model_type}" in difference
        assert f"as {type(theirs).__name__}," in difference


@pytest.mark.parametrize(
    ("file", "declared", "model_type", "named"),
    [
        ("digits", "GPT2Tokenizer", "llama", "pre_tokenizer"),
        ("digits", "LlamaTokenizerFast", "qwen2", "normalizer, pre_tokenizer"),
        ("digits", "PreTrainedTokenizerFast", "qwen2", "normalizer, pre_tokenizer"),
        ("llama 2", "LlamaTokenizer", "llama", "normalizer, pre_tokenizer"),
    ],
)
def test_a_folder_that_transformers_reads_otherwise_is_warned_of_once(
    file: str,
    declared: str,
    model_type: str,
    named: str,
    files: dict[str, str],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    write(tmp_path, files[file], declared, model_type)
    with caplog.at_level(logging.WARNING):
        ours = Vocabulary.load(tmp_path)
    [record] = caplog.records
    assert f"tokenizer.json: {named}. " in record.getMessage()
    assert f"{declared}, model_type {model_type}" in record.getMessage()
    theirs = transformers_tokenizer(tmp_path)
    assert any(ours.encode(t, False) != theirs.encode(t, add_special_tokens=False) for t in TEXTS)
    Vocabulary.load(tmp_path, "file")
    assert caplog.records == [record], "whoever has chosen is not warned"
    built = Tokenizer.from_str(build(str(tmp_path)))
    for text in TEXTS:
        assert built.encode(text).ids == theirs.encode(text)


@pytest.mark.parametrize(
    ("file", "declared", "model_type"),
    [
        ("digits", "PreTrainedTokenizerFast", "llama"),
        ("digits", "GPT2Tokenizer", "granite"),
        ("gemma", "GemmaTokenizer", "gemma2"),
        ("gpt2", "GPT2Tokenizer", "llama"),
        ("llama 2", "LlamaTokenizer", "mistral"),
        ("llama 2", "LlamaTokenizerFast", "phi3"),
        ("llama 5", "LlamaTokenizer", "llama"),
        ("qwen", "Qwen2Tokenizer", "qwen2"),
        ("qwen", "Qwen2TokenizerFast", "qwen3"),
    ],
)
def test_a_folder_that_transformers_reads_alike_is_not_warned_of(
    file: str,
    declared: str,
    model_type: str,
    files: dict[str, str],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    write(tmp_path, files[file], declared, model_type)
    Vocabulary.load(tmp_path)
    assert not caplog.records


def test_asked_for_the_tokenizer_is_that_of_transformers(
    files: dict[str, str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path, files["digits"], "GPT2Tokenizer", "llama")
    ours, theirs = Vocabulary.load(tmp_path, "transformers"), transformers_tokenizer(tmp_path)
    assert not caplog.records
    for text in TEXTS:
        ids = theirs.encode(text)
        assert ours.encode(text, True) == ids
        assert ours.decode(ids, False) == theirs.decode(ids)


def test_a_folder_that_transformers_cannot_read_is_refused_with_its_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = (sys.executable, "-c", "raise ValueError('no such vocabulary')")
    monkeypatch.setattr("deployments.text.ask_transformers.PROGRAM", program)
    with pytest.raises(TransformersFailed, match=f"{tmp_path}: ValueError: no such vocabulary"):
        ask_transformers(tmp_path)


def test_without_transformers_the_key_says_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(TransformersFailed, match="package transformers"):
        ask_transformers(tmp_path)


def test_a_class_that_is_not_known_is_named(files: dict[str, str], tmp_path: Path) -> None:
    ours = write(tmp_path, files["gpt2"], "StrangeTokenizer", "llama")
    assert "as StrangeTokenizer" in str(describe_difference(tmp_path, ours))


def test_other_options_of_the_model_are_named(files: dict[str, str], tmp_path: Path) -> None:
    document = json.loads(files["gpt2"])
    document["model"]["ignore_merges"] = True
    ours = write(tmp_path, json.dumps(document), "GPT2Tokenizer", "llama")
    assert str(describe_difference(tmp_path, ours)).endswith(": model.ignore_merges")
    assert not transformers_tokenizer(tmp_path).backend_tokenizer.model.ignore_merges


def test_another_kind_of_model_is_named(files: dict[str, str], tmp_path: Path) -> None:
    tokenizer = Tokenizer(WordLevel({"the": 0, "?": 1}, unk_token="?"))
    ours = write(tmp_path, tokenizer.to_str(), "GPT2Tokenizer", "llama")
    assert str(describe_difference(tmp_path, ours)).endswith(", model")


def test_tokens_that_only_the_configuration_adds_are_named(
    files: dict[str, str], tmp_path: Path
) -> None:
    flags = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False)
    added = {"400": {"content": "<extra>", "special": True, **flags}}
    ours = write(tmp_path, files["gpt2"], "TokenizersBackend", "llama", added_tokens_decoder=added)
    assert str(describe_difference(tmp_path, ours)).endswith(": added tokens <extra>")
    assert ours.encode("<extra>").ids != transformers_tokenizer(tmp_path).encode("<extra>")


@pytest.mark.parametrize("splits", [True, False])
def test_split_special_tokens_is_obeyed(
    splits: bool, files: dict[str, str], tmp_path: Path
) -> None:
    template = "{% for m in messages %}{{ m.content }}<|endoftext|>{% endfor %}"
    write(
        tmp_path,
        files["gpt2"],
        "TokenizersBackend",
        "llama",
        eos_token="<|endoftext|>",
        split_special_tokens=splits,
        chat_template=template,
    )
    ours, theirs = Vocabulary.load(tmp_path), transformers_tokenizer(tmp_path)
    text = "the end<|endoftext|>"
    end = ours.encode("<|endoftext|>", False)
    assert (len(end) > 1) is splits
    assert ours.encode(text, False) == theirs.encode(text, add_special_tokens=False)
    messages = [{"role": "user", "content": "the cats"}]
    pieces = ours.render_pieces(messages, True, {})
    wanted = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert ours.encode_pieces(pieces, False, 99) == wanted


def test_loading_a_folder_imports_no_transformers(files: dict[str, str], tmp_path: Path) -> None:
    write(tmp_path, files["digits"], "GPT2Tokenizer", "llama")
    script = (
        "import sys; from pathlib import Path; from deployments.text.vocabulary import Vocabulary; "
        "Vocabulary.load(Path(sys.argv[1])); print('transformers' in sys.modules)"
    )
    command = [sys.executable, "-c", script, str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"

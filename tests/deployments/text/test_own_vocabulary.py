"""The vocabulary of an adapter that brings its own tokenizer, against transformers."""

import gc
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer

from adapter_store.base_text import describe_text
from adapter_store.own_tokenizer import parse_own_tokenizer, read_own_tokenizer
from adapter_store.tokenizer_file import TokenizerRefused
from deployments.text.vocabulary import Vocabulary
from tests.deployments.support.fakes import TEMPLATE, byte_tokenizer
from tests.deployments.support.own_tokenizers import save_tokenizer, with_tokens

TEXTS = ["plain", "<|end|>x <eos>", " a <tool> \u00e9\ufb01 <pad>", "\U0001f600<sep/>"]


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_tokenizer(tmp_path_factory.mktemp("base"), byte_tokenizer())
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def own_vocabulary(base_folder: Path, folder: Path) -> Vocabulary:
    base = describe_text(base_folder, 300)
    raw = read_own_tokenizer(folder, base.tokenizer, base.refusal, 300)
    assert raw is not None
    return Vocabulary.load(base_folder).with_own(parse_own_tokenizer(raw, "x"))


def normalized() -> Tokenizer:
    tokenizer = with_tokens("<|end|>")
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    return tokenizer


def with_bos() -> Tokenizer:
    tokenizer = with_tokens("<|end|>")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|end|> $A <eos>", special_tokens=[("<|end|>", 258), ("<eos>", 256)]
    )
    return tokenizer


def spaced() -> Tokenizer:
    tokenizer = with_tokens("<|end|>", plain=("<tool>", "<sep/>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    return tokenizer


OWN = [
    (with_tokens("<|end|>", plain=("<tool>", "<sep/>")), {"eos_token": "<|end|>"}, {}),
    (with_bos(), {"eos_token": "<eos>"}, {}),
]
MORE = [
    (normalized(), {"bos_token": "<|end|>"}, {}),
    (spaced(), {}, {}),
    (byte_tokenizer(), {"eos_token": "<pad>"}, {}),
    (with_tokens("<|end|>"), {}, {"split_special_tokens": True}),
    (with_tokens(plain=("<tool>",)), {}, {"extra_special_tokens": ["<tool>"]}),
]
OWN_AND_MORE = [*OWN, *(pytest.param(*each, marks=pytest.mark.slow) for each in MORE)]


@pytest.mark.parametrize(("tokenizer", "names", "config"), OWN_AND_MORE)
def test_it_encodes_and_decodes_as_transformers_does(
    tokenizer: Tokenizer,
    names: dict[str, str],
    config: dict[str, Any],
    base_folder: Path,
    tmp_path: Path,
) -> None:
    folder = save_tokenizer(tmp_path / "own", tokenizer, names, **config)
    theirs = AutoTokenizer.from_pretrained(folder)
    ours = own_vocabulary(base_folder, folder)
    for text in TEXTS:
        for add_special in (True, False):
            ids = theirs(text, add_special_tokens=add_special).input_ids
            assert ours.encode(text, add_special) == ids
            assert ours.encode_pieces([text], add_special, 100) == ids
        for skip in (True, False):
            shown = theirs.decode(ids, skip_special_tokens=skip)
            detokenizer = ours.detokenizer(skip)
            assert ours.decode(ids, skip) == shown
            assert detokenizer.push(ids) + detokenizer.flush() == shown
    assert ours.end_token_id == theirs.eos_token_id
    assert ours.longest_token == max(1, *(len(t) for t in theirs.added_tokens_encoder))


def test_the_base_stays_as_it_was_and_outlives_it(base_folder: Path, tmp_path: Path) -> None:
    base = Vocabulary.load(base_folder)
    folder = save_tokenizer(tmp_path / "own", with_tokens("<|end|>"), {"eos_token": "<|end|>"})
    described = describe_text(base_folder, 300)
    raw = read_own_tokenizer(folder, described.tokenizer, described.refusal, 300)
    assert raw is not None
    own = base.with_own(parse_own_tokenizer(raw, "x"))
    assert base.encode("<|end|>", False) == list(b"<|end|>") and own.encode("<|end|>", False) == [
        258
    ]
    assert own.has_template and base.end_token_id == 256
    del own
    gc.collect()
    assert base.encode("<eos>", False) == [256]


def test_a_base_extended_by_tokens_is_told_from_one_whose_tokens_have_changed(
    base_folder: Path, tmp_path: Path
) -> None:
    base = Vocabulary.load(base_folder)
    more = save_tokenizer(tmp_path / "more", with_tokens("<|end|>"), {"eos_token": "<|end|>"})
    assert own_vocabulary(base_folder, more).extends(base)
    renamed = Tokenizer.from_str(byte_tokenizer().to_str().replace("<pad>", "<other>"))
    other = save_tokenizer(tmp_path / "other", renamed, {"eos_token": "<eos>"})
    assert not own_vocabulary(base_folder, other).extends(base)
    letter = byte_tokenizer()
    letter.add_special_tokens(["a"])
    hidden = save_tokenizer(tmp_path / "hidden", letter, {"eos_token": "<eos>"})
    assert not own_vocabulary(base_folder, hidden).extends(base)


def test_another_model_than_it_was_made_for_is_refused(base_folder: Path, tmp_path: Path) -> None:
    folder = save_tokenizer(tmp_path / "own", with_tokens("<|end|>"))
    described = describe_text(base_folder, 300)
    raw = read_own_tokenizer(folder, described.tokenizer, described.refusal, 300)
    assert raw is not None
    tokenizer = byte_tokenizer().to_str().replace('"\u0100":0', '"\u0100\u0100":0')
    other = save_tokenizer(tmp_path / "other", Tokenizer.from_str(tokenizer))
    with pytest.raises(TokenizerRefused, match="another tokenizer"):
        Vocabulary.load(other).with_own(parse_own_tokenizer(raw, "x"))

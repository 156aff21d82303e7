"""What adapters bring beside their weights, from a folder to the store and back."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

from adapter_store import own_tokenizer, tokenizer_file
from adapter_store.errors import AdapterInvalid, StoreCorrupt
from adapter_store.generation_settings import GENERATION_NAME, RANGES, GenerationSettings
from adapter_store.names import AdapterRef
from adapter_store.own_files import NO_OWN_FILES
from adapter_store.own_tokenizer import TOKENIZER_NAME
from adapter_store.store import AdapterStore
from engine.scheduler.request import InvalidRequest, SamplingParams
from tests.adapter_store.adapters import changed
from tests.adapter_store.roots import Root

LETTERS = [chr(code) for code in range(ord("a"), ord("z") + 1)]  # the base has 64 rows
Publish = Callable[[Path], AdapterRef]
Change = Callable[[Tokenizer], object]


def tokenizer(change: Change | None = None, merges: int = 1) -> Tokenizer:
    pairs = [("a", "b"), ("c", "d")][:merges]
    tokens = [*LETTERS, *(first + second for first, second in pairs)]
    vocabulary = {token: at for at, token in enumerate(tokens)}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=pairs))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken("<eos>", special=True), AddedToken("<pad>", special=True)])
    if change is not None:
        change(made)
    return made


def save(folder: Path, made: Tokenizer, **names: str) -> Path:
    names = {"eos_token": "<eos>", **names}
    PreTrainedTokenizerFast(tokenizer_object=made, **names).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def text_base(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text") / "base"
    shutil.copytree(base_folder, folder)
    (folder / "chat_template.jinja").write_text("{{ messages }}{{ eos_token }}")
    return save(folder, tokenizer())


@pytest.fixture
def store(tmp_path: Path, file_root: Root, text_base: Path) -> AdapterStore:
    store = AdapterStore(file_root.url, tmp_path / "cache", 2**30)
    store.register_base(text_base)
    return store


@pytest.fixture
def publish(store: AdapterStore) -> Publish:
    return lambda folder: store.publish(folder, "public", "own")


@pytest.fixture
def own(peft_folder: Path, tmp_path: Path) -> Path:
    return changed(peft_folder, tmp_path / "own")


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_the_bases_own_files_cost_nothing(
    store: AdapterStore, publish: Publish, own: Path, peft_folder: Path, text_base: Path
) -> None:
    theirs = AutoTokenizer.from_pretrained(text_base)
    theirs.pad_token = "<pad>"
    theirs("text", truncation=True, max_length=7)  # which trainers leave in the file
    theirs.save_pretrained(own)
    path = own / TOKENIZER_NAME
    merges = {"merges": ["a b"]}  # as older versions write them
    edit(path, model=json.loads(path.read_text())["model"] | merges)
    assert path.read_bytes() != (text_base / TOKENIZER_NAME).read_bytes()
    ref = publish(own)
    assert ref == publish(peft_folder)
    assert store.is_bare(ref) and store.own_files(ref) == NO_OWN_FILES


def test_what_differs_is_kept_without_the_vocabulary(
    store: AdapterStore, publish: Publish, own: Path, peft_folder: Path, file_root: Root
) -> None:
    save(own, tokenizer(lambda t: t.add_special_tokens(["<|end|>"])), eos_token="<|end|>")
    ref = publish(own)
    assert ref.digest != publish(peft_folder).digest
    found = store.own_files(ref).tokenizer
    assert found is not None and not store.is_bare(ref)
    assert [(t["id"], t["content"]) for t in found.added_tokens][-1] == (29, "<|end|>")
    assert found.special_tokens == {"eos_token": "<|end|>"}
    stored = file_root.open().get(f"blobs/{ref.digest}/{TOKENIZER_NAME}")
    assert b'"merges"' not in stored and b'"vocab"' not in stored
    assert store.verify(store.list()) == []
    assert TOKENIZER_NAME in {path.name for path in store.ensure_local(ref).iterdir()}


def test_names_alone_may_differ(store: AdapterStore, publish: Publish, own: Path) -> None:
    found = store.own_files(publish(save(own, tokenizer(), eos_token="<pad>"))).tokenizer
    assert found is not None and found.special_tokens == {"eos_token": "<pad>"}


def test_a_damaged_file_is_not_used(
    store: AdapterStore, publish: Publish, own: Path, file_root: Root
) -> None:
    ref = publish(save(own, tokenizer(), eos_token="<pad>"))
    file_root.open().put(f"blobs/{ref.digest}/{TOKENIZER_NAME}", b"{}")
    with pytest.raises(StoreCorrupt, match=TOKENIZER_NAME):
        store.own_files(ref)


def many(made: Tokenizer) -> None:
    made.add_tokens([f"<{at}>" for at in range(20)])


def set_normalizer(normalizer: normalizers.Normalizer) -> Change:
    return lambda made: setattr(made, "normalizer", normalizer)


def set_words(words: pre_tokenizers.PreTokenizer) -> Change:
    return lambda made: setattr(made, "pre_tokenizer", words)


REFUSED: list[tuple[Change | None, int, str]] = [
    (None, 2, "its model .* is not its base's"),
    (lambda t: t.add_tokens([f"<{at}>" for at in range(36)]), 1, r"token id 64 is outside 0\.\.63"),
    (set_normalizer(normalizers.Replace(Regex("(a+)+$"), "")), 1, "no limit of time and memory"),
    (many, 1, "at most 8 are taken"),
]
MORE: list[tuple[Change | None, int, str]] = [
    (lambda t: t.add_tokens(["<" + 300 * "x"]), 1, "at most 256"),
    (set_normalizer(normalizers.Replace("a", 1000 * "a")), 1, "no limit of time and memory"),
    (set_words(pre_tokenizers.Split(Regex("(x*)*y"), "isolated")), 1, "no limit of time"),
    (lambda t: setattr(t, "decoder", decoders.Metaspace()), 1, "its decoder has the steps"),
]


SLOW = [pytest.param(*each, marks=pytest.mark.slow) for each in MORE]


@pytest.mark.parametrize(("change", "merges", "message"), [*REFUSED, *SLOW])
def test_a_tokenizer_that_cannot_be_served_is_refused(
    change: Change | None,
    merges: int,
    message: str,
    publish: Publish,
    own: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(own_tokenizer, "MAX_ADDED_TOKENS", 8 if change is many else 100)
    save(own, tokenizer(change, merges))
    with pytest.raises(AdapterInvalid, match=message) as caught:
        publish(own)
    assert "the base's is used" in str(caught.value)


CONFIG, SPECIAL = "tokenizer_config.json", "special_tokens_map.json"
MISFITS = [
    (TOKENIZER_NAME, "{", "cannot be served"),
    (CONFIG, '{"eos_token": "<new>"}', "eos_token '<new>' is none"),
    ("added_tokens.json", '{"<new>": 29}', "added_tokens.json '<new>' is none"),
    (SPECIAL, '{"eos_token": "<new>"}', "eos_token '<new>' is none"),
]
MORE_MISFITS = [
    (TOKENIZER_NAME, "[]", "cannot be served"),
    (CONFIG, '{"extra_special_tokens": ["<new>"]}', "'<new>' is none"),
    (SPECIAL, "[]", "settings cannot be read"),
]
SLOW_MISFITS = [pytest.param(*each, marks=pytest.mark.slow) for each in MORE_MISFITS]


@pytest.mark.parametrize(("name", "content", "message"), [*MISFITS, *SLOW_MISFITS])
def test_files_that_do_not_fit_each_other_are_refused(
    name: str, content: str, message: str, publish: Publish, own: Path
) -> None:
    save(own, tokenizer())
    (own / name).write_text(content)
    with pytest.raises(AdapterInvalid, match=message):
        publish(own)


def test_an_added_token_with_an_id_that_it_would_not_get_is_refused(
    publish: Publish, own: Path
) -> None:
    save(own, tokenizer(lambda t: t.add_special_tokens(["<|end|>"])))
    path = own / TOKENIZER_NAME
    path.write_text(path.read_text().replace('"id": 29', '"id": 40'))
    with pytest.raises(AdapterInvalid, match="has the id 40, and would get 29"):
        publish(own)


def test_a_tokenizer_without_the_fast_file_is_refused(publish: Publish, own: Path) -> None:
    (own / "tokenizer.model").write_bytes(b"")
    with pytest.raises(AdapterInvalid, match=r"tokenizer.model but no tokenizer.json"):
        publish(own)


def test_a_file_that_is_too_large_is_refused_unread(
    publish: Publish, own: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(own, tokenizer())
    monkeypatch.setattr(tokenizer_file, "MAX_FILE_BYTES", 100)
    with pytest.raises(AdapterInvalid, match="at most 100 are taken"):
        publish(own)


def test_a_base_that_was_registered_before_is_described_anew(
    store: AdapterStore, publish: Publish, own: Path, text_base: Path, file_root: Root
) -> None:
    objects, [fingerprint] = file_root.open(), store.bases()
    key = f"bases/{fingerprint}.json"
    old = json.loads(objects.get(key))
    del old["text"]
    objects.put(key, json.dumps(old).encode())
    save(own, tokenizer(), eos_token="<pad>")
    with pytest.raises(AdapterInvalid, match="register it again"):
        publish(own)
    store.register_base(text_base)
    publish(own)


# ---- generation settings -------------------------------------------------------------------


def test_generation_settings_are_what_transformers_reads(
    store: AdapterStore, publish: Publish, own: Path
) -> None:
    written = GenerationConfig(
        temperature=0.5, top_p=0.9, top_k=7, eos_token_id=[3, 5], do_sample=True
    )
    written.save_pretrained(own)
    found = store.own_files(publish(own)).generation
    theirs = GenerationConfig.from_pretrained(own)
    assert found is not None and found.eos_token_ids == tuple(theirs.eos_token_id)
    assert found.sampling == {name: getattr(theirs, name) for name in found.sampling}
    assert set(found.sampling) == {"temperature", "top_p", "top_k"}


def test_settings_that_name_nothing_are_settings(
    store: AdapterStore, publish: Publish, own: Path
) -> None:
    (own / GENERATION_NAME).write_text('{"top_k": -1, "max_length": 5}')
    assert store.own_files(publish(own)).generation == GenerationSettings(None, {"top_k": 0})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "not a JSON object"),
        ("{", "generation_config.json"),
        ('{"temperature": "hot"}', "temperature='hot' is no number"),
        ('{"temperature": true}', "temperature=True is no number"),
        ('{"top_k": 1.5}', "top_k=1.5 is no whole number"),
        ('{"top_p": NaN}', r"top_p must be in \(0.0, 1.0\], not nan"),
        ('{"eos_token_id": 64}', r"eos_token_id 64 is no token id in 0\.\.63"),
        ('{"eos_token_id": [1, "x"]}', "eos_token_id 'x' is no token id"),
        (json.dumps({"eos_token_id": [1] * 65}), "at most 64"),
    ],
)
def test_settings_that_cannot_be_used_are_refused(
    content: str, message: str, publish: Publish, own: Path
) -> None:
    (own / GENERATION_NAME).write_text(content)
    with pytest.raises(AdapterInvalid, match=message):
        publish(own)


@pytest.mark.parametrize("name", RANGES)
def test_ranges_are_those_of_requests(name: str) -> None:
    least, most, is_open = RANGES[name]
    step = 1 if name == "top_k" else 1e-9
    for value in (least, least + step, most):
        if value == least and is_open:
            continue
        SamplingParams(**{name: value})
    for value in (least - step, most + most * 1e-6 + step, *([least] if is_open else [])):
        with pytest.raises(InvalidRequest):
            SamplingParams(**{name: value})

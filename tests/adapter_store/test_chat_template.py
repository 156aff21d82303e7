"""An adapter's own chat template, from its folder to the store and back."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from adapter_store.chat_template import (
    MAX_TEMPLATE_CHARS,
    MAX_TOKEN_CHARS,
    TEMPLATE_NAME,
    AdapterTemplate,
)
from adapter_store.errors import AdapterInvalid, ObjectNotFound, StoreCorrupt
from adapter_store.manifest import PreparedAdapter
from adapter_store.own_files import NO_OWN_FILES
from adapter_store.store import AdapterStore
from tests.adapter_store.adapters import changed
from tests.adapter_store.roots import Root

SOURCE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %} é"
Check = Callable[[Path], PreparedAdapter]
NewStore = Callable[..., AdapterStore]


@pytest.fixture
def store(new_store: NewStore, base_folder: Path) -> AdapterStore:
    store = new_store()
    store.register_base(base_folder)
    return store


def with_files(peft_folder: Path, folder: Path, source: str | None, **config: Any) -> Path:
    changed(peft_folder, folder)
    if source is not None:
        (folder / "chat_template.jinja").write_text(source, encoding="utf-8")
    if config:
        (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def test_a_template_comes_back_as_it_was(
    store: AdapterStore, new_store: NewStore, peft_folder: Path, tmp_path: Path
) -> None:
    eos = {"__type": "AddedToken", "content": "</s>"}
    folder = with_files(peft_folder, tmp_path / "own", SOURCE, bos_token="<s>", eos_token=eos)
    ref = store.publish(folder, "public", "own")
    tokens = {"bos_token": "<s>", "eos_token": "</s>"}
    assert new_store().own_files(ref).template == AdapterTemplate(SOURCE, tokens)
    assert store.verify(store.list()) == []
    names = {path.name for path in new_store().ensure_local(ref).iterdir()}
    assert TEMPLATE_NAME in names


def test_an_adapter_without_one_has_none_and_its_digest_stays(
    store: AdapterStore, peft_folder: Path, tmp_path: Path
) -> None:
    plain = store.publish(peft_folder, "public", "plain")
    assert store.own_files(plain) == NO_OWN_FILES
    tokens_alone = with_files(peft_folder, tmp_path / "tokens", None, eos_token="</s>")
    assert store.publish(tokens_alone, "public", "plain") == plain


def test_the_template_is_part_of_the_digest(
    check: Check, peft_folder: Path, tmp_path: Path
) -> None:
    def digest(name: str, source: str, **config: Any) -> str:
        folder = with_files(peft_folder, tmp_path / name, source, **config)
        return check(folder).manifest.digest

    one = digest("one", SOURCE)
    assert digest("same", SOURCE) == one
    others = {digest("other", SOURCE + "!"), digest("tokens", SOURCE, eos_token="</s>")}
    assert len(others | {one, check(peft_folder).manifest.digest}) == 4
    inline = with_files(peft_folder, tmp_path / "inline", None, chat_template=SOURCE)
    assert check(inline).manifest.digest == one


@pytest.mark.parametrize(
    ("source", "config", "message"),
    [
        ("x" * (MAX_TEMPLATE_CHARS + 1), {}, f"at most {MAX_TEMPLATE_CHARS}"),
        (None, {"chat_template": 7}, "not a text"),
        (None, {"chat_template": [{"name": "default"}]}, "cannot be read"),
        (SOURCE, {"eos_token": "x" * (MAX_TOKEN_CHARS + 1)}, f"at most {MAX_TOKEN_CHARS}"),
        (SOURCE, {"eos_token": {}}, "cannot be read"),
    ],
)
def test_a_template_that_cannot_be_kept_is_refused(
    source: str | None,
    config: dict[str, Any],
    message: str,
    check: Check,
    peft_folder: Path,
    tmp_path: Path,
) -> None:
    with pytest.raises(AdapterInvalid, match=message):
        check(with_files(peft_folder, tmp_path / "own", source, **config))


def test_a_tokenizer_config_that_is_no_object_is_refused(
    check: Check, peft_folder: Path, tmp_path: Path
) -> None:
    folder = with_files(peft_folder, tmp_path / "own", SOURCE)
    for damaged in (b"[]", b"{", b"\xff"):
        (folder / "tokenizer_config.json").write_bytes(damaged)
        with pytest.raises(AdapterInvalid, match="chat template"):
            check(folder)


def test_the_longest_template_is_kept_whole(
    store: AdapterStore, peft_folder: Path, tmp_path: Path
) -> None:
    source = "\U0001f600" * MAX_TEMPLATE_CHARS
    ref = store.publish(with_files(peft_folder, tmp_path / "own", source), "public", "own")
    assert store.own_files(ref).template == AdapterTemplate(source, {})


def test_a_damaged_template_is_not_used_and_verify_names_it(
    store: AdapterStore, root: Root, peft_folder: Path, tmp_path: Path
) -> None:
    ref = store.publish(with_files(peft_folder, tmp_path / "own", SOURCE), "public", "own")
    key = f"blobs/{ref.digest}/{TEMPLATE_NAME}"
    root.open().put(key, b'{"source": "other", "special_tokens": {}}')
    with pytest.raises(StoreCorrupt, match=TEMPLATE_NAME):
        store.own_files(ref)
    assert [TEMPLATE_NAME in problem for problem in store.verify(store.list())] == [True]
    root.remove(key)
    with pytest.raises(ObjectNotFound):
        store.own_files(ref)

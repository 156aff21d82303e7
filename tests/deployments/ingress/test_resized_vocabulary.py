"""An adapter with its own tokens and rows for them: published, served by name, next to its base."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from adapter_store.errors import AdapterInvalid
from adapter_store.names import AdapterRef
from adapter_store.own_files import NO_OWN_FILES, OwnFiles
from adapter_store.store import AdapterStore
from deployments.text.vocabulary import Vocabulary
from engine.messages import AdapterFolder, GenerateRequest
from tests.adapter_store.adapters import changed
from tests.deployments.support.fakes import Server, byte_tokenizer, in_server
from tests.deployments.support.own_tokenizers import save_tokenizer, with_tokens
from tests.deployments.support.real_engine import FolderStore, RealEngine
from tests.engine.support.driver import greedy, make_engine, run
from tests.engine.support.kinds import load_with_peft, write_kind
from tests.engine.support.tiny import write_tiny

COMPLETIONS = "/v1/completions"
FEWER = 200
END, TOOL, ROWS = 258, 259, 260  # <|end|> and <tool>, of which the base has neither row nor token
PROMPT = "call <tool> now"
LM_HEAD = "base_model.model.lm_head"


class Shelf:
    def __init__(self, folder: Path) -> None:
        self.base, self.folder = folder / "base", folder / "adapter"
        write_tiny(self.base, vocab_size=END, eos_token_id=256)
        save_tokenizer(self.base, byte_tokenizer())
        saved = {"modules_to_save": ["embed_tokens", "lm_head"]}
        self.adapter = write_kind(self.base, self.folder, vocab_size=ROWS, **saved)
        tokenizer = with_tokens("<|end|>", plain=("<tool>",))
        save_tokenizer(self.folder, tokenizer, {"eos_token": "<|end|>"})
        root = f"file://{folder}/store"
        self.store = AdapterStore(root, folder / "cache", 2**30)
        self.store.register_base(self.base)
        self.ref = self.store.publish(self.folder, "public", "own")
        self.elsewhere = AdapterStore(root, folder / "cache2", 2**30)

    def serve(self, test: Callable[[Server], Any]) -> None:
        ref, store = self.elsewhere.resolve("public", "own"), self.elsewhere

        class RealStore(FolderStore):
            def own_files(self, ref_or_digest: AdapterRef | str) -> OwnFiles:
                return store.own_files(ref_or_digest)

        folders = RealStore(own=store.ensure_local(ref))
        folders.refs["own"] = replace(ref, base=folders.refs["own"].base)
        vocabulary = Vocabulary.load(self.base)
        in_server(test, engine=RealEngine(self.base), store=folders, vocabulary=vocabulary)


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Shelf:
    return Shelf(tmp_path_factory.mktemp("shelf"))


def test_every_reader_of_the_store_knows_the_number_of_rows(shelf: Shelf) -> None:
    assert shelf.ref == shelf.elsewhere.resolve("public", "own")
    assert shelf.ref.vocab_size == shelf.store.manifest(shelf.ref).vocab_size == ROWS


@torch.inference_mode()
def test_new_tokens_are_read_made_and_written_as_text(shelf: Shelf) -> None:
    theirs = AutoTokenizer.from_pretrained(shelf.folder)
    ids = theirs(PROMPT, return_tensors="pt").input_ids
    assert TOOL in ids[0]
    model = load_with_peft(shelf.base, AdapterFolder("x", str(shelf.folder), ROWS))
    kinds = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    made = model.generate(input_ids=ids, sequence_bias={(TOOL,): 4.0}, **kinds)
    expected = made[0, ids.shape[1] :].tolist()
    assert TOOL in expected

    async def test(server: Server) -> None:
        fields = {"prompt": PROMPT, "temperature": 0, "max_tokens": 12, "ignore_eos": True}
        fields |= {"return_token_ids": True, "logit_bias": {str(TOOL): 4.0}}
        answer = await server.post(COMPLETIONS, model="own", logprobs=1, **fields)
        [choice] = answer.json["choices"]
        assert choice["token_ids"] == expected
        assert choice["text"] == theirs.decode(expected, skip_special_tokens=True)
        assert "<tool>" in choice["text"] and "<tool>" in choice["logprobs"]["tokens"]
        fields |= {"logit_bias": {str(END): 100}, "ignore_eos": False}
        [choice] = (await server.post(COMPLETIONS, model="own", **fields)).json["choices"]
        assert choice["token_ids"] == [END] and choice["finish_reason"] == "stop"

    shelf.serve(test)


def test_ids_beyond_the_bases_are_the_adapters_alone(shelf: Shelf) -> None:
    grammar = {"structured_outputs": {"choice": ["yes", "no"]}}
    named = {"stop_token_ids": [TOOL], "allowed_token_ids": [TOOL], "prompt": [TOOL]}

    async def test(server: Server) -> None:
        for name, value in named.items():
            fields = {"prompt": "a", "max_tokens": 1, name: value}
            assert (await server.post(COMPLETIONS, model="own", **fields)).status == 200
            refused = await server.post(COMPLETIONS, model="base", **fields)
            assert refused.status == 400 and f"token id {TOOL}" in refused.error["message"]
            refused = await server.post(COMPLETIONS, model="own", **{**fields, name: [ROWS]})
            assert refused.status == 400 and f"0..{ROWS - 1}" in refused.error["message"]
        fields = {"prompt": PROMPT, "logit_bias": {str(TOOL): 100}, "max_tokens": 9}
        answer = await server.post(COMPLETIONS, model="own", **fields, **grammar)
        assert answer.json["choices"][0]["text"] in ("yes", "no"), answer.body
        tag = {"begin": "<tool>", "schema": {"type": "integer"}, "end": "!"}
        tag = {"structures": [tag], "triggers": ["<tool>"]}
        marked = {"structured_outputs": {"structural_tag": json.dumps(tag)}}
        refused = await server.post(COMPLETIONS, model="own", **fields, **marked)
        assert refused.status == 400 and "only the adapter has" in refused.error["message"]
        shown = await server.post("/detokenize", model="own", tokens=[97, TOOL])
        assert shown.json["prompt"] == "a<tool>"
        assert (await server.post("/detokenize", model="base", tokens=[97, TOOL])).status == 400

    shelf.serve(test)


@pytest.mark.parametrize(
    ("tensors", "reason"),
    [
        (lambda t: {n: v for n, v in t.items() if not n.startswith(LM_HEAD)}, "lm_head too"),
        (lambda t: t | {f"{LM_HEAD}.weight": t[f"{LM_HEAD}.weight"][:-1]}, "259 rows of"),
    ],
)
def test_rows_must_be_there_for_every_token(
    tensors: Callable[..., Any], reason: str, shelf: Shelf, tmp_path: Path
) -> None:
    config = {"modules_to_save": ["embed_tokens"]} if "too" in reason else {}
    folder = changed(shelf.folder, tmp_path / "a", config=config, tensors=tensors)
    with pytest.raises(AdapterInvalid, match=reason):
        shelf.store.publish(folder, "public", "bad")


def test_the_number_of_new_rows_is_limited(shelf: Shelf, tmp_path: Path) -> None:
    tall = np.zeros((END + 8193, 64), np.float32)

    def enlarged(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {n: tall if v.shape == (ROWS, 64) else v for n, v in tensors.items()}

    folder = changed(shelf.folder, tmp_path / "a", tensors=enlarged)
    with pytest.raises(AdapterInvalid, match="8451 token ids, the base 258; at most 8192 more"):
        shelf.store.publish(folder, "public", "bad")
    outside = AdapterFolder("tall", str(folder), END + 8193)
    request = GenerateRequest("r", [1], greedy(1), adapter_folder=outside)
    [result] = run(make_engine(shelf.base), [request]).values()
    assert result.last and result.last.error and "at most 8192 more" in result.last.error.message


def test_an_adapter_that_lacks_some_of_the_bases_ids_is_not_asked_for_them(
    shelf: Shelf, tmp_path: Path
) -> None:
    saved = {"modules_to_save": ["embed_tokens", "lm_head"]}
    smaller = write_kind(shelf.base, tmp_path / "adapter", vocab_size=FEWER, **saved)
    ref = shelf.store.publish(Path(smaller.path), "public", "smaller")
    assert ref.vocab_size == FEWER
    store = FolderStore(own=shelf.store.ensure_local(ref))
    store.refs["own"] = replace(ref, name="own", base=store.refs["own"].base)

    async def test(server: Server) -> None:
        fields = {"max_tokens": 4, "logprobs": 5, "prompt": "abc"}
        assert (await server.post(COMPLETIONS, model="own", **fields)).status == 200
        for name, value in {"prompt": [FEWER], "stop_token_ids": [FEWER]}.items():
            refused = await server.post(COMPLETIONS, model="own", **fields | {name: value})
            assert refused.status == 400 and f"0..{FEWER - 1}" in refused.error["message"]
            assert (await server.post(COMPLETIONS, **fields | {name: value})).status == 200
        fields["structured_outputs"] = {"choice": ["yes", "no"]}
        refused = await server.post(COMPLETIONS, model="own", **fields)
        assert refused.status == 400
        assert f"has {FEWER} token ids, and its base's tokenizer" in refused.error["message"]

    vocabulary = Vocabulary.load(shelf.base)
    in_server(test, engine=RealEngine(shelf.base), store=store, vocabulary=vocabulary)


def test_new_ids_without_a_tokenizer_have_no_text(shelf: Shelf) -> None:
    async def test(server: Server) -> None:
        server.store.own_files = lambda ref: NO_OWN_FILES
        fields = {"prompt": [TOOL, 97], "max_tokens": 2, "echo": True, "logprobs": 1}
        answer = await server.post(COMPLETIONS, model="own", logit_bias={str(TOOL): 100}, **fields)
        [choice] = answer.json["choices"]
        assert choice["text"] == "a" and choice["logprobs"]["tokens"][1] == "a", choice

    shelf.serve(test)


def test_own_tokens_need_rows(shelf: Shelf, tmp_path: Path) -> None:
    folder = changed(shelf.folder, tmp_path / "a")
    tokenizer = with_tokens("<|end|>", plain=("<tool>", "<more>"))
    save_tokenizer(folder, tokenizer, {"eos_token": "<|end|>"})
    with pytest.raises(AdapterInvalid, match=rf"token id {ROWS} is outside 0\.\.{ROWS - 1}"):
        shelf.store.publish(folder, "public", "bad")

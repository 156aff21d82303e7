"""Adapters that bring their own tokenizer, generation settings or formats, through the routes."""

import json
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from adapter_store.base_text import describe_text
from adapter_store.chat_template import AdapterTemplate
from adapter_store.generation_settings import GenerationSettings
from adapter_store.own_files import OwnFiles
from adapter_store.own_tokenizer import OwnTokenizer, parse_own_tokenizer, read_own_tokenizer
from adapter_store.recipes import make_recipe
from adapter_store.store import AdapterStore
from deployments.ingress.tool_format_rules import ToolFormatRule
from deployments.text.vocabulary import Vocabulary
from engine.messages import GenerateRequest
from engine.scheduler.request import SamplingDefaults
from tests.deployments.support.fakes import (
    EOS,
    INFO,
    TEMPLATE,
    FakeEngine,
    FakeStore,
    Server,
    byte_tokenizer,
    encode,
    in_server,
)
from tests.deployments.support.own_tokenizers import save_tokenizer, with_tokens
from tests.deployments.support.real_engine import FolderStore, RealEngine
from tests.deployments.support.tiny_models import make_adapter
from tests.deployments.support.tool_templates import template_of
from tests.engine.support.tiny import write_tiny

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
SCHEMA = {"structured_outputs": {"json": {"type": "object"}}}
END = 258  # <|end|>, which the base has not
ROWS = 300


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_tokenizer(tmp_path_factory.mktemp("base"), byte_tokenizer())
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


Own = Callable[..., OwnTokenizer]


@pytest.fixture
def own(base_folder: Path, tmp_path: Path) -> Own:
    base = describe_text(base_folder, ROWS)

    def make(tokenizer: Tokenizer, **names: str) -> OwnTokenizer:
        folder = save_tokenizer(tmp_path / "own", tokenizer, names)
        raw = read_own_tokenizer(folder, base.tokenizer, base.refusal, ROWS)
        assert raw is not None
        return parse_own_tokenizer(raw, "x")

    return make


def answer_of(*token_ids: int) -> FakeEngine:
    engine = FakeEngine(lambda request: list(token_ids))
    named, defaults = (EOS,), SamplingDefaults(temperature=0.25, top_k=9)
    engine.info = replace(
        INFO, vocab_size=ROWS, named_eos_token_ids=named, sampling_defaults=defaults
    )
    return engine


def serve(
    test: Callable[[Server], Awaitable[None]],
    base_folder: Path,
    engine: FakeEngine,
    **brought: OwnFiles,
) -> None:
    store = FakeStore("plain", *brought)
    for name, files in brought.items():
        store.brought[name] = store.brought[f"{name}-digest"] = files
    in_server(test, engine=engine, store=store, vocabulary=Vocabulary.load(base_folder))


def sampling(server: Server) -> Any:
    return server.engine.requests[-1].sampling


def renamed() -> Tokenizer:
    """One whose <pad> is another token."""
    return Tokenizer.from_str(byte_tokenizer().to_str().replace("<pad>", "<new>"))


def test_prompts_and_answers_are_in_the_adapters_tokens(own: Own, base_folder: Path) -> None:
    tokenizer = with_tokens("<|end|>", plain=("<tool>",))
    files = OwnFiles(tokenizer=own(tokenizer, eos_token="<|end|>"))
    engine = answer_of(*encode("hi"), 259, END, 7)

    async def test(server: Server) -> None:
        answer = await server.post(COMPLETIONS, model="own", prompt="a<tool><|end|>")
        assert server.engine.requests[-1].prompt_token_ids == [97, 259, END]
        assert answer.json["choices"][0]["text"] == "hi<tool>"
        assert answer.json["choices"][0]["finish_reason"] == "stop"
        chat = {"messages": [{"role": "user", "content": "<tool>"}], "max_tokens": 9}
        answer = await server.post(CHAT, model="own", **chat)
        prompt = [*encode("user:"), 259, *encode(";")]
        assert server.engine.requests[-1].prompt_token_ids == prompt
        assert answer.json["choices"][0]["message"]["content"] == "hi<tool>"
        await server.post(COMPLETIONS, model="plain", prompt="<tool>")
        assert server.engine.requests[-1].prompt_token_ids == encode("<tool>")
        assert sampling(server).eos_token_ids is None

    serve(test, base_folder, engine, own=files)


def test_tokens_are_shown_as_the_adapters(own: Own, base_folder: Path) -> None:
    files = OwnFiles(tokenizer=own(with_tokens("<|end|>")))

    async def test(server: Server) -> None:
        for model, tokens in (("own", [97, END]), ("plain", encode("a<|end|>"))):
            answer = await server.post("/tokenize", model=model, prompt="a<|end|>")
            assert answer.json["tokens"] == tokens
            answer = await server.post("/detokenize", model=model, tokens=[97, END])
            assert answer.json["prompt"] == ("a<|end|>" if model == "own" else "a")

    serve(test, base_folder, answer_of(EOS), own=files)


@pytest.mark.parametrize(
    ("names", "generation", "ends"),
    [
        ({"eos_token": "<|end|>"}, None, (EOS, END)),
        ({}, None, (EOS,)),
        ({"eos_token": "<|end|>"}, GenerationSettings((5, 6)), (5, 6, END)),
        (None, GenerationSettings((5,)), (5, EOS)),
        (None, GenerationSettings(None, {"top_k": 3}), None),
    ],
)
def test_end_tokens_are_as_if_the_files_lay_in_the_bases_folder(
    names: dict[str, str] | None,
    generation: GenerationSettings | None,
    ends: tuple[int, ...] | None,
    own: Own,
    base_folder: Path,
) -> None:
    tokenizer = None if names is None else own(with_tokens("<|end|>"), **names)

    async def test(server: Server) -> None:
        await server.post(COMPLETIONS, model="own", prompt="x")
        assert sampling(server).eos_token_ids == ends
        await server.post(COMPLETIONS, model="own", prompt="x", **SCHEMA)
        with_base = None if ends is None else tuple(dict.fromkeys((*ends, EOS)))
        assert sampling(server).eos_token_ids == with_base

    engine = answer_of(EOS)
    serve(test, base_folder, engine, own=OwnFiles(tokenizer=tokenizer, generation=generation))


def test_end_tokens_of_the_base_that_are_other_tokens_do_not_count(
    own: Own, base_folder: Path
) -> None:
    files, engine = OwnFiles(tokenizer=own(renamed(), eos_token="<eos>")), answer_of(EOS)
    engine.info = replace(engine.info, named_eos_token_ids=(EOS, 257))

    async def test(server: Server) -> None:
        await server.post(COMPLETIONS, model="own", prompt="x")
        assert sampling(server).eos_token_ids == (EOS,)

    serve(test, base_folder, engine, own=files)


def test_sampling_defaults_are_the_adapters(base_folder: Path) -> None:
    files = OwnFiles(generation=GenerationSettings(None, {"temperature": 0.5, "min_p": 0.1}))

    async def test(server: Server) -> None:
        def found() -> tuple[float, int, float]:
            return sampling(server).temperature, sampling(server).top_k, sampling(server).min_p

        await server.post(COMPLETIONS, model="own", prompt="x")
        assert found() == (0.5, 0, 0.1)
        await server.post(COMPLETIONS, model="own", prompt="x", temperature=0.75)
        assert found() == (0.75, 0, 0.1)
        await server.post(COMPLETIONS, model="plain", prompt="x")
        assert found() == (0.25, 9, 0.0)
        models = server.ingress.models.by_id
        models["base"] = replace(models["base"], has_sampling_defaults=False)
        await server.post(COMPLETIONS, model="own", prompt="x")
        assert found() == (1.0, 0, 0.0)

    serve(test, base_folder, answer_of(EOS), own=files)


def test_structured_output_needs_the_bases_tokens(own: Own, base_folder: Path) -> None:
    more, other = own(with_tokens("<|end|>")), own(renamed())

    async def test(server: Server) -> None:
        assert (await server.post(COMPLETIONS, model="more", prompt="x", **SCHEMA)).status == 200
        answer = await server.post(COMPLETIONS, model="other", prompt="x", **SCHEMA)
        assert (answer.status, answer.error["param"]) == (400, "structured_outputs.json")
        assert "its own tokenizer" in answer.error["message"]
        assert (await server.post(COMPLETIONS, model="other", prompt="x")).status == 200

    files = {"more": OwnFiles(tokenizer=more), "other": OwnFiles(tokenizer=other)}
    serve(test, base_folder, answer_of(EOS), **files)


def test_a_tokenizer_that_was_made_for_another_base_says_so(own: Own, base_folder: Path) -> None:
    files = OwnFiles(tokenizer=replace(own(with_tokens("<|end|>")), model_sha256="0" * 64))

    async def test(server: Server) -> None:
        answer = await server.post(COMPLETIONS, model="own", prompt="x")
        assert (answer.status, answer.error["param"]) == (400, "model")
        assert "made for another tokenizer" in answer.error["message"]

    serve(test, base_folder, answer_of(EOS), own=files)


def test_adapters_with_the_same_tokenizer_share_it(own: Own, base_folder: Path) -> None:
    files = OwnFiles(tokenizer=own(with_tokens("<|end|>")))

    async def test(server: Server) -> None:
        tenant = server.ingress.tenants.identify(None)
        targets = [await server.ingress.target(tenant, name) for name in ("one", "two", "plain")]
        one, two, plain = (target.vocabulary for target in targets)
        assert one is two is not plain

    serve(test, base_folder, answer_of(EOS), one=files, two=replace(files))


@pytest.mark.parametrize(("other", "status"), [("two", 200), ("plain", 400)])
def test_a_set_has_one_tokenizer(other: str, status: int, own: Own, base_folder: Path) -> None:
    files = OwnFiles(tokenizer=own(with_tokens("<|end|>")), generation=GenerationSettings((5,)))

    async def test(server: Server) -> None:
        make_recipe(["one-digest", f"{other}-digest"], [0.5, 0.5])
        answer = await server.post(COMPLETIONS, model=f"one:0.5+{other}:0.5", prompt="<|end|>")
        assert answer.status == status, answer.body
        if status == 200:
            assert server.engine.requests[-1].prompt_token_ids == [END]
            assert sampling(server).eos_token_ids == (5,)
        else:
            assert "different tokenizers" in answer.error["message"]

    serve(test, base_folder, answer_of(EOS), one=files, two=files)


def test_marks_of_calls_are_the_adapters_tokens(own: Own, base_folder: Path) -> None:
    tokenizer = own(with_tokens("<tool_call>", "</tool_call>", "<|end|>"), eos_token="<|end|>")
    files = OwnFiles(tokenizer=tokenizer)
    call = [258, *encode('{"name": "f", "arguments": {}}'), 259, 260]
    engine = FakeEngine(lambda request: call)
    engine.info = replace(INFO, vocab_size=ROWS, max_model_len=4096)
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]

    async def test(server: Server) -> None:
        server.store.templates["own"] = AdapterTemplate(template_of("hermes"), {})
        fields = {"messages": [{"role": "user", "content": "x"}], "tools": tools}
        answer = await server.post(CHAT, model="own", max_tokens=90, **fields)
        calls = answer.json["choices"][0]["message"]["tool_calls"]
        assert [each["function"]["name"] for each in calls] == ["f"]

    serve(test, base_folder, engine, own=files)


# ---- formats of the configuration ----------------------------------------------------------


def test_the_first_rule_that_fits_gives_an_adapters_tool_format(base_folder: Path) -> None:
    said = {"red": '<tool_call>{"name": "f", "arguments": {}}</tool_call>'}
    said["blue"] = '{"name": "f", "parameters": {}}'

    def answer(request: GenerateRequest) -> list[int]:
        assert request.adapter_folder is not None
        return [*encode(said[request.adapter_folder.digest.removesuffix("-digest")]), EOS]

    engine = FakeEngine(answer)
    engine.info = replace(INFO, max_model_len=4096)
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
    fields = {"messages": [{"role": "user", "content": "x"}], "tools": tools, "max_tokens": 90}
    rules = [ToolFormatRule("public/r?d@1", "hermes"), ToolFormatRule("*", "llama-3")]

    async def test(server: Server) -> None:
        models = server.ingress.models.by_id
        assert (await server.post(CHAT, model="red", **fields)).status == 400
        models["base"] = replace(models["base"], tool_formats=rules)
        for name in said:
            answered = await server.post(CHAT, model=name, **fields)
            assert answered.status == 200, answered.body
            calls = answered.json["choices"][0]["message"]["tool_calls"]
            assert [call["function"]["name"] for call in calls] == ["f"]
        assert (await server.post(CHAT, **fields)).status == 400  # the base's is its own

    serve(test, base_folder, engine, red=OwnFiles(), blue=OwnFiles())


@pytest.mark.parametrize(
    ("pattern", "fits"),
    [
        ("sql", True),
        ("s*", True),
        ("SQL", False),
        ("lab/sql", True),
        ("l?b/*@7", True),
        ("sql@7", True),
        ("sql@8", False),
        ("public/*", False),
        ("ql", False),
    ],
)
def test_patterns_name_adapters(pattern: str, fits: bool) -> None:
    from adapter_store.names import AdapterRef

    rule = ToolFormatRule(pattern, "hermes")
    assert rule.fits(AdapterRef("lab", "sql", 7, "0" * 64, "b" * 64)) is fits


# ---- with a real engine --------------------------------------------------------------------


@pytest.mark.slow
def test_an_answer_is_that_of_transformers_with_the_adapters_files(tmp_path: Path) -> None:
    """The whole way: publish the folder, serve it, compare with PEFT and AutoTokenizer on it."""
    base, folder = tmp_path / "base", tmp_path / "adapter"
    write_tiny(base, vocab_size=ROWS, eos_token_id=256)
    save_tokenizer(base, byte_tokenizer())
    make_adapter(folder, base, 4, seed=7)
    save_tokenizer(folder, with_tokens("<|end|>", plain=("<tool>",)), {"eos_token": "<|end|>"})
    theirs = AutoTokenizer.from_pretrained(folder)
    ids = theirs("call <tool> now<|end|>", return_tensors="pt").input_ids
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder).eval()
    with torch.inference_mode():
        free = model.generate(input_ids=ids, max_new_tokens=30, do_sample=False, eos_token_id=None)
    free = free[0, ids.shape[1] :].tolist()
    end = free[9]  # becomes an end token
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": end}))
    expected = free[: free.index(end)]

    store = AdapterStore(f"file://{tmp_path}/store", tmp_path / "cache", 2**30)
    store.register_base(base)
    ref = store.publish(folder, "public", "own")

    class RealStore(FolderStore):
        def own_files(self, ref_or_digest: Any) -> OwnFiles:
            return store.own_files(ref)

    async def test(server: Server) -> None:
        fields = {"prompt": "call <tool> now<|end|>", "temperature": 0, "max_tokens": 30}
        answer = await server.post(COMPLETIONS, model="own", return_token_ids=True, **fields)
        [choice] = answer.json["choices"]
        assert server.engine.requests[-1].prompt_token_ids == ids[0].tolist()
        assert choice["token_ids"] == [*expected, end]
        assert choice["finish_reason"] == "stop"
        assert choice["text"] == theirs.decode(expected, skip_special_tokens=True)

    vocabulary = Vocabulary.load(base)
    folders = RealStore(own=store.ensure_local(ref))
    in_server(test, engine=RealEngine(base), store=folders, vocabulary=vocabulary)

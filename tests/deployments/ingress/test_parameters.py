"""vLLM's further parameters, from the field to the engine and back."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers

from deployments.config_sections import IngressSection
from deployments.ingress.bad_words import encode_bad_words
from deployments.text.vocabulary import Vocabulary
from tests.deployments.support.fakes import Server, byte_vocabulary, in_server
from tests.deployments.support.real_engine import RealEngine
from tests.engine.support.tiny import write_tiny

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
PATHS = pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
DOCUMENTS = "{% for d in documents or [] %}<{{ d.title }}>{% endfor %}{{ messages[0].content }}"
OWN_TEMPLATES = IngressSection(max_body_bytes=100_000, request_chat_templates=True)


def prompt_of(path: str, text: str = "x") -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}]} if path == CHAT else {"prompt": text}


async def ask(server: Server, path: str, **fields: Any) -> Any:
    answer = await server.post(path, **{**prompt_of(path), **fields})
    assert answer.status == 200, answer.body
    return answer.json


# ---- with a real engine ----


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    write_tiny(folder, vocab_size=258, eos_token_id=256)
    return folder


@torch.inference_mode()
def logprobs_of(folder: Path, token_ids: list[int]) -> torch.Tensor:
    from tests.engine.support.tiny import load_reference

    model = load_reference(folder, torch.float32)
    return model(torch.tensor([token_ids])).logits[0].log_softmax(-1)


def test_prompt_logprobs_are_those_of_transformers(folder: Path) -> None:
    text = "The quick brown fox"
    ids = list(text.encode())
    exact = logprobs_of(folder, ids)

    async def test(server: Server) -> None:
        fields = {"prompt": text, "prompt_logprobs": 3, "max_tokens": 1, "n": 2}
        body = await ask(server, COMPLETIONS, **fields)
        first, *rest = body["choices"][0]["prompt_logprobs"]
        assert first is None and len(rest) == len(ids) - 1
        assert body["choices"][1]["prompt_logprobs"] == [first, *rest]
        for row, token_id, entry in zip(exact, ids[1:], rest, strict=False):
            top = row.topk(3).indices.tolist()
            assert list(entry) == list(dict.fromkeys(map(str, [token_id, *top])))
            for name, values in entry.items():
                assert values["logprob"] == pytest.approx(float(row[int(name)]), abs=1e-4)
                assert values["rank"] == int((row > row[int(name)]).sum()) + 1
            assert entry[str(token_id)]["decoded_token"] == chr(token_id)
        echoed = await ask(server, COMPLETIONS, **fields, echo=True, logprobs=1)
        assert echoed["choices"][0]["prompt_logprobs"][1:] == rest
        assert {len(t) for t in echoed["choices"][0]["logprobs"]["top_logprobs"][1:19]} <= {1, 2}

    in_server(test, engine=RealEngine(folder))


def test_the_best_answers_are_those_of_the_highest_mean_logprob(folder: Path) -> None:
    fields = {"prompt": ["one", "two"], "max_tokens": 9, "seed": 3, "temperature": 1.5}

    async def test(server: Server) -> None:
        every = await ask(server, COMPLETIONS, **fields, n=6, logprobs=0)
        best = await ask(server, COMPLETIONS, **fields, n=2, best_of=6)
        expected: list[str] = []
        for start in (0, 6):
            choices = every["choices"][start : start + 6]
            expected += [c["text"] for c in sorted(choices, key=_badness)[:2]]
        assert [c["text"] for c in best["choices"]] == expected
        assert [c["index"] for c in best["choices"]] == [0, 1, 2, 3]
        assert [c["logprobs"] for c in best["choices"]] == [None] * 4
        assert best["usage"] == every["usage"]

    in_server(test, engine=RealEngine(folder))


def _badness(choice: dict[str, Any]) -> float:
    values = choice["logprobs"]["token_logprobs"]
    return -sum(values) / len(values)


def test_an_answer_holds_no_bad_word_and_allowed_tokens_alone(folder: Path) -> None:
    fields = {"max_tokens": 60, "temperature": 2.0, "ignore_eos": True, "seed": 1}

    async def test(server: Server) -> None:
        fields["allowed_token_ids"] = list(b" abc")
        body = await ask(server, COMPLETIONS, **fields, n=4, bad_words=["ab", "c"])
        for choice in body["choices"]:
            assert set(choice["text"]) == set(" ab") and "ab" not in choice["text"]

    in_server(test, engine=RealEngine(folder))


# ---- what the engine gets ----


@PATHS
def test_fields_reach_the_engine(path: str) -> None:
    async def test(server: Server) -> None:
        await ask(
            server, path, bad_words=["ab", " ab", "c"], allowed_token_ids=[65, 66], priority=-3
        )
        assert server.engine.requests[0].priority == -3
        sampling = server.engine.requests[0].sampling
        assert sampling.bad_words == ((97, 98), (99,))
        assert sampling.allowed_token_ids == (65, 66)

    in_server(test)


@PATHS
def test_the_last_tokens_of_a_prompt_are_kept(path: str) -> None:
    async def test(server: Server) -> None:
        for keep, max_tokens, length in ((5, 3, 5), (-1, 28, 100), (-1, 1, 127)):
            fields = {**prompt_of(path, "x" * 300), "max_tokens": max_tokens}
            body = await ask(server, path, **fields, truncate_prompt_tokens=keep)
            ids = server.engine.requests[-1].prompt_token_ids
            assert len(ids) == length == body["usage"]["prompt_tokens"]
        if path == COMPLETIONS:
            await ask(server, path, prompt=[[1, 2, 3], [4]], truncate_prompt_tokens=2)
            kept = [r.prompt_token_ids for r in server.engine.requests[-2:]]
            assert kept == [[2, 3], [4]]

    in_server(test)


@PATHS
def test_tokens_may_be_named_by_their_ids(path: str) -> None:
    async def test(server: Server) -> None:
        logprobs: Any = {"logprobs": True, "top_logprobs": 1} if path == CHAT else {"logprobs": 1}
        body = await ask(server, path, **logprobs, return_tokens_as_token_ids=True)
        found = body["choices"][0]["logprobs"]
        first = found["content"][0]["token"] if path == CHAT else found["tokens"][0]
        ids = server.engine.answer(server.engine.requests[0])
        assert first == f"token_id:{ids[0]}"

    in_server(test)


@PATHS
def test_a_requests_own_id_names_the_answer_and_nothing_in_the_engine(path: str) -> None:
    async def test(server: Server) -> None:
        bodies = [await ask(server, path, request_id="mine") for _ in range(2)]
        prefix = "chatcmpl" if path == CHAT else "cmpl"
        assert [body["id"] for body in bodies] == [f"{prefix}-mine"] * 2
        assert len({request.request_id for request in server.engine.requests}) == 2
        assert not any("mine" in request.request_id for request in server.engine.requests)

    in_server(test)


@PATHS
@pytest.mark.parametrize(
    "fields",
    [
        {"priority": None, "length_penalty": 1.0, "use_beam_search": False},
        {"spaces_between_special_tokens": False},
        {"prompt_logprobs": None, "bad_words": None, "best_of": None, "documents": None},
    ],
    ids=str,
)
def test_what_changes_nothing_is_accepted(path: str, fields: dict[str, Any]) -> None:
    async def test(server: Server) -> None:
        await ask(server, path, **fields)

    in_server(test)


@PATHS
@pytest.mark.parametrize(
    ("fields", "param", "part"),
    [
        ({"prompt_logprobs": -1}, "prompt_logprobs", "greater than or equal to 0"),
        ({"prompt_logprobs": 21}, "prompt_logprobs", "less than or equal to 20"),
        ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs", "not allowed in a stream"),
        ({"priority": 2**31}, "priority", "less than or equal to 2147483647"),
        ({"length_penalty": 0.5}, "length_penalty", "must be 1, not 0.5: there is no beam"),
        ({"use_beam_search": True}, "use_beam_search", "must be False, not True"),
        ({"bad_words": ["a", " "]}, "bad_words", "texts of 1 to 256 characters"),
        ({"bad_words": ["a"] * 129}, "bad_words", "at most 128 texts"),
        ({"bad_words": "a"}, "bad_words", "a list"),
        ({"allowed_token_ids": []}, "allowed_token_ids", "at least 1 item"),
        ({"allowed_token_ids": [258]}, "allowed_token_ids", "token id 258 is outside 0..257"),
        (
            {"allowed_token_ids": [5], "guided_regex": "a"},
            "allowed_token_ids",
            "not allowed with guided_regex",
        ),
        ({"truncate_prompt_tokens": 128}, "truncate_prompt_tokens", "-1 or in [1, 127]"),
        ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens", "-1 or in [1, 127]"),
        ({"truncate_prompt_tokens": -2}, "truncate_prompt_tokens", "greater than or equal to -1"),
        ({"request_id": "a b"}, "request_id", "pattern"),
        ({"request_id": "a" * 129}, "request_id", "at most 128"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_is_out_of_range_is_refused(
    path: str, fields: dict[str, Any], param: str, part: str
) -> None:
    async def test(server: Server) -> None:
        answer = await server.post(path, **prompt_of(path), max_tokens=1, **fields)
        assert (answer.status, answer.error["param"]) == (400, param), answer.body
        assert part in answer.error["message"]
        assert server.engine.requests == []

    in_server(test)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"best_of": 1, "n": 2}, "best_of"),
        ({"best_of": 129}, "best_of"),
        ({"best_of": 2, "stream": True}, "best_of"),
        ({"echo": True, "truncate_prompt_tokens": 1}, "truncate_prompt_tokens"),
    ],
    ids=str,
)
def test_what_completions_cannot_have_is_refused(fields: dict[str, Any], param: str) -> None:
    async def test(server: Server) -> None:
        answer = await server.post(COMPLETIONS, prompt="x", **fields)
        assert (answer.status, answer.error["param"]) == (400, param), answer.body

    in_server(test)


def test_every_answer_of_which_some_are_best_counts() -> None:
    async def test(server: Server) -> None:
        answer = await server.post(COMPLETIONS, prompt=["a", "b"], best_of=6)
        assert answer.status == 400 and "12 answers" in answer.error["message"]

    in_server(test, max_requests=10)


def test_a_prompt_of_one_token_has_no_logprobs() -> None:
    async def test(server: Server) -> None:
        body = await ask(server, COMPLETIONS, prompt=[5], prompt_logprobs=2)
        assert body["choices"][0]["prompt_logprobs"] == [None]

    in_server(test)


def test_a_chats_prompt_logprobs_stand_beside_the_choices() -> None:
    async def test(server: Server) -> None:
        body = await ask(server, CHAT, prompt_logprobs=0, n=2)
        first, *rest = body["prompt_logprobs"]
        assert first is None and len(rest) == body["usage"]["prompt_tokens"] - 1
        assert "prompt_logprobs" not in body["choices"][0]

    in_server(test)


# ---- documents and templates of requests ----


def test_documents_are_given_to_a_template_that_reads_them() -> None:
    async def test(server: Server) -> None:
        await ask(server, CHAT, documents=[{"title": "A"}, {"title": "B"}])
        assert bytes(server.engine.requests[0].prompt_token_ids) == b"<A><B>x"

    in_server(test, vocabulary=byte_vocabulary(DOCUMENTS))


def test_documents_that_no_template_reads_are_refused() -> None:
    async def test(server: Server) -> None:
        answer = await server.post(CHAT, **prompt_of(CHAT), documents=[{"title": "A"}])
        assert (answer.status, answer.error["param"]) == (400, "documents")
        assert "does not read them" in answer.error["message"]
        many = [{"a": [1] * 10_000}]
        answer = await server.post(CHAT, **prompt_of(CHAT), documents=many)
        assert answer.status == 400 and "at most 10000 values" in answer.error["message"]

    in_server(test, ingress_settings=OWN_TEMPLATES)


def test_a_requests_own_template_is_used_where_the_configuration_allows_it() -> None:
    async def test(server: Server) -> None:
        own = "{{ documents[0].title }}|{{ eos_token }}|{{ messages[0].content }}"
        await ask(server, CHAT, chat_template=own, documents=[{"title": "T"}])
        assert server.engine.requests[0].prompt_token_ids == [*b"T|", 256, *b"|x"]
        answer = await server.post(CHAT, **prompt_of(CHAT), chat_template="{% for %}")
        assert answer.status == 400
        bomb = "{% for i in range(9999999) %}{% for j in range(9999999) %}{% endfor %}{% endfor %}"
        answer = await server.post(CHAT, **prompt_of(CHAT), chat_template=bomb)
        assert answer.status == 400

    in_server(test, ingress_settings=OWN_TEMPLATES)


def test_a_requests_own_template_is_refused_by_default() -> None:
    async def test(server: Server) -> None:
        answer = await server.post(CHAT, **prompt_of(CHAT), chat_template="{{ messages }}")
        assert (answer.status, answer.error["param"]) == (400, "chat_template")
        assert "ingress.request_chat_templates" in answer.error["message"]

    in_server(test)


# ---- bad words ----


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("cat", ((0,), (1,))),  # a token of its own behind a space
        (" cat", ((0,), (1,))),
        ("dog", ((2,),)),  # the space is a token of its own
        ("catdog", ((0, 2), (1, 2))),
    ],
)
def test_a_bad_word_is_forbidden_at_the_beginning_and_behind_others(
    word: str, expected: tuple[tuple[int, ...], ...]
) -> None:
    names = ["cat", "\u2581cat", "dog", "\u2581"]
    letters = sorted(set("catdog"))
    merges = [("c", "a"), ("ca", "t"), ("\u2581", "cat"), ("d", "o"), ("do", "g")]
    tokens = [*names, *letters, "ca", "do"]
    bpe = models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges)
    tokenizer = Tokenizer(bpe)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    vocabulary = Vocabulary(tokenizer, {}, None)
    assert asyncio.run(encode_bad_words(vocabulary, [word])) == expected

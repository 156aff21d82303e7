"""Masks against brute force: in a language whose words are listed, what may follow is known."""

import random
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from engine.grammar.cache import GrammarCache
from engine.grammar.link import GrammarLink, Tokens
from engine.grammar.mask_memory import MaskMemory
from engine.grammar.masks import MaskMaker
from engine.messages import ErrorKind
from engine.scheduler.request import Request, SamplingParams
from tests.engine.support.byte_model import EOS, EOT, byte_tokenizer, token_bytes
from tests.engine.support.grammars import of_choices, of_regex, of_schema

TOKENIZER = byte_tokenizer()
BYTES = token_bytes(TOKENIZER)
ENDS = (TOKENIZER.token_to_id(EOS), TOKENIZER.token_to_id(EOT))
VOCAB_SIZE = TOKENIZER.get_vocab_size() + 5
SLOTS, MAX_DRAFTS = 4, 2

ABC = ["".join(word) for n in range(1, 4) for word in product("ab", repeat=n)]
LANGUAGES: list[tuple[str, Sequence[str]]] = [
    (of_choices("name", "names", "né", "na", '{"12'), ["name", "names", "né", "na", '{"12']),
    (of_regex("[ab]{1,3}"), ABC),
    (of_schema({"enum": [12, "a", None, True]}), ["12", '"a"', "null", "true"]),
    (
        of_schema(
            {
                "x-guidance": {"whitespace_flexible": False},
                "type": "array",
                "items": {"type": "boolean"},
                "maxItems": 1,
            }
        ),
        ["[]", "[true]", "[false]"],
    ),
]


class Processes:
    """The real processes, driven without an engine."""

    def __init__(self, folder: Path) -> None:
        tokens = Tokens(str(folder / "tokenizer.json"), VOCAB_SIZE, ENDS)
        self.memory = MaskMemory.create(SLOTS, VOCAB_SIZE, 1 + MAX_DRAFTS)
        self.cache = GrammarCache(lambda: GrammarLink(tokens, self.memory), lambda: None)
        self.maker = MaskMaker(self.cache, self.memory)
        self.num_lives = 0

    def compile(self, grammar: str) -> None:
        self.cache.want("", grammar, 1)
        while self.cache.find(grammar).verdict is None:
            self.cache.poll()

    def request(self, grammar: str, output: Sequence[int] = ()) -> Request:
        self.num_lives += 1
        sampling = SamplingParams(max_tokens=1000, grammar=grammar)
        request = Request(f"r{self.num_lives}", [1], sampling, 0.0, output_token_ids=list(output))
        request.life = self.num_lives
        return request

    def masks(self, *requests: Request) -> list[set[int]]:
        masks = self.maker.begin(enumerate(requests), {r.key: r.life for r in requests})
        rows = masks.wait()
        assert not masks.errors, masks.errors
        assert all(len(rows[i]) == 1 for i in range(len(requests)))
        return [tokens_of(rows[i]) for i in range(len(requests))]


def tokens_of(words: np.ndarray) -> set[int]:
    bits = np.unpackbits(words.view(np.uint8), bitorder="little")
    return set(np.flatnonzero(bits).tolist())


@pytest.fixture(scope="module")
def processes(byte_folder: Path) -> Iterator[Processes]:
    processes = Processes(byte_folder)
    for grammar, _ in LANGUAGES:
        processes.compile(grammar)
    yield processes
    processes.cache.compiler.close()


def may_follow(language: Sequence[str], output: bytes) -> set[int]:
    words = [word.encode() for word in language]
    found = {t for t, raw in BYTES.items() if any(w.startswith(output + raw) for w in words)}
    return found | (set(ENDS) if output in words else set())


def is_forced(language: Sequence[str], output: bytes) -> bool:
    """Whether the next byte is certain: then only the tokenizer's own tokens of what is certain
    are allowed, not every way to spell it."""
    words = [word.encode() for word in language]
    following = {w[len(output) : len(output) + 1] for w in words if w.startswith(output)}
    return len(following) == 1


@pytest.mark.parametrize("number", range(len(LANGUAGES)))
def test_a_mask_is_what_may_follow_in_the_language(processes: Processes, number: int) -> None:
    """On random ways through the language, told token by token or at once."""
    grammar, language = LANGUAGES[number]
    dice = random.Random(number)
    for _ in range(15):
        request, output = processes.request(grammar), b""
        while True:
            again = processes.request(grammar, request.output_token_ids)
            expected = may_follow(language, output)
            mask, same = processes.masks(request, again)
            assert mask == same
            assert mask == expected or (mask < expected and is_forced(language, output))
            token_id = dice.choice(sorted(mask))
            request.output_token_ids.append(token_id)
            if token_id in ENDS:
                break
            output += BYTES[token_id]
        assert output.decode() in language
        assert processes.masks(request) == [set(ENDS)]  # as min_tokens may want it


def test_forced_tokens_are_those_that_the_next_masks_leave(processes: Processes) -> None:
    """An output that does not take them is followed all the same."""
    choices = ("an example of a name", '{"name": 12}')
    processes.compile(of_choices(*choices))
    for text in choices:
        request = processes.request(of_choices(*choices), list(text[:1].encode()))
        request.jumps_ahead = True
        output, tails = request.output_token_ids, dict[int, list[int]]()
        while output[-1] not in ENDS:
            masks = processes.maker.begin([(0, request)], {request.key: request.life})
            mask = tokens_of(masks.wait()[0])
            assert not masks.errors and (len(mask) == 1 or not masks.forced)
            tails[len(output)] = masks.forced.get(0, [])
            output.append(min(mask))
        assert b"".join(BYTES[t] for t in output[:-1]).decode() == text
        assert all(output[at : at + len(tail)] == tail for at, tail in tails.items())
        assert len(tails[2]) == len(output) - 2 - 1  # all but the end, of which there are two


def test_an_output_that_breaks_the_grammar_is_an_error_of_its_row(processes: Processes) -> None:
    wrong = processes.request(LANGUAGES[1][0], list(b"abx"))
    right = processes.request(LANGUAGES[1][0], list(b"ab"))
    masks = processes.maker.begin(enumerate((wrong, right)), {wrong.key: 1, right.key: 2})
    rows = masks.wait()
    assert list(rows) == [1] and masks.errors[0].kind == ErrorKind.INVALID_REQUEST
    assert tokens_of(rows[1]) == may_follow(ABC, b"ab")


@pytest.mark.parametrize("draft", [b"", b"a", b"ab", b"abx", b"xab", b"axb", b"abab"])
def test_masks_behind_drafts_are_those_of_an_output_that_has_them(
    processes: Processes, draft: bytes
) -> None:
    """As far as they may follow, and there are rows for them; the output goes on as it likes."""
    request = processes.request(LANGUAGES[1][0])
    drafts = {0: list(draft)}
    masks = processes.maker.begin([(0, request)], {request.key: request.life}, drafts)
    rows = masks.wait()[0]
    expected = [may_follow(ABC, b"")]
    for end in range(1, min(len(draft), MAX_DRAFTS) + 1):
        if draft[end - 1] not in expected[-1]:
            break
        expected.append(may_follow(ABC, draft[:end]))
    assert not masks.errors and [tokens_of(row) for row in rows] == expected
    request.output_token_ids += b"b"
    assert processes.masks(request) == [may_follow(ABC, b"b")]


def test_the_reply_of_a_step_that_was_not_read_is_passed_over(processes: Processes) -> None:
    request = processes.request(LANGUAGES[1][0])
    processes.maker.begin([(0, request)], {request.key: request.life})
    request.output_token_ids += b"aa"
    assert processes.masks(request) == [may_follow(ABC, b"aa")]


def test_slots_are_used_again_once_lives_have_ended(processes: Processes) -> None:
    for _ in range(5):
        requests = [processes.request(LANGUAGES[1][0]) for _ in range(SLOTS)]
        assert processes.masks(*requests) == [may_follow(ABC, b"")] * SLOTS

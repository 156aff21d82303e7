"""Which tokens the text of a parsed answer is made of, whatever the borders of the tokens are."""

import random
import re

import pytest

from deployments.ingress.parsed_choice import ParsedChoice
from deployments.text.answer_parser import AnswerParser
from deployments.text.detokenizer import ByteLevelDetokenizer
from deployments.text.reasoning import THINK_TAGS, ReasoningSplitter
from deployments.text.tools.call_parser import CallParser
from deployments.text.tools.formats import FORMATS
from engine.messages import RequestOutput, TokenLogprobs

CALL = '<tool_call>\n{"name": "f", "arguments": {"a": "<b"}}\n</tool_call>'
ANSWERS = (
    ("", "Yes é🐟.", ""),
    ("<think>Hm <.</think>\n\n", "See < that <tool x", f"\n{CALL}"),
    ("", "So <tool_call> is a <", ""),
    (f"<think></think> {CALL}", "\nand then", f" {CALL}"),
)


def _choice(pieces: list[bytes]) -> ParsedChoice:
    splitter = ReasoningSplitter(THINK_TAGS["think"], is_inside=False)
    parser = AnswerParser(splitter, CallParser(FORMATS["hermes"], {"f": {"type": "object"}}))
    return ParsedChoice(0, ByteLevelDetokenizer(lambda token_id: pieces[token_id]), parser)


@pytest.mark.parametrize(("before", "text", "after"), ANSWERS)
def test_the_tokens_of_the_text_cover_it(before: str, text: str, after: str) -> None:
    for seed in range(40):
        pieces = _pieces(before + text + after, seed)
        tokens = _text_tokens(pieces, text)
        assert tokens == list(range(tokens[0], tokens[-1] + 1))
        ends = [sum(map(len, pieces[:at])) for at in range(len(pieces) + 1)]
        start, end = len(before.encode()), len((before + text).encode())
        assert ends[tokens[0]] <= start < ends[tokens[0] + 1], pieces
        assert ends[tokens[-1]] < end <= ends[tokens[-1] + 1], pieces


def _pieces(text: str, seed: int) -> list[bytes]:
    """Cut a text anywhere, but for its marks, which are tokens."""
    chance = random.Random(seed)
    pieces: list[bytes] = []
    for part in re.split("(</?think>|</?tool_call>)", text):
        raw = part.encode()
        is_mark = part.endswith(("think>", "tool_call>"))
        most = 0 if is_mark or not raw else len(raw) - 1
        cuts = sorted(chance.sample(range(1, len(raw)), chance.randint(0, most)) if most else [])
        pieces += (raw[i:j] for i, j in zip([0, *cuts], [*cuts, len(raw)], strict=True) if i < j)
    return pieces


def _text_tokens(pieces: list[bytes], text: str) -> list[int]:
    choice = _choice(pieces)
    for token_id in range(len(pieces)):
        choice.push([token_id], [TokenLogprobs(-1.0, ())])
    stop = len(pieces)
    last = [TokenLogprobs(-1.0, ())]
    choice.finish(RequestOutput("r", 0, [stop], last, finish_reason="stop", stop_token_id=stop))
    shown = "".join(delta for delta in choice.take_deltas() if isinstance(delta, str))
    assert shown == text
    return [entry.token_id for entry in choice.take_text_entries(len(shown))]

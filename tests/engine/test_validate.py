"""Tests what an engine refuses before it computes anything."""

import pytest

from engine.messages import EngineInfo, GenerateRequest
from engine.scheduler.request import (
    MAX_LOGIT_BIASES,
    MAX_STOP_TOKEN_IDS,
    InvalidRequest,
    SamplingParams,
)
from engine.validate import validate

INFO = EngineInfo(
    max_model_len=64,
    vocab_size=100,
    num_blocks=8,
    block_size=16,
    eos_token_ids=(99,),
    device="cpu",
    dtype="float32",
    kernels="torch",
    weight_bytes=1,
)
ALL_BUT_EOS = tuple(range(99))


def check(**sampling: object) -> None:
    params = SamplingParams(max_tokens=9, **sampling)  # type: ignore[arg-type]
    validate(GenerateRequest("r", [3], params), INFO)


def test_lists_have_a_longest_length() -> None:
    check(stop_token_ids=(5,) * MAX_STOP_TOKEN_IDS)
    SamplingParams(logit_bias=((5, 1.0),) * MAX_LOGIT_BIASES)
    with pytest.raises(InvalidRequest, match=r"stop_token_ids must have \[0, 128\] .* not 129"):
        check(stop_token_ids=(5,) * (MAX_STOP_TOKEN_IDS + 1))
    with pytest.raises(InvalidRequest, match=r"logit_bias must have \[0, 1024\] .* not 1025"):
        check(logit_bias=((5, 1.0),) * (MAX_LOGIT_BIASES + 1))


def test_some_token_must_be_allowed() -> None:
    with pytest.raises(InvalidRequest, match=r"min_tokens=2 forbids .* all 100 tokens"):
        check(stop_token_ids=ALL_BUT_EOS, min_tokens=2)
    check(stop_token_ids=ALL_BUT_EOS, min_tokens=1)
    check(stop_token_ids=ALL_BUT_EOS, min_tokens=2, ignore_eos=True)
    check(stop_token_ids=ALL_BUT_EOS[1:], min_tokens=2)
    with pytest.raises(InvalidRequest, match=r"bad_words the last token .* all 2 tokens"):
        check(allowed_token_ids=(5, 6, 6), bad_words=((5,), (7, 6)))
    check(allowed_token_ids=(5, 6), bad_words=((5,), (6, 7)))
    with pytest.raises(InvalidRequest, match="all 1 tokens"):
        check(allowed_token_ids=(99,), min_tokens=2)


@pytest.mark.parametrize(
    ("sampling", "message"),
    [
        ({"eos_token_ids": (100,)}, "eos_token_ids: token id 100 is outside"),
        ({"eos_token_ids": (5,) * 129}, r"eos_token_ids must have \[0, 128\] entries, not 129"),
        ({"bad_words": ((100,),)}, r"bad_words: token id 100 is outside the vocabulary \[0, 99\]"),
        ({"bad_words": ((5,), ())}, "at least one token each"),
        ({"bad_words": ((5,),) * 257}, r"bad_words must have \[0, 256\] entries, not 257"),
        ({"bad_words": ((5,) * 4097,)}, r"bad_words in tokens must have \[0, 4096\]"),
        ({"allowed_token_ids": (-1,)}, "allowed_token_ids: token id -1"),
        ({"allowed_token_ids": ()}, r"allowed_token_ids must have \[1, 1024\] entries, not 0"),
        ({"allowed_token_ids": (5,) * 1025}, "not 1025"),
        ({"allowed_token_ids": (5,), "grammar": "{}"}, "not possible with structured output"),
    ],
)
def test_words_and_tokens_out_of_range_are_refused(
    sampling: dict[str, object], message: str
) -> None:
    with pytest.raises(InvalidRequest, match=message):
        check(**sampling)


@pytest.mark.parametrize("penalty", [1e-300, 0.0, 0.009, 100.1, float("nan"), float("inf")])
def test_penalties_that_make_logits_infinite_are_refused(penalty: float) -> None:
    with pytest.raises(InvalidRequest, match=r"repetition_penalty must be in \[0.01, 100.0\]"):
        check(repetition_penalty=penalty)

"""Patterns mean what Python's `re` makes of them, in linear time, or are refused."""

import re
import time
import warnings

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adapter_store.errors import AdapterInvalid
from adapter_store.patterns import Budget, compile_pattern

NAMES = [
    "model.layers.0.self_attn.q_proj",
    "model.layers.11.mlp.up_proj",
    "model.language_model.layers.3.self_attn.v_proj",
    "layers.1.mlp.experts.10.down_proj",
    "aab",
    "a",
]
ATOMS = st.sampled_from(
    [
        *(r"\.", ".", "a", "b", "q_proj", "proj", "layers", "model", r"\d", r"\w", r"\W", r"\s"),
        *("[ab]", "[^.]", r"[\w.]", "[0-9]", "[a-z_]", "^", "$", r"\b", r"\B", r"\A", r"\Z", ""),
        *(r"\_", r"\-", r"\/", "{", "}", "-", "]", "1", "0", "(?i:A)", "(?P<idx>a)", r"\x61"),
    ]
)
PATTERNS = st.recursive(
    ATOMS,
    lambda inner: (
        st.builds("".join, st.lists(inner, min_size=1, max_size=4))
        | st.builds("({})".format, inner)
        | st.builds("(?:{})".format, inner)
        | st.builds("{}|{}".format, inner, inner)
        | st.builds(
            "(?:{}){}".format,
            inner,
            st.sampled_from(["*", "+", "?", "{2}", "{1,}", "{0,2}", "*?", "+?", "??", "{1,2}?"]),
        )
    ),
    max_leaves=10,
)


@pytest.mark.parametrize(
    "num_patterns", [60, pytest.param(3000, marks=pytest.mark.slow)], ids=["few", "many"]
)
def test_a_pattern_means_what_python_makes_of_it(num_patterns: int) -> None:
    given(PATTERNS, st.sampled_from(["", r"(.*\.)?(", r"(?:^|.*?\.)"]))(
        settings(max_examples=num_patterns, deadline=None)(compare_with_python)
    )()


def compare_with_python(pattern: str, prefix: str) -> None:
    expression = {"": pattern, r"(.*\.)?(": rf"(.*\.)?({pattern})$"}.get(
        prefix, rf"(?:^|.*?\.){pattern}\.(?P<idx>\d+)\."
    )
    try:
        found = compile_pattern("key", pattern, Budget(), expression)
    except AdapterInvalid as error:
        assert "key: " in str(error)
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        oracle = re.compile(expression)
    for name in NAMES:
        assert found.fullmatch(name) == bool(oracle.fullmatch(name)), (expression, name)
        match = oracle.match(name)
        assert found.match(name) == bool(match), (expression, name)
        if "idx" in oracle.groupindex:
            assert found.group(name, "idx") == (match and (match["idx"] or "")), (expression, name)


@pytest.mark.parametrize(
    ("pattern", "reason"),
    [
        (r"(?=model).*q_proj", "lookaround"),
        (r".*(?<!vision)\.q_proj", "lookaround"),
        (r"(q|v)_\1", "backreference"),
        (r"(?P<a>q)(?P=a)*", "backreference"),
        (r"(?>q|v)+", "atomic"),
        (r".*+q_proj", "possessive"),
        (r"q(?#comment)*", "comment"),
        (r"q{,3}", "write {0,n}"),
        (r"[[:alpha:]]*", "sets"),
        (r"(?x) q *", "linear time: invalid perl operator"),
        (r"q{1001}", "linear time: invalid repetition size"),
        (r"(((q{1,99}){1,9}|.{500}){1,9}){1,9}", "linear time"),
        (r"q(", "not a valid pattern"),
        (r"q{99999999999}", "not a valid pattern"),
        ("q_proj\N{LATIN SMALL LETTER SHARP S}", "not ASCII"),
        ("a" * 5000, "at most 4096"),
    ],
)
def test_a_pattern_that_cannot_be_matched_in_linear_time_is_refused(
    pattern: str, reason: str
) -> None:
    with pytest.raises(AdapterInvalid, match=rf"^key: .*{re.escape(reason)}"):
        compile_pattern("key", pattern, Budget())


@pytest.mark.parametrize("pattern", ["(a+)+b", "(a|a)*b", "(.*.*.*)*x", "(a?){30}a{30}b"])
def test_patterns_that_python_never_finishes_are_matched_at_once(pattern: str) -> None:
    started = time.process_time()
    assert not compile_pattern("key", pattern, Budget()).fullmatch("a" * 200)
    assert time.process_time() - started < 0.5


def test_the_work_of_all_patterns_together_is_bounded() -> None:
    budget = Budget(steps_left=20_000)
    pattern = compile_pattern("target_modules", ".*(q|v)_proj", budget)
    with pytest.raises(AdapterInvalid, match=r"target_modules: .* too complex for as many names"):
        for _ in range(100):
            pattern.fullmatch(NAMES[0])

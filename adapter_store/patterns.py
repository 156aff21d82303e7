"""Match untrusted patterns with names of modules, as Python's `re` would, in bounded time.

Python's engine backtracks, so a pattern of twenty characters can keep it busy for years. RE2 takes
time that is linear in the name, but knows no lookaround and no backreferences: those are refused.
Names are printable ASCII; there what both engines accept means the same.
"""

import re
from dataclasses import dataclass, field
from typing import Any

import re2  # pyright: ignore[reportMissingTypeStubs]

from adapter_store.errors import AdapterInvalid

MAX_PATTERN_CHARS = 4096
# RE2's worst case takes some nanoseconds for each instruction and character: ten seconds together.
MAX_STEPS = 2 * 10**9
_PROGRAM_BYTES = 2**20
_RE2: Any = re2
# Without these Python's engine has nothing to try twice, and it is the faster one.
_CHOICES = re.compile(r"[*+?{|(]")
_UNSERVED = (
    (re.compile(r"\(\?<?[=!]"), "lookaround"),
    (re.compile(r"\(\?P=|\(\?\(|\\[0-9]"), "a backreference, or a number behind a backslash"),
    (re.compile(r"\(\?>|[*+?}]\+"), "a possessive or atomic repetition"),
    (re.compile(r"\(\?#"), "a comment"),
    (re.compile(r"\{,"), "a repetition without a lower bound; write {0,n}"),
    (re.compile(r"\[\^?\[|\[:|--|&&|~~|\|\|"), "what may be an operation on sets"),
)


@dataclass(slots=True)
class Budget:
    """The work that all patterns of one configuration may cause together."""

    steps_left: int = MAX_STEPS

    def spend(self, num_steps: int, what: str) -> None:
        self.steps_left -= num_steps
        if self.steps_left < 0:
            raise AdapterInvalid(
                f"{what} is too complex for as many names as the adapter has: more than "
                f"{MAX_STEPS:g} steps; list the modules by name instead"
            )


@dataclass(frozen=True, slots=True)
class Pattern:
    """A compiled pattern; `what` names its key in errors."""

    what: str
    _compiled: Any  # of `re` or of RE2: their methods have the same names
    _steps_per_char: int  # 0 for `re`, which only has patterns without choices
    _budget: Budget = field(compare=False)

    def fullmatch(self, name: str) -> bool:
        """Check whether the whole name fits. Raises AdapterInvalid beyond the budget."""
        self._spend(name)
        return self._compiled.fullmatch(name) is not None

    def match(self, name: str) -> bool:
        """Check whether the name's beginning fits. Raises AdapterInvalid beyond the budget."""
        self._spend(name)
        return self._compiled.match(name) is not None

    def group(self, name: str, group: str) -> str | None:
        """Return the text of a group where the name's beginning fits, "" if it took no part."""
        self._spend(name)
        found = self._compiled.match(name)
        return None if found is None else found.group(group) or ""

    def _spend(self, name: str) -> None:
        self._budget.spend(self._steps_per_char * (len(name) + 1), self.what)


def compile_pattern(
    key: str, pattern: Any, budget: Budget, expression: str | None = None
) -> Pattern:
    """Compile a pattern, or the expression that was made of it; AdapterInvalid with the reason."""
    if not isinstance(pattern, str) or len(pattern) > MAX_PATTERN_CHARS:
        raise AdapterInvalid(f"{key}: a pattern must be at most {MAX_PATTERN_CHARS} characters")
    what = f"{key}: {pattern!r}"
    if not pattern.isascii():
        raise AdapterInvalid(f"{what} is not ASCII, and names of modules are")
    _refuse_unserved(what, pattern)
    expression = pattern if expression is None else expression
    try:
        compiled: Any = re.compile(expression)
    except (re.error, RecursionError, OverflowError) as error:
        raise AdapterInvalid(f"{what} is not a valid pattern: {error}") from error
    if _CHOICES.search(pattern) is None:
        return Pattern(what, compiled, 0, budget)
    compiled = _compile_linear(what, expression)
    return Pattern(what, compiled, compiled.programsize, budget)


def _refuse_unserved(what: str, pattern: str) -> None:
    bare = re.sub(r"\\[^0-9]", "_", pattern)
    for unserved, meaning in _UNSERVED:
        if found := unserved.search(bare):
            raise AdapterInvalid(
                f"{what} has {found[0]!r}, {meaning}, which patterns here cannot have: they are "
                "matched in linear time. List the modules by name, or write it without"
            )


def _compile_linear(what: str, expression: str) -> Any:
    options = _RE2.Options()
    options.max_mem = _PROGRAM_BYTES
    options.log_errors = False
    try:
        return _RE2.compile(re.sub(r"\\.", _translate, expression), options)
    except _RE2.error as error:
        reason: Any = error.args[0]  # bytes
        raise AdapterInvalid(
            f"{what} cannot be matched in linear time: {reason.decode()}. List the modules by "
            "name, or write it without"
        ) from error


def _translate(escape: re.Match[str]) -> str:
    """Write an escape as RE2 knows it."""
    return {r"\Z": r"\z", r"\_": "_"}.get(escape[0], escape[0])

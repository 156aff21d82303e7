"""Judges what clients heard: tokens against the oracle, errors against the faults of their time."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from tests.chaos.oracle import Prompt
from tests.chaos.publisher import Publisher
from tests.chaos.stream import CUT, WHOLE, Heard
from tests.chaos.world import MODEL, Content

CALM = "calm"
STALE_S = 5.0  # how old a name's meaning may be while the store answers
AFTER_S = 3.0  # what a fault explains after its end
UNAVAILABLE = frozenset({"503 unavailable", "event unavailable"})
# The ends besides WHOLE that each fault may bring. Where an engine or its replica is lost there are
# none: another one goes on.
EXPLAINED: dict[str, frozenset[str]] = {
    "store is slow": UNAVAILABLE,
    "store answers 500": UNAVAILABLE,
    "store answers 503": UNAVAILABLE,
    "store hangs": UNAVAILABLE,
    "store breaks off": UNAVAILABLE,
    "disk is full": UNAVAILABLE,
    "hostile bodies": frozenset({"429 overloaded"}),
    "ingress is killed": frozenset({CUT}),
}
Answers = Mapping[tuple[Content | None, Prompt], list[int]]


@dataclass
class Span:
    """One fault, from its beginning until all has recovered."""

    kind: str
    began_s: float
    ended_s: float = float("inf")

    def touches(self, since_s: float, until_s: float) -> bool:
        return self.began_s <= until_s and since_s <= self.ended_s + AFTER_S


@dataclass(frozen=True, slots=True)
class Listened:
    model: str
    prompt: Prompt
    heard: Heard


@dataclass
class Verdict:
    """By fault: how streams ended, and the longest gap of one. `problems` are broken promises."""

    ends: dict[str, Counter[str]] = field(default_factory=dict[str, Counter[str]])
    gaps_s: dict[str, float] = field(default_factory=dict[str, float])
    problems: list[str] = field(default_factory=list[str])
    num_tokens: int = 0
    oldest_s: float = 0.0  # the longest that an answer came after its version was replaced


def judge(
    listened: Sequence[Listened], spans: Sequence[Span], publisher: Publisher, answers: Answers
) -> Verdict:
    verdict = Verdict()
    for each in listened:
        heard = each.heard
        verdict.num_tokens += len(heard.token_ids)
        span = _span_of(heard, spans)
        kind = CALM if span is None else span.kind
        verdict.ends.setdefault(kind, Counter())[heard.end] += 1
        verdict.gaps_s[kind] = max(verdict.gaps_s.get(kind, 0.0), heard.longest_gap_s)
        verdict.oldest_s = max(verdict.oldest_s, _age_s(each, publisher, answers))
        wrong = _wrong_tokens(each, spans, publisher, answers) or _unexplained(heard, kind)
        if wrong is not None:
            verdict.problems.append(f"{kind}: {each.model} {heard.end}: {wrong}")
    return verdict


def _span_of(heard: Heard, spans: Sequence[Span]) -> Span | None:
    """The fault that a stream belongs to: of those that it touches, one that explains its end."""
    touched = [span for span in spans if span.touches(heard.sent_s, heard.ended_s)]
    explaining = [span for span in touched if heard.end in EXPLAINED.get(span.kind, ())]
    return (explaining or touched or [None])[-1]


def _unexplained(heard: Heard, kind: str) -> str | None:
    if heard.end == WHOLE:
        return None
    is_explained = heard.end in EXPLAINED.get(kind, ())
    if heard.end == CUT and not heard.token_ids:
        is_explained = False  # nothing was lost yet: another ingress can answer
    if heard.end.startswith("event") and heard.token_ids:
        is_explained = False  # an answer that has begun goes on
    return None if is_explained else f"not explained by a fault: {heard.message[:200]}"


def _wrong_tokens(
    each: Listened, spans: Sequence[Span], publisher: Publisher, answers: Answers
) -> str | None:
    heard = each.heard
    contents = _meanings(each, spans, publisher)
    expected = [answers[content, each.prompt] for content in contents]
    if heard.end == WHOLE:
        fits = heard.token_ids in expected
    else:
        fits = any(heard.token_ids == whole[: len(heard.token_ids)] for whole in expected)
    if fits:
        return None
    age_s = _age_s(each, publisher, answers)
    of = f", those of one that was replaced {age_s:.1f} s before" if age_s else ""
    return f"{len(heard.token_ids)} tokens that none of {len(contents)} versions has{of}"


def _age_s(each: Listened, publisher: Publisher, answers: Answers) -> float:
    """For how long the version that has answered had been replaced when it was asked for."""
    if each.model == MODEL or each.heard.end != WHOLE:
        return 0.0
    replaced_s = [
        end_s
        for content, end_s in publisher.replaced(each.model)
        if answers[content, each.prompt] == each.heard.token_ids
    ]
    ages_s = [each.heard.sent_s - end_s for end_s in replaced_s]
    return max(0.0, min(ages_s, default=0.0))


def _meanings(
    each: Listened, spans: Sequence[Span], publisher: Publisher
) -> Sequence[Content | None]:
    """The contents that may answer. While the store fails, a name keeps its last known meaning."""
    if each.model == MODEL:
        return [None]
    since_s = each.heard.sent_s - STALE_S
    stale = [
        s for s in spans if s.kind.startswith("store") and s.touches(since_s, since_s + STALE_S)
    ]
    since_s = min([since_s, *(span.began_s - STALE_S for span in stale)])
    return publisher.meanings(each.model, since_s, each.heard.ended_s)


def table(verdict: Verdict) -> str:
    lines = ["fault                  longest gap  ends"]
    for kind, ends in sorted(verdict.ends.items()):
        listed = ", ".join(f"{end}: {count}" for end, count in sorted(ends.items()))
        lines.append(f"{kind:22} {verdict.gaps_s[kind]:9.2f} s  {listed}")
    return "\n".join(lines)

"""Canary: is a new version worse than the one that it may replace? Judged after every request.

Each request of either version gives observations in [0, 1], of which less is better: whether it
failed, was cut off, and so on (METRICS). A metric has regressed if the candidate's mean is more
than a margin above the stable version's.

The test is an e-process, so it may be looked at after every request, and stopped at any time. For
n observations of one version, with sum S, and for a mean m,

    W(m) = B(S + 1/2, n - S + 1/2) / B(1/2, 1/2) / (m^S (1 - m)^(n - S))

is the likelihood ratio of a mixture of coins (Beta(1/2, 1/2), Robbins 1970) to a coin of mean m. If
the observations' mean is m, whatever their distribution on [0, 1] and however each depends on the
earlier ones, W(m) is a nonnegative supermartingale that begins at 1: each coin's ratio is a convex
function of an observation, thus at most the line between its values at 0 and 1, whose mean is 1. So
is the product over two versions whose means are (a, b). The evidence against "b is at most
a + margin" is the least product over all such (a, b): it is at most the true means' product, and so
ever exceeds 1 / alpha with a probability of at most alpha (Ville 1939; e-values of two samples:
Turner, Ly and Gruenwald 2021). W is log-convex in m, so the least product is where the two means
are margin apart, and is found by bisection.

- Roll back where the mean of the metrics' evidence for a regression reaches 1 / alpha: a mean of
  e-values is one (Vovk and Wang 2021), so a candidate that is no worse in any metric is rolled back
  with a probability of at most alpha, in all looks and metrics together.
- Promote where each metric that was seen often enough has evidence of 1 / alpha against a
  regression: one that is worse in such a metric is promoted with a probability of at most alpha.

Both take the mean of a version as constant while they are compared. Sums over processes are all
that is needed, so any number of them may count.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Outcome = Literal["go on", "promote", "roll back", "hold"]
METRICS = ("failed", "cut", "invalid", "late", "disliked", "longer", "shorter")
LENGTH_METRICS = ("longer", "shorter")
HALF_LENGTH = 128  # tokens of an answer whose length counts as one half
_STEPS = 60  # of a bisection
_LEAST = 1e-12  # distance of a mean from 0 and 1


@dataclass(frozen=True, slots=True)
class Rules:
    """When to conclude what. Margins are of means in [0, 1]."""

    max_regression: float
    max_length_change: float
    alpha: float
    min_requests: int  # observations of each version by which a metric counts for a promotion
    max_requests: int  # of the candidate; then what is undecided is held

    def margin(self, metric: str) -> float:
        """By how much the mean of a metric may be worse."""
        return self.max_length_change if metric in LENGTH_METRICS else self.max_regression


@dataclass(frozen=True, slots=True)
class Answered:
    """What is seen of one request."""

    failed: bool = False  # then nothing else is known of it
    ttft_s: float = 0.0
    num_tokens: float = 0.0  # of an answer; their mean if there are several
    cut: float = 0.0  # part of the answers that ended at a limit of length
    invalid: float | None = None  # part that does not match what was asked for; None: nothing was
    stop_reasons: Mapping[str, int] = field(default_factory=dict[str, int])


@dataclass(slots=True)
class Tally:
    """What was seen of one version: by metric the number and the sum of its observations."""

    counts: dict[str, tuple[int, float]] = field(default_factory=dict[str, tuple[int, float]])
    ttft_s: float = 0.0  # sums over requests that did not fail
    num_tokens: float = 0.0
    stop_reasons: dict[str, int] = field(default_factory=dict[str, int])

    @property
    def num_requests(self) -> int:
        """How many requests it has answered, or failed to."""
        return self.counts.get("failed", (0, 0.0))[0]

    def see(self, metric: str, badness: float) -> None:
        """Add an observation in [0, 1]."""
        n, total = self.counts.get(metric, (0, 0.0))
        self.counts[metric] = n + 1, total + min(max(badness, 0.0), 1.0)

    def add(self, seen: Answered, ttft_limit_s: float) -> None:
        """Add a request."""
        self.see("failed", float(seen.failed))
        if seen.failed:
            return
        length = seen.num_tokens / (seen.num_tokens + HALF_LENGTH)
        self.see("cut", seen.cut)
        self.see("late", float(seen.ttft_s > ttft_limit_s))
        self.see("longer", length)
        self.see("shorter", 1 - length)
        if seen.invalid is not None:
            self.see("invalid", seen.invalid)
        self.ttft_s += seen.ttft_s
        self.num_tokens += seen.num_tokens
        for reason, number in seen.stop_reasons.items():
            self.stop_reasons[reason] = self.stop_reasons.get(reason, 0) + number

    def merge(self, other: "Tally") -> None:
        """Add what another process has seen."""
        for metric, (n, total) in other.counts.items():
            mine = self.counts.get(metric, (0, 0.0))
            self.counts[metric] = mine[0] + n, mine[1] + total
        self.ttft_s += other.ttft_s
        self.num_tokens += other.num_tokens
        for reason, number in other.stop_reasons.items():
            self.stop_reasons[reason] = self.stop_reasons.get(reason, 0) + number

    def mean(self, metric: str) -> float | None:
        """Return the mean of a metric; None if it was never seen."""
        n, total = self.counts.get(metric, (0, 0.0))
        return total / n if n else None

    def to_data(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return {
            "counts": {metric: list(seen) for metric, seen in sorted(self.counts.items())},
            "ttft_s": self.ttft_s,
            "num_tokens": self.num_tokens,
            "stop_reasons": dict(sorted(self.stop_reasons.items())),
        }

    @staticmethod
    def from_data(data: Mapping[str, Any]) -> "Tally":
        """Undo `to_data`; KeyError, TypeError or ValueError for other data."""
        counts = {
            str(metric): (int(n), float(total))
            for metric, (n, total) in data["counts"].items()
            if metric in METRICS
        }
        reasons = {str(reason): int(number) for reason, number in data["stop_reasons"].items()}
        return Tally(counts, float(data["ttft_s"]), float(data["num_tokens"]), reasons)

    def figures(self) -> dict[str, Any]:
        """Say in numbers what was seen: means by metric, rounded."""
        means = {metric: self.mean(metric) for metric in METRICS}
        answered = self.counts.get("late", (0, 0.0))[0]
        return {
            "requests": self.num_requests,
            **{metric: round(mean, 4) for metric, mean in means.items() if mean is not None},
            "feedback": self.counts.get("disliked", (0, 0.0))[0],
            "mean_ttft_s": round(self.ttft_s / answered, 4) if answered else None,
            "mean_tokens": round(self.num_tokens / answered, 2) if answered else None,
            "stop_reasons": dict(sorted(self.stop_reasons.items())),
        }


@dataclass(frozen=True, slots=True)
class Judgement:
    """What is concluded, why, and the evidence: natural logarithms of e-values by metric."""

    outcome: Outcome
    why: str
    worse: Mapping[str, float]  # evidence that a metric has regressed
    no_worse: Mapping[str, float]  # that it has not

    def figures(self) -> dict[str, Any]:
        """Return the evidence as JSON values, rounded."""
        return {
            "worse": {metric: round(value, 3) for metric, value in self.worse.items()},
            "no_worse": {metric: round(value, 3) for metric, value in self.no_worse.items()},
        }


def judge(stable: Tally, candidate: Tally, rules: Rules) -> Judgement:
    """Conclude what follows from all that was seen so far."""
    worse: dict[str, float] = {}
    no_worse: dict[str, float] = {}
    for metric in METRICS:
        seen = stable.counts.get(metric, (0, 0.0)), candidate.counts.get(metric, (0, 0.0))
        worse[metric], no_worse[metric] = evidence(*seen, rules.margin(metric))
    needed = -math.log(rules.alpha)
    together = _log_mean(list(worse.values()))
    if together >= needed:
        worst = max(METRICS, key=lambda metric: worse[metric])
        return Judgement("roll back", _regression(stable, candidate, worst), worse, no_worse)
    judged = [m for m in METRICS if _times(stable, candidate, m) >= rules.min_requests]
    if "failed" in judged and all(no_worse[metric] >= needed for metric in judged):
        why = f"no regression in {', '.join(judged)}"
        return Judgement("promote", why, worse, no_worse)
    if candidate.num_requests >= rules.max_requests:
        why = f"undecided after {candidate.num_requests} requests of the candidate"
        return Judgement("hold", why, worse, no_worse)
    return Judgement("go on", "undecided so far", worse, no_worse)


def _times(stable: Tally, candidate: Tally, metric: str) -> int:
    return min(tally.counts.get(metric, (0, 0.0))[0] for tally in (stable, candidate))


def _regression(stable: Tally, candidate: Tally, metric: str) -> str:
    means = [tally.mean(metric) or 0.0 for tally in (stable, candidate)]
    return f"{metric} rose from {means[0]:.4f} to {means[1]:.4f}"


def evidence(
    stable: tuple[int, float], candidate: tuple[int, float], margin: float
) -> tuple[float, float]:
    """Return the logarithms of the evidence that the candidate's mean is worse, and that it is not.

    Worse is: by more than the margin. Each version is the number and the sum of its observations.
    """
    n_s, total_s = stable
    n_c, total_c = candidate
    if not n_s or not n_c:
        return 0.0, 0.0
    at_margin = _at_margin(stable, candidate, margin)
    anywhere = _log_ratio(stable, total_s / n_s) + _log_ratio(candidate, total_c / n_c)
    is_worse = total_c / n_c - total_s / n_s > margin
    return (at_margin, anywhere) if is_worse else (anywhere, at_margin)


def _at_margin(stable: tuple[int, float], candidate: tuple[int, float], margin: float) -> float:
    """Find the least product of the two ratios where the means are `margin` apart."""
    low, high = _LEAST, 1 - margin - _LEAST
    for _ in range(_STEPS):
        if high <= low:
            break
        middle = (low + high) / 2
        if _slope(stable, middle) + _slope(candidate, middle + margin) < 0:
            low = middle
        else:
            high = middle
    mean = (low + high) / 2
    return _log_ratio(stable, mean) + _log_ratio(candidate, mean + margin)


def _slope(seen: tuple[int, float], mean: float) -> float:
    """Differentiate the logarithm of W(mean)."""
    n, total = seen
    mean = min(max(mean, _LEAST), 1 - _LEAST)
    return (n - total) / (1 - mean) - total / mean


def _log_ratio(seen: tuple[int, float], mean: float) -> float:
    """Return the logarithm of W(mean)."""
    n, total = seen
    mean = min(max(mean, _LEAST), 1 - _LEAST)
    return (
        _log_beta(total + 0.5, n - total + 0.5)
        - _LOG_BETA_HALF
        - (total * math.log(mean) + (n - total) * math.log1p(-mean))
    )


def _log_beta(a: float, b: float) -> float:
    return math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)


_LOG_BETA_HALF = _log_beta(0.5, 0.5)


def _log_mean(logs: list[float]) -> float:
    """Return the logarithm of the mean of exponentials."""
    largest = max(logs)
    return largest + math.log(sum(math.exp(each - largest) for each in logs) / len(logs))

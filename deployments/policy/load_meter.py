"""LoadMeter: what comes to a replica, whether it keeps up with it or not, and how long it waits."""

from dataclasses import dataclass

SMOOTHING = 32  # answers over which the mean length forgets
FIRST_ANSWER = 64.0  # tokens, until one has ended


@dataclass(frozen=True, slots=True)
class Arrivals:
    """What came between two readings."""

    prompt_tokens_per_s: float = 0.0
    output_tokens_per_s: float = 0.0
    wait_s: float = 0.0  # from arrival to the first step, mean of those that told it


class LoadMeter:
    """Counts requests as they come. Not thread-safe.

    How long an answer will be is not known then: it counts as long as the latest ones were.
    """

    def __init__(self) -> None:
        self._mean_answer = 0.0
        self._read_s: float | None = None
        self._clear()

    @property
    def mean_answer(self) -> float:
        """Tokens of an answer, as of those that ended lately."""
        return self._mean_answer or FIRST_ANSWER

    def received(self, num_prompt_tokens: int, num_answers: int = 1) -> None:
        self._prompt_tokens += num_prompt_tokens
        self._num_answers += num_answers

    def waited(self, seconds: float) -> None:
        self._wait_s += seconds
        self._num_waited += 1

    def answered(self, num_tokens: int) -> None:
        """Note an answer that has ended."""
        mean = self._mean_answer
        self._mean_answer = mean + (num_tokens - mean) / SMOOTHING if mean else float(num_tokens)

    def read(self, now_s: float) -> Arrivals:
        """Return what came since the last reading, of which there should be one in a second."""
        since_s, self._read_s = self._read_s, now_s
        arrivals = self._arrivals(now_s - since_s) if since_s is not None else Arrivals()
        self._clear()
        return arrivals

    def _arrivals(self, span_s: float) -> Arrivals:
        if span_s <= 0:
            return Arrivals()
        output_tokens = self._num_answers * self.mean_answer
        wait_s = self._wait_s / max(self._num_waited, 1)
        return Arrivals(self._prompt_tokens / span_s, output_tokens / span_s, wait_s)

    def _clear(self) -> None:
        self._prompt_tokens = self._num_answers = self._num_waited = 0
        self._wait_s = 0.0

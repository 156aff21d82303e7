"""StepCost: what one row more costs a step, learned from how long steps took."""

START = 0.1  # of a step with no rows, before anything was measured
LOW, HIGH = 0.002, 2.0
MEMORY = 0.98  # weight of all earlier steps beside a new one
MIN_SPREAD = 0.05  # variance of the number of rows, as a part of its square, to learn a slope from
MAX_STRAY = 2.0  # a step that took more times what is expected was held up by something else


class StepCost:
    """Fits seconds = base + rows * slope to the latest steps without prompts."""

    def __init__(self) -> None:
        self.row = START  # slope / base
        self._weight = self._rows = self._seconds = 0.0  # sums
        self._rows2 = self._product = 0.0

    def observe(self, num_rows: int, seconds: float) -> None:
        if self._weight > 5:
            seconds = min(seconds, MAX_STRAY * self._expected(num_rows))
        self._weight = MEMORY * self._weight + 1
        self._rows = MEMORY * self._rows + num_rows
        self._seconds = MEMORY * self._seconds + seconds
        self._rows2 = MEMORY * self._rows2 + num_rows * num_rows
        self._product = MEMORY * self._product + num_rows * seconds
        self._fit()

    def _expected(self, num_rows: int) -> float:
        mean_rows, mean = self._rows / self._weight, self._seconds / self._weight
        return mean * (1 + self.row * num_rows) / (1 + self.row * mean_rows)

    def _fit(self) -> None:
        mean_rows, mean = self._rows / self._weight, self._seconds / self._weight
        variance = self._rows2 / self._weight - mean_rows * mean_rows
        if self._weight < 5 or variance < MIN_SPREAD * mean_rows * mean_rows:
            return
        slope = (self._product / self._weight - mean_rows * mean) / variance
        base = mean - slope * mean_rows
        self.row = HIGH if base <= 0 else min(max(slope / base, LOW), HIGH)

"""StepSizes: tell which steps may take longer than all before them.

The time of a step grows with the tokens that it computes, with the positions that they attend to,
with the rows of logits, and with the bytes that it moves. A step that is not much larger than
earlier ones by any of these is bounded by them in its time as well.
"""

from engine.scheduler.batch import AdapterMove, ScheduledBatch

GROWTH = 2  # times as large as any before, from which on a step is news; but any more tokens are


class StepSizes:
    def __init__(self) -> None:
        self._tokens = self._pairs = self._logit_rows = self._moved_bytes = 0

    def describe_news(self, batch: ScheduledBatch) -> str | None:
        """Describe a step by what is larger in it than ever; None for one of known sizes."""
        tokens = pairs = logit_rows = 0
        for request in batch.requests:
            num = len(request.token_ids)
            tokens += num
            pairs += num * (request.start + num)
            if request.prompt_targets is not None:
                logit_rows += num
        moved_bytes = sum(load.nbytes for load in batch.adapter_loads)
        moved_bytes += sum(move.nbytes for move in batch.moves if isinstance(move, AdapterMove))
        if tokens > self._tokens:
            what = f"{tokens} tokens"
        elif pairs > GROWTH * self._pairs:
            what = f"{tokens} tokens that attend to {pairs} positions in all"
        elif logit_rows > GROWTH * self._logit_rows:
            what = f"the log probabilities of {logit_rows} tokens"
        elif moved_bytes > GROWTH * self._moved_bytes:
            what = f"{tokens} tokens and moving {moved_bytes} bytes of adapters"
        else:
            return None
        self._tokens = max(tokens, self._tokens)
        self._pairs = max(pairs, self._pairs)
        self._logit_rows = max(logit_rows, self._logit_rows)
        self._moved_bytes = max(moved_bytes, self._moved_bytes)
        return f"computing {what} for the first time"

"""HeldOutputs: what requests have got with an adapter whose verdict is still to come."""

from collections.abc import Iterable, Iterator

from engine.messages import RequestError, RequestOutput

Key = tuple[str, int]  # request id and choice


class HeldOutputs:
    """Keeps the outputs of choices until their adapter is proven; all are of one engine."""

    def __init__(self) -> None:
        self._digests: dict[Key, str] = {}  # of the choices whose outputs are held
        self._outputs: dict[Key, list[RequestOutput]] = {}

    @property
    def is_holding(self) -> bool:
        return bool(self._digests)

    def hold(self, request_id: str, num_choices: int, digest: str) -> None:
        """From now on keep what a request gets, until `release` or `refuse`."""
        self._digests |= {(request_id, index): digest for index in range(num_choices)}

    def sort(self, outputs: Iterable[RequestOutput]) -> list[RequestOutput]:
        """Keep the outputs that nobody may see yet; return the others.

        An error or an abort is told at once, in place of everything before it.
        """
        if not self._digests:
            return list(outputs)
        return [output for output in outputs if not self._keep(output)]

    def _keep(self, output: RequestOutput) -> bool:
        key = output.request_id, output.index
        if key not in self._digests:
            return False
        if output.finish_reason in ("error", "abort"):
            del self._digests[key]
            self._outputs.pop(key, None)
            return False
        self._outputs.setdefault(key, []).append(output)
        return True

    def release(self, digest: str) -> list[RequestOutput]:
        """Return what was kept, now that the adapter is proven."""
        return [output for outputs in self._take(digest) for output in outputs]

    def refuse(self, digest: str, error: RequestError) -> list[RequestOutput]:
        """Forget what was kept; return the end of each choice that has had its last output."""
        ends = [outputs[-1] for outputs in self._take(digest) if outputs]
        return [_failed(end, error) for end in ends if end.finish_reason is not None]

    def _take(self, digest: str) -> Iterator[list[RequestOutput]]:
        for key in [k for k, of in self._digests.items() if of == digest]:
            del self._digests[key]
            yield self._outputs.pop(key, [])


def _failed(end: RequestOutput, error: RequestError) -> RequestOutput:
    return RequestOutput(
        end.request_id, end.index, [], finish_reason="error", error=error, metrics=end.metrics
    )

"""Judge a probe: is what was served the adapter's effect, within the noise of the base?"""

import hashlib
import math
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

from engine.messages import AdapterVerdict

# Of logprobs: what rounding may make of the same sum in another order, and of the effect itself
FLOOR = {"float32": 1e-3, "float16": 0.02, "bfloat16": 0.05}
NOISE_FACTOR = 4.0
MAX_NOISE = 0.1  # that an adapter may have, too
FAULTY_NOISE = 0.3  # of the base: its kernels' fault; activations rounded to int8 have made 0.16
EFFECT_FACTOR = {"float32": 0.05, "float16": 0.15, "bfloat16": 0.15}
WHOLE_FACTOR = 0.02  # of the largest effect, where that of a kind of step is small
LARGE = 1e9  # in place of differences that are not finite


@dataclass(frozen=True, slots=True)
class Proof:
    """What a probe has shown of an adapter; differences are the largest of any token's logprob."""

    digest: str
    effect: float  # between the base and the adapter, as its weights say
    error: float  # between that and what was served, in the kind of step that is worse
    margin: float  # the largest error that passes there
    failure: str = ""  # why the adapter may not be served; empty if it may
    warning: str = ""
    probe: str = ""  # SHA-256 of the probe's tokens and of what was served; empty: nothing was

    @property
    def verdict(self) -> AdapterVerdict:
        """The same in the words of those who did not see the probe."""
        outcome = "failed" if self.failure else "no_effect" if self.warning else "proven"
        return AdapterVerdict(
            self.digest,
            outcome,
            self.probe,
            _finite(self.effect),
            _finite(self.error),
            _finite(self.margin),
            self.failure or self.warning,
        )


def _finite(value: float) -> float:
    """Bound what JSON cannot write."""
    return value if abs(value) < LARGE else LARGE


def probe_digest(token_ids: Sequence[int], served: Sequence[float]) -> str:
    """Name a probe and its result: SHA-256 of the tokens and of the logprobs as float32."""
    parts = [array("i", token_ids).tobytes(), array("f", served).tobytes()]
    return hashlib.sha256(b"".join(parts)).hexdigest()


def difference(a: Sequence[float], b: Sequence[float]) -> float:
    """Return the largest difference, infinity if one is not finite."""
    differences = [abs(x - y) for x, y in zip(a, b, strict=True)]
    return max(differences, default=0.0) if all(map(math.isfinite, differences)) else math.inf


def judge(
    digest: str,
    probe: str,
    served: Sequence[float],
    base: Sequence[float],
    adapted: Sequence[float],
    *,
    num_decoded: int,
    dtype: str,
    noise: float,
    is_zero: bool,
) -> Proof:
    """Compare the logprobs that were served with those of the references.

    The last `num_decoded` were served by decodes. They are judged apart: what decodes lack is less
    than a prefill's effect, by what its keys and values still hold. `noise` is the difference of
    the same kind for the base alone; `is_zero`: the adapter's weights add nothing by themselves.
    """
    effect = difference(adapted, base)
    rounding = FLOOR[dtype] + NOISE_FACTOR * min(noise, MAX_NOISE) + WHOLE_FACTOR * effect
    cut = len(served) - num_decoded
    worst = -math.inf
    error = margin = 0.0
    for part in (slice(cut), slice(cut, None)):
        allowed = rounding + EFFECT_FACTOR[dtype] * difference(adapted[part], base[part])
        found = difference(served[part], adapted[part])
        if not found / allowed <= worst:
            worst, error, margin = found / allowed, found, allowed
    failure = warning = ""
    if not error <= margin:
        failure = (
            f"adapter {digest} does not act as its weights say: a probe's logprobs differ by "
            f"{error:.3g} from those of the merged weights, of which at most {margin:.3g} can be "
            f"rounding; its whole effect is {effect:.3g}"
        )
    elif is_zero:
        warning = f"adapter {digest} changes nothing: every B is zero"
    elif effect <= margin:
        warning = (
            f"adapter {digest} hardly changes anything: a probe's logprobs by {effect:.3g}, "
            f"which rounding could hide (up to {margin:.3g})"
        )
    return Proof(digest, effect, error, margin, failure, warning, probe)

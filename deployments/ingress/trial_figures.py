"""The counts of a trial: as the store keeps them, added up over processes, and judged."""

import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any, cast

from adapter_store.aliases import AliasView, Trial
from deployments.policy.canary import Judgement, Rules, Tally, judge

Tallies = dict[int, Tally]  # by version
logger = logging.getLogger(__name__)


def judged(
    view: AliasView, trial: Trial, tallies: Mapping[int, Tally]
) -> tuple[Judgement, dict[str, Any]]:
    """Judge a trial by all counts; return the numbers as JSON values, too."""
    rules = Rules(
        trial.max_regression,
        trial.max_length_change,
        trial.alpha,
        trial.min_requests,
        trial.max_requests,
    )
    stable = next((ref.version for ref, _ in view.shares if ref.version != trial.candidate), 0)
    of_stable, of_candidate = (tallies.get(v, Tally()) for v in (stable, trial.candidate))
    judgement = judge(of_stable, of_candidate, rules)
    figures = {
        "stable": {"version": stable, **of_stable.figures()},
        "candidate": {"version": trial.candidate, **of_candidate.figures()},
        "evidence": judgement.figures(),
    }
    return judgement, figures


def merged(all_tallies: Sequence[Mapping[int, Tally]]) -> Tallies:
    """Add up what several processes have counted."""
    total: Tallies = {}
    for tallies in all_tallies:
        for version, tally in tallies.items():
            total.setdefault(version, Tally()).merge(tally)
    return total


def encode_counts(tallies: Mapping[int, Tally]) -> bytes:
    """Write counts as the store keeps them."""
    return json.dumps({str(v): tally.to_data() for v, tally in sorted(tallies.items())}).encode()


def decode_counts(raw: bytes) -> Tallies:
    """Undo `encode_counts`; what is damaged counts as nothing, and is logged."""
    try:
        found = cast(dict[str, Any], json.loads(raw))
        return {int(version): Tally.from_data(data) for version, data in found.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        logger.warning("counts of a trial are damaged: %r", error)
        return {}

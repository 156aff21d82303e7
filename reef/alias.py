"""`reef alias`: makes an alias mean a version, or several by weight, one of them on trial.

Without a version or an option it shows what an alias means and what its trial has shown.
"""

import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import click

from reef.author import author
from reef.store_options import tenant_option, with_store

if TYPE_CHECKING:
    from adapter_store.aliases import AliasView, Trial
    from adapter_store.store import AdapterStore

_PERCENT = re.compile(r"([0-9]{1,2}(?:\.[0-9]{1,6})?)%")


class Percent(click.ParamType[float]):
    """An option's value such as `5%`."""

    name = "percent"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """Return the percentage; refuse what is not above 0 and below 100."""
        match = _PERCENT.fullmatch(str(value))
        if match is None or not float(match[1]):
            self.fail(f"{value!r} is not a share above 0% and below 100%, such as 5%")
        return float(match[1])


class Weights(click.ParamType[dict[int, float]]):
    """An option's value such as `3=90,5=10`."""

    name = "version=weight,..."

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> dict[int, float]:
        """Return the weights by version; refuse a version that comes twice."""
        found: dict[int, float] = {}
        for part in str(value).split(","):
            version, _, weight = part.partition("=")
            try:
                number, found_weight = int(version), float(weight)
            except ValueError:
                self.fail(f"{part!r} is not version=weight, as in 3=90,5=10")
            if number in found:
                self.fail(f"version {number} comes twice")
            found[number] = found_weight
        return found


@click.command()
@click.argument("name")
@click.argument("alias")
@click.argument("version", type=int, required=False)
@click.option("--weights", type=Weights(), help="Several versions that share the requests.")
@click.option("--canary", type=int, help="The version to try on a --share of the requests.")
@click.option("--share", type=Percent(), help="The canary's part of them.")
@click.option("--max-regression", type=float, help="Rise of a rate that is too much.  [0.05]")
@click.option("--max-length-change", type=float, help="The same of the length.  [0.15]")
@click.option("--alpha", type=float, help="Part of wrong conclusions, at most.  [0.05]")
@click.option("--min-requests", type=int, help="Of each version before a promotion.  [50]")
@click.option("--max-requests", type=int, help="Of the canary, then it is left.  [5000]")
@click.option("--ttft", "ttft_s", type=float, help="Seconds; later first tokens count.  [2.0]")
@tenant_option
@with_store
def alias(
    store: "AdapterStore",
    name: str,
    alias: str,
    version: int | None,
    weights: dict[int, float] | None,
    canary: int | None,
    share: float | None,
    tenant: str,
    **bounds: float | None,
) -> None:
    """Make NAME@ALIAS mean a VERSION, or several by weight.

    With --canary and --share a part of the sessions gets another version beside VERSION, or beside
    what the alias means now, until it is promoted or rolled back by what its requests show.
    """
    given = {key: value for key, value in bounds.items() if value is not None}
    if (canary is None) != (share is None):
        raise click.UsageError("--canary and --share belong together")
    if given and canary is None:
        raise click.UsageError("the bounds of a trial need --canary and --share")
    if weights is not None and (version is not None or canary is not None):
        raise click.UsageError("--weights stands alone")
    if canary is not None and share is not None:
        weights = _canary_weights(store, f"{name}@{alias}", tenant, version, canary, share)
    elif version is not None:
        weights = {version: 1.0}
    if weights is not None:
        trial = None if canary is None else _trial(canary, given)
        store.share(tenant, name, alias, weights, trial, by=author())
    _show(store, tenant, f"{name}@{alias}")


def _trial(canary: int, bounds: Mapping[str, Any]) -> "Trial":
    from adapter_store.aliases import Trial

    return Trial(canary, **bounds)


def _canary_weights(
    store: "AdapterStore",
    full_name: str,
    tenant: str,
    version: int | None,
    canary: int,
    share: float,
) -> dict[int, float]:
    """Give the canary its share, and the rest to the other version. Raises UsageError."""
    if version is None:
        store.refresh()
        view = store.alias_view(tenant, full_name)
        others = [] if view is None else [r.version for r, _ in view.shares if r.version != canary]
        if len(others) != 1:
            raise click.UsageError(
                f"{full_name} means {len(others)} versions beside {canary}: name the stable VERSION"
            )
        version = others[0]
    if version == canary:
        raise click.UsageError(f"version {canary} cannot be tried beside itself")
    return {version: 100 - share, canary: share}


def _show(store: "AdapterStore", tenant: str, full_name: str) -> None:
    from adapter_store.errors import AdapterNotFound

    store.refresh()
    view = store.alias_view(tenant, full_name)
    if view is None or not view.shares:
        raise AdapterNotFound(f"tenant {tenant} has no alias {full_name!r}")
    for line in _lines_of(store, view):
        click.echo(line)


def _lines_of(store: "AdapterStore", view: "AliasView") -> Iterator[str]:
    if len(view.shares) == 1:
        yield f"{view.text} is version {view.shares[0][0].version}"
        return
    total = sum(weight for _, weight in view.shares)
    parts = (f"version {r.version} for {100 * weight / total:g}%" for r, weight in view.shares)
    yield f"{view.text} is {', '.join(parts)}"
    if view.trial is not None:
        yield f"on trial: version {view.trial.candidate}"
        yield from _figures(store, view)


def _figures(store: "AdapterStore", view: "AliasView") -> Iterator[str]:
    from deployments.ingress.trial_figures import decode_counts, judged, merged

    assert view.trial is not None, "asked for trials alone"
    tallies = merged([decode_counts(each) for each in store.trial_counts(view.began)])
    judgement, figures = judged(view, view.trial, tallies)
    for which in ("stable", "candidate"):
        shown = (f"{key} {value}" for key, value in figures[which].items() if value)
        yield f"{which}: {', '.join(shown)}"
    yield f"so far: {judgement.outcome}, {judgement.why}"

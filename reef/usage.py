"""`reef usage`: sums what requests have used, and what that costs."""

import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from reef.refusal import refusing

if TYPE_CHECKING:
    from adapter_store.object_store import ObjectStore
    from deployments.usage.prices import Prices
    from deployments.usage.reader import Found

BY = ("tenant", "adapter", "version", "day")
FORMATS = ("table", "csv", "json", "parquet")


class Moment(click.ParamType[float]):
    """A day or a time in UTC, as seconds since 1970."""

    name = "time"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """Return the seconds; refuse what is no date of ISO 8601."""
        if isinstance(value, float):
            return value
        try:
            moment = datetime.fromisoformat(str(value))
        except ValueError:
            self.fail(f"{value!r} is not a day such as 2026-12-01, nor a time 2026-12-01T08:00")
        return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


class Fields(click.ParamType[Sequence[str]]):
    """Names of fields, separated by commas."""

    name = "fields"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> Sequence[str]:
        """Return the names; refuse one that there is none of, and one that comes twice."""
        from deployments.usage.sums import FIELDS

        if not isinstance(value, str):
            return BY
        names = value.split(",")
        for name in names:
            if name not in FIELDS:
                self.fail(f"{name!r} is none of {', '.join(FIELDS)}")
        if len(set(names)) != len(names):
            self.fail(f"{value!r} names a field twice")
        return names


@click.command()
@click.argument("files", nargs=-1, type=click.Path(exists=True, path_type=Path))
@click.option(
    "--root",
    envvar="ADAPTER_STORE_ROOT",
    show_envvar=True,
    help="The store: file:///path or s3://bucket/prefix. Not read where FILES are named.",
)
@click.option("--endpoint-url", help="Of an S3 server.  [default: $S3_ENDPOINT_URL]")
@click.option(
    "--by", type=Fields(), default=BY, help="What sums are by.  [tenant,adapter,version,day]"
)
@click.option(
    "--since", type=Moment(), default=0.0, help="Requests that came from then on, in UTC."
)
@click.option("--until", type=Moment(), help="Requests that came before.  [default: now]")
@click.option(
    "--prices",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="A Serve config: the bill by its usage.prices.",
)
@click.option("--format", "form", type=click.Choice(FORMATS), default="table", show_default=True)
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="A file to write to.")
def usage(
    files: Sequence[Path],
    root: str | None,
    endpoint_url: str | None,
    by: Sequence[str],
    since: float,
    until: float | None,
    prices: Path | None,
    form: str,
    out: Path | None,
) -> None:
    """Sum what requests have used.

    Reads the records in the store, or those in FILES: uploaded objects, and the folder usage.path
    with what is not uploaded yet. Each record counts once, however often it is found.
    """
    from adapter_store.errors import AdapterStoreError
    from deployments.usage.prices import NoSuchPrice
    from deployments.usage.reader import Found, NotUsage, read_records
    from deployments.usage.report import MissingExtra, write_report
    from deployments.usage.sums import sum_up
    from engine.config import ConfigError

    if form == "parquet" and out is None:
        raise click.UsageError("--format parquet needs --out FILE.")
    found = Found()
    until_s = time.time() if until is None else until
    with refusing(AdapterStoreError, OSError, ConfigError, NotUsage, NoSuchPrice, MissingExtra):
        costs = None if prices is None else _prices(prices)
        store = None if files else _store(root, endpoint_url)
        sums = sum_up(read_records(store, files, found, since), by, since, until_s)
        rows = list(sums.rows(costs))
        with nullcontext(sys.stdout) if out is None or form == "parquet" else out.open("w") as file:
            write_report(form, by, rows, "" if costs is None else costs.currency, file, out)
    _warn(found)


def _store(root: str | None, endpoint_url: str | None) -> "ObjectStore":
    import os

    from adapter_store.open_store import endpoint_from, open_store

    if root is None:
        raise click.UsageError("Name files, or the store by --root or ADAPTER_STORE_ROOT.")
    return open_store(root, endpoint_url or endpoint_from(os.environ, root), read_only=True)


def _prices(path: Path) -> "Prices":
    from deployments.config import load_config
    from deployments.local.serve_yaml import read_application
    from deployments.usage.open import prices_of

    arguments: dict[str, Any] = read_application(path)["args"]
    return prices_of(load_config(arguments).usage)


def _warn(found: "Found") -> None:
    """Say what the sums lack, with exit status 1: a bill by them would be wrong."""
    if found.repeated:
        click.echo(f"reef: {found.repeated} records came again and count once", err=True)
    if found.lost_requests:
        lost = found.lost.values()
        click.echo(
            f"reef: {found.lost_requests} requests have no record, since the log could not be "
            f"written: {sum(each.prompt_tokens for each in lost)} prompt tokens and "
            f"{sum(each.output_tokens for each in lost)} output tokens are not in these sums",
            err=True,
        )
    if found.damaged_lines:
        click.echo(f"reef: {found.damaged_lines} lines are damaged and do not count", err=True)
    if found.lost_requests or found.damaged_lines:
        sys.exit(1)

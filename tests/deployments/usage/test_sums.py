"""Sums and bills, against sums by hand; and `reef usage` as a shell starts it."""

import csv
import gzip
import json
from collections import Counter
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result
from hypothesis import given, settings
from hypothesis import strategies as st

from deployments.config import load_config
from deployments.usage.open import prices_of
from deployments.usage.prices import NoSuchPrice, Price, Prices, add_costs
from deployments.usage.record import UsageRecord, checked, encode_json
from deployments.usage.sums import FIELDS, sum_up
from engine.config import ConfigError
from reef.usage import usage

DAY = 86_400
PRICES = [
    {"name": "small", "models": ["base"], "max_rank": 16, "prompt": 0.1, "output": 0.3},
    {"name": "large", "prompt": "0.2", "cached": 0.05, "output": 0.6, "load": 0.001},
]


def record(number: int = 0, **fields: Any) -> UsageRecord:
    known = {"time_s": 20_000.0 * DAY, "tenant": "acme", "route": "/v1/completions"}
    known |= {"model": "base", "price_class": "large"}
    return UsageRecord(id=f"w-{number}", request_id="r", **(known | fields))


def config(**more: Any) -> dict[str, Any]:
    models = [{"id": "base", "source": "nowhere"}]
    return {"models": models, "usage": {"currency": "EUR", "prices": PRICES, **more}}


def config_file(folder: Path, **more: Any) -> Path:
    path = folder / "config.yaml"
    application = {"import_path": "deployments.app:build_app", "args": config(**more)}
    path.write_text(yaml.safe_dump({"applications": [application]}))
    return path


def run(*arguments: object) -> Result:
    return CliRunner().invoke(usage, [str(each) for each in arguments], catch_exceptions=False)


def log(path: Path, *records: UsageRecord) -> Path:
    path.write_bytes(b"".join(checked(encode_json(each)) for each in records))
    return path


ALL_PRICES = prices_of(load_config(config()).usage)
records = st.builds(
    record,
    number=st.integers(0, 99),
    time_s=st.floats(0, 5 * DAY),
    tenant=st.sampled_from(["acme", "lab"]),
    adapter=st.sampled_from([None, "acme/a", "lab/a"]),
    version=st.integers(0, 2),
    price_class=st.sampled_from(["small", "large"]),
    prompt_tokens=st.integers(0, 50),
    output_tokens=st.integers(0, 50),
    load_bytes=st.integers(0, 2**40),
)


@settings(max_examples=40)
@given(
    st.lists(records, max_size=12),
    st.lists(st.sampled_from(sorted(FIELDS)), min_size=1, max_size=4, unique=True),
    st.floats(0, 5 * DAY),
    st.floats(0, 5 * DAY),
)
def test_sums_are_those_by_hand(
    some: list[UsageRecord], by: list[str], since_s: float, until_s: float
) -> None:
    prices = ALL_PRICES
    wanted: Counter[tuple[object, ...]] = Counter()
    costs: dict[tuple[object, ...], Decimal] = {}
    for each in some:
        if since_s <= each.time_s < until_s:
            group = tuple(FIELDS[name](each) for name in by)
            wanted[(*group, "requests")] += 1
            wanted[(*group, "prompt_tokens")] += each.prompt_tokens
            wanted[(*group, "load_bytes")] += each.load_bytes
            price = prices.price(each.price_class)
            cost = price.cost(each.prompt_tokens, 0, each.output_tokens, each.load_bytes)
            costs[group] = add_costs([costs.get(group, Decimal(0)), cost])
    found = list(sum_up(some, by, since_s, until_s).rows(prices))
    assert {row.group: row.cost for row in found} == costs
    for row in found:
        assert row.counts[0] == wanted[(*row.group, "requests")]
        assert row.counts[1] == wanted[(*row.group, "prompt_tokens")]
        assert row.counts[5] == wanted[(*row.group, "load_bytes")]


def test_a_bill_is_exact_and_cached_tokens_have_their_own_price() -> None:
    price = Price("p", Decimal("0.1"), Decimal("0.025"), Decimal("0.3"), Decimal("0.5"))
    assert price.cost(3_000_000, 1_000_000, 7, 2**31) == Decimal("1.2250021")
    total = sum(price.cost(1, 0, 0, 0) for _ in range(1000))
    assert total == Decimal("0.0001"), "no binary fraction comes near"


def test_the_first_price_that_fits_is_a_requests_class() -> None:
    prices = prices_of(load_config(config()).usage)
    assert [prices.class_of("base", rank) for rank in (0, 16, 17)] == ["small", "small", "large"]
    assert prices.class_of("other", 0) == "large" and Prices().class_of("base", 0) == ""
    assert prices.price("small").cached == Decimal("0.1") and prices.currency == "EUR"
    with pytest.raises(NoSuchPrice, match=r"'huge'; usage\.prices has small, large"):
        prices.price("huge")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"prices": [PRICES[0], PRICES[0]]}, "not distinct"),
        ({"prices": [PRICES[0] | {"models": ["nobody"]}]}, r"prices\.0\.models: \['nobody'\]"),
        ({"prices": [PRICES[0] | {"prompt": -1}]}, r"prices\.0\.prompt"),
        ({"prices": [PRICES[0] | {"prompt": "nan"}]}, r"prices\.0\.prompt"),
        ({"prices": [{"name": "a", "prompt": 1}]}, r"prices\.0\.output"),
        ({"fsync_s": 0}, "usage.fsync_s"),
    ],
)
def test_wrong_settings_are_refused_by_their_place(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        load_config(config(**change))


def test_records_are_not_uploaded_where_the_server_must_not_write() -> None:
    args = {**config(path="usage"), "adapters": {"root": "s3://b/p", "single_writer": True}}
    with pytest.raises(ConfigError, match=r"usage\.path"):
        load_config(args)


# ---- the command ---------------------------------------------------------------------------


def test_the_command_prints_a_table_with_its_total(tmp_path: Path) -> None:
    path = log(
        tmp_path / "2024-10-04_w-1.log",
        record(1, prompt_tokens=1000, cached_tokens=400, output_tokens=10, load_bytes=2**30),
        record(2, adapter="acme/sql", version=2, prompt_tokens=5, output_tokens=1),
    )
    result = run(path, "--prices", config_file(tmp_path), "--by", "tenant,adapter,day")
    lines = [line.split() for line in result.stdout.splitlines()]
    assert result.exit_code == 0
    assert lines[0] == [
        *("tenant", "adapter", "day", "requests", "prompt", "cached", "output", "reasoning"),
        *("load_bytes", "cost", "EUR"),
    ]
    assert lines[1:] == [
        ["acme", "2024-10-04", "1", "1000", "400", "10", "0", "1073741824", "0.001146"],
        ["acme", "acme/sql", "2024-10-04", "1", "5", "0", "1", "0", "0", "0.000002"],
        ["total", "2", "1005", "400", "11", "0", "1073741824", "0.001148"],
    ]


def test_csv_and_json_have_all_digits(tmp_path: Path) -> None:
    path = log(tmp_path / "a.log", record(1, prompt_tokens=1, output_tokens=1))
    config_path = config_file(tmp_path)
    result = run(path, "--prices", config_path, "--by", "tenant", "--format", "csv")
    [row] = csv.DictReader(result.stdout.splitlines())
    assert row["tenant"] == "acme" and row["cost"] == "0.0000008"
    out = tmp_path / "out.jsonl"
    run(path, "--prices", config_path, "--by", "tenant", "--format", "json", "--out", out)
    assert json.loads(out.read_text()) == {
        "tenant": "acme",
        "requests": 1,
        "prompt_tokens": 1,
        "cached_tokens": 0,
        "output_tokens": 1,
        "reasoning_tokens": 0,
        "load_bytes": 0,
        "cost": "0.0000008",
    }


def test_parquet_has_the_same_or_names_what_is_missing(tmp_path: Path) -> None:
    path, out = log(tmp_path / "a.log", record(1, prompt_tokens=7)), tmp_path / "out.parquet"
    arguments = [path, "--format", "parquet", "--out", out, "--prices", config_file(tmp_path)]
    pq = pytest.importorskip("pyarrow.parquet")
    assert run(*arguments).exit_code == 0
    [row] = pq.read_table(out).to_pylist()
    assert (row["tenant"], row["prompt_tokens"], row["cost"]) == ("acme", 7, Decimal("0.000001"))
    assert "--out" in run(*arguments[:3]).output


def test_without_pyarrow_parquet_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    path = log(tmp_path / "a.log", record(1))
    result = run(path, "--format", "parquet", "--out", tmp_path / "out")
    assert result.exit_code == 1 and "pip install 'reef[usage]'" in result.output


def test_the_store_and_the_folder_are_read_and_days_before_are_not(tmp_path: Path) -> None:
    objects = tmp_path / "store" / "usage"
    objects.mkdir(parents=True)
    for day, number in (("2024-10-01", 1), ("2024-10-03", 2), ("2024-10-04", 3)):
        time_s = (20_000 - 4 + int(day[-1])) * DAY + 5.0
        data = encode_json(record(number, time_s=time_s, prompt_tokens=number)) + b"\n"
        (objects / f"{day}_w-{number:06}.jsonl.gz").write_bytes(gzip.compress(data))
    (objects / "2024-10-01_w-000001.jsonl.gz").write_bytes(b"damaged")
    root = f"file://{tmp_path / 'store'}"
    result = run("--root", root, "--by", "day", "--since", "2024-10-04", "--format", "csv")
    assert result.stdout.splitlines()[1:] == ["2024-10-04,1,3,0,0,0,0"]
    until = ["--since", "2024-10-03", "--until", "2024-10-04"]
    result = run("--root", root, "--by", "day", *until, "--format", "csv")
    assert result.stdout.splitlines()[1:] == ["2024-10-03,1,2,0,0,0,0"]
    result = run("--root", root)
    assert result.exit_code == 1 and "2024-10-01_w-000001.jsonl.gz is damaged" in result.output


def test_what_sums_lack_is_said_and_is_an_exit_status(tmp_path: Path) -> None:
    path = log(tmp_path / "a.log", record(1), record(1))
    result = run(path)
    assert result.exit_code == 0 and "1 records came again" in result.output
    path.write_bytes(path.read_bytes()[:-20] + b"\n")
    lost = b'{"kind":"lost","writer":"w","requests":4,"prompt_tokens":9,"output_tokens":8}'
    path.write_bytes(path.read_bytes() + checked(lost) + checked(lost))
    result = run(path)
    assert result.exit_code == 1 and "1 lines are damaged" in result.output
    assert "4 requests have no record" in result.output and "8 output tokens" in result.output


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--by", "tenant,colour"], "'colour' is none of tenant, key"),
        (["--by", "day,day"], "twice"),
        (["--since", "yesterday"], "'yesterday' is not a day"),
        ([], "--root"),
    ],
)
def test_wrong_arguments_are_refused(arguments: list[str], words: str) -> None:
    result = CliRunner().invoke(usage, arguments, env={"ADAPTER_STORE_ROOT": ""})
    assert result.exit_code == 2 and words in result.output

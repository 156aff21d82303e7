"""Recorded traces as arrivals: files that others publish, and one of our own.

    azure     CSV: TIMESTAMP, ContextTokens, GeneratedTokens
    burstgpt  CSV: Timestamp (s), Request tokens, Response tokens; other columns say nothing here
    mooncake  JSON lines: timestamp (ms), input_length, output_length, hash_ids
    reef      JSON lines: time_s, prompt_tokens, output_tokens, adapter (null: the base), tenant
    usage     the records that the server writes: an object, a log, or a folder of them

A row that is not of that form ends the simulation with its line; nothing is left out silently.
"""

import csv
import json
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import msgspec

from deployments.simulator.checked import InvalidSimulation, Positive
from deployments.simulator.prompts import shared_range
from deployments.simulator.usage_trace import usage_records

MOONCAKE_BLOCK = 512  # tokens of each of hash_ids; the last one may have fewer


class Trace(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """A file and how it is read. `speed` 2 halves the time between requests.

    Rows without output tokens are failed requests, those whose tokens do not fit into
    `fleet.size.max_model_len` are long: `refuse`d, `skip`ped, or long prompts `cut`.
    """

    file: str
    format: Literal["azure", "burstgpt", "mooncake", "reef", "usage"]
    speed: Positive = 1.0
    failed: Literal["refuse", "skip"] = "refuse"
    long: Literal["refuse", "skip", "cut"] = "refuse"


class Row(NamedTuple):
    """One request of a trace. Without `adapter` the workload's popularity draws one."""

    time_s: float
    num_prompt_tokens: int
    num_output_tokens: int
    adapter: str | None = None  # "": the base model
    tenant: str = ""
    shared: tuple[range, ...] = ()


def read_trace(trace: Trace, most_tokens: int) -> Iterator[Row]:
    """Yield the rows from second 0 on. Raises InvalidSimulation with the file and the line."""
    first_s = last_s = 0.0
    is_first = True
    for line, row in _rows(trace):
        try:
            fitting = _fitted(row, trace, most_tokens)
            if is_first:
                is_first, first_s = False, row.time_s
            elif row.time_s < last_s:
                raise ValueError("it comes before the line above; the file must be sorted by time")
        except ValueError as error:
            raise InvalidSimulation(f"{trace.file}: line {line}: {error}") from None
        last_s = row.time_s
        if fitting is not None:
            yield fitting._replace(time_s=(row.time_s - first_s) / trace.speed)
    if is_first:
        raise InvalidSimulation(f"{trace.file}: it has no requests")


def _fitted(row: Row, trace: Trace, most_tokens: int) -> Row | None:
    if row.num_output_tokens == 0 and trace.failed == "skip":
        return None
    if row.num_output_tokens < 1 or row.num_prompt_tokens < 1:
        raise ValueError(
            f"a request needs 1 token or more of prompt and of output, not {row.num_prompt_tokens} "
            f"and {row.num_output_tokens}; workload.trace.failed: skip leaves out those without "
            "output"
        )
    total = row.num_prompt_tokens + row.num_output_tokens
    if total <= most_tokens:
        return row
    if trace.long == "skip":
        return None
    left = most_tokens - row.num_output_tokens
    if trace.long == "refuse" or left < 1:
        raise ValueError(
            f"prompt and output are {total} tokens; fleet.size.max_model_len is {most_tokens}: "
            "raise it, or say workload.trace.long: skip or cut (of prompts)"
        )
    return row._replace(num_prompt_tokens=left, shared=_cut(row.shared, left))


def _cut(shared: tuple[range, ...], num_tokens: int) -> tuple[range, ...]:
    kept: list[range] = []
    for part in shared:
        kept.append(part[: max(num_tokens, 0)])
        num_tokens -= len(part)
    return tuple(part for part in kept if len(part))


def _rows(trace: Trace) -> Iterator[tuple[int, Row]]:
    """Yield rows with their line in the file."""
    if trace.format == "usage":
        yield from _usage_rows(trace)
        return
    is_csv, read = _READERS[trace.format]
    try:
        with Path(trace.file).open(encoding="utf-8", newline="") as file:
            records = _csv_records(file) if is_csv else _json_records(file)
            for line, record in records:
                try:
                    if record is None:
                        raise ValueError("it is not a JSON object")
                    yield line, read(record)
                except KeyError as error:
                    raise InvalidSimulation(
                        f"{trace.file}: line {line}: {error} is missing; is it of format "
                        f"{trace.format}?"
                    ) from None
                except (TypeError, ValueError) as error:
                    raise InvalidSimulation(f"{trace.file}: line {line}: {error}") from None
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InvalidSimulation(f"{trace.file}: {error}") from None


def _csv_records(file: Any) -> Iterator[tuple[int, dict[str, Any]]]:
    reader = csv.DictReader(file, strict=True)
    for record in reader:
        yield reader.line_num, {k: v for k, v in record.items() if v is not None}


def _json_records(file: Any) -> Iterator[tuple[int, dict[str, Any] | None]]:
    for line, text in enumerate(file, 1):
        if not text.strip():
            continue
        try:
            record = json.loads(text)
        except ValueError:
            record = None
        yield line, cast(dict[str, Any], record) if isinstance(record, dict) else None


def _azure(record: dict[str, Any]) -> Row:
    tokens = _count(record["ContextTokens"]), _count(record["GeneratedTokens"])
    return Row(_timestamp_s(record["TIMESTAMP"]), *tokens)


def _burstgpt(record: dict[str, Any]) -> Row:
    tokens = _count(record["Request tokens"]), _count(record["Response tokens"])
    return Row(_seconds(record["Timestamp"]), *tokens)


def _mooncake(record: dict[str, Any]) -> Row:
    num_prompt = _count(record["input_length"])
    ids = cast(list[Any], record["hash_ids"])
    shared: list[range] = []
    left = num_prompt
    for each in ids:
        shared.append(shared_range(_count(each), min(left, MOONCAKE_BLOCK), MOONCAKE_BLOCK))
        left -= len(shared[-1])
    if left:
        raise ValueError(
            f"hash_ids are of {num_prompt - left} tokens; input_length is {num_prompt}"
        )
    time_s = _seconds(record["timestamp"]) / 1000
    return Row(time_s, num_prompt, _count(record["output_length"]), shared=tuple(shared))


def _reef(record: dict[str, Any]) -> Row:
    adapter, tenant = record["adapter"] or "", record.get("tenant") or ""
    if not isinstance(adapter, str) or not isinstance(tenant, str):
        raise ValueError(f"adapter and tenant must be names or null, not {adapter!r}, {tenant!r}")
    tokens = _count(record["prompt_tokens"]), _count(record["output_tokens"])
    return Row(_seconds(record["time_s"]), *tokens, adapter, tenant)


def _usage_rows(trace: Trace) -> Iterator[tuple[int, Row]]:
    """Yield the records by time; a version of an adapter is an adapter of its own."""
    try:
        for number, record in enumerate(usage_records(Path(trace.file)), 1):
            adapter = f"{record.adapter}@{record.version}" if record.adapter else ""
            tokens = record.prompt_tokens, record.output_tokens
            yield number, Row(record.time_s, *tokens, adapter, record.tenant)
    except (OSError, ValueError) as error:
        raise InvalidSimulation(f"{trace.file}: {error}") from None


_READERS: dict[str, tuple[bool, Callable[[dict[str, Any]], Row]]] = {
    "azure": (True, _azure),
    "burstgpt": (True, _burstgpt),
    "mooncake": (False, _mooncake),
    "reef": (False, _reef),
}


def _count(value: Any) -> int:
    number = _seconds(value)
    if number != int(number):
        raise ValueError(f"{value!r} is not a number of tokens")
    return int(number)


def _seconds(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError(f"{value!r} is not a number")
    try:
        number = float(value)
    except ValueError:
        raise ValueError(f"{value!r} is not a number") from None
    if not 0 <= number < 1e12:
        raise ValueError(f"{value!r} is outside [0, 1e12)")
    return number


def _timestamp_s(text: Any) -> float:
    """Read a date with up to seven digits of a second, of which Python reads six."""
    if not isinstance(text, str):
        raise ValueError(f"{text!r} is not a time")
    head, dot, tail = text.strip().partition(".")
    digits = tail[: len(tail) - len(tail.lstrip("0123456789"))]
    zone = tail[len(digits) :] if dot else ""
    try:
        whole = datetime.fromisoformat(head + zone)
    except ValueError:
        raise ValueError(f"{text!r} is not a time like 2023-11-16 18:15:46.6805900") from None
    start = datetime(1970, 1, 1, tzinfo=whole.tzinfo)
    return (whole - start).total_seconds() + (float(f"0.{digits}") if digits else 0.0)

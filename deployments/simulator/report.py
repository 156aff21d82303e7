"""A summary as text."""

from collections.abc import Sequence

from deployments.simulator.simulate import Summary

# field, what it is called, how it is written
LINES: tuple[tuple[str, str, str], ...] = (
    ("requests", "requests", "{:.0f}"),
    ("finished", "of them finished", "{:.0f}"),
    ("attained", "kept the objective", "{:.1%}"),
    ("goodput_per_s", "of these, by second", "{:.1f}"),
    ("tokens_per_s", "output tokens/s", "{:.0f}"),
    ("ttft_p50_s", "TTFT p50 (s)", "{:.3f}"),
    ("ttft_p90_s", "TTFT p90 (s)", "{:.3f}"),
    ("ttft_p99_s", "TTFT p99 (s)", "{:.3f}"),
    ("tpot_p50_s", "TPOT p50 (s)", "{:.4f}"),
    ("tpot_p99_s", "TPOT p99 (s)", "{:.4f}"),
    ("longest_gap_p99_s", "longest gap, p99 (s)", "{:.3f}"),
    ("cached_prompt_share", "prompt tokens cached", "{:.1%}"),
    ("loads_per_request", "cold loads by request", "{:.3f}"),
    ("remote_loads", "adapters fetched", "{:.0f}"),
    ("disk_loads", "adapters read from disk", "{:.0f}"),
    ("device_loads", "adapters to the device", "{:.0f}"),
    ("max_over_mean_load", "busiest replica / mean", "{:.3f}"),
    ("service_gap", "service gap of tenants", "{:.0f}"),
    ("replica_hours", "replica hours", "{:.3f}"),
    ("gpu_hours", "GPU hours", "{:.3f}"),
    ("cost", "cost", "{:.2f}"),
    ("preemptions", "preemptions", "{:.0f}"),
    ("steps", "engine steps", "{:.0f}"),
)


def report(summaries: Sequence[tuple[str, Summary]]) -> list[str]:
    """Write one column for each summary, under its name."""
    width = max(12, *(len(name) + 2 for name, _ in summaries))
    head = " " * 26 + "".join(name.rjust(width) for name, _ in summaries)
    return [head] + [
        label.ljust(26) + "".join(form.format(getattr(s, field)).rjust(width) for _, s in summaries)
        for field, label, form in LINES
    ]

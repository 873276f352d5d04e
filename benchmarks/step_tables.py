"""The tables of `benchmarks.step_time`: which figures, under which headings."""

from collections.abc import Sequence
from typing import Any

from rich.table import Table

__all__ = ["tables"]

_TABLES: dict[str, list[tuple[str, str, str]]] = {
    "Time of a step": [
        ("mean, ms", "mean_ms", "{:.1f}"),
        ("to first row", "mean_to_first_row", "{:.2f}"),
        ("CPU time, ms", "cpu_ms", "{:.1f}"),
        ("median, ms", "median_ms", "{:.1f}"),
        ("plain, ms", "plain_ms", "{:.1f}"),
        ("refresh, ms", "refresh_ms", "{:.1f}"),
        ("slowest, ms", "slowest_ms", "{:.1f}"),
        ("slowest / median", "slowest_to_median", "{:.2f}"),
        ("steps", "timed_steps", "{}"),
    ],
    "What a step does, per rank": [
        ("operators", "operators_per_step", "{:,.0f}"),
        ("at most", "operators_largest", "{:,.0f}"),
        ("read-backs", "read_backs_per_step", "{:.1f}"),
        ("MB sent", "mb_sent_per_step", "{:.2f}"),
        ("at least", "mb_sent_per_step_least", "{:.2f}"),
        ("GFLOP", "gflop_per_step", "{:.2f}"),
        ("without roots", "gflop_per_step_without_roots", "{:.2f}"),
        ("products' share", "product_share", "{:.0%}"),
        ("rate to alone", "product_rate_to_alone", "{:.0%}"),
        ("eigh/qr share", "decomposition_share", "{:.0%}"),
    ],
    "Memory per rank (beside it: in buckets, the gradients of its part of the matrices)": [
        ("state, MB", "state_mb", "{:.1f}"),
        ("max / mean", "state_max_to_mean", "{:.3f}"),
        ("bytes / parameter", "state_bytes_per_parameter", "{:.1f}"),
        ("beside it, between steps", "alive_buckets", "{:.2f}"),
        ("at the peak", "peak_buckets", "{:.2f}"),
    ],
}


def tables(figures: Sequence[dict[str, Any]]) -> list[Table]:
    """One per subject, with a line per row of the comparison."""
    made = []
    for title, columns in _TABLES.items():
        table = Table(title=title, title_justify="left")
        table.add_column("optimizer")
        for heading, _, _ in columns:
            table.add_column(heading, justify="right")
        for row in figures:
            values = [(row[key], form) for _, key, form in columns]
            table.add_row(row["row"], *("-" if v is None else f.format(v) for v, f in values))
        made.append(table)
    return made

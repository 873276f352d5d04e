"""The tables of the study, in Markdown."""

import math
import statistics
from collections.abc import Iterable, Iterator
from typing import Any

from benchmarks.command import markdown_table
from studies.pretrain.plan import LR, Study
from studies.pretrain.results import Results
from studies.pretrain.summary import (
    BASELINE,
    Summary,
    ablation_losses,
    optimizer_ms,
    summaries,
    target,
)


def markdown(study: Study, sizes: Iterable[str], contestants: list[str], results: Results) -> str:
    """One table for each size that has results, and one of the ablations."""
    parts = []
    for size in sizes:
        found = summaries(study, size, contestants, results)
        aim = target(found)
        if aim is not None:
            parts += _comparison(study, size, found, aim)
        if rows := list(_ablations(study, size, results)):
            heads = ("setting", "value", "loss", "optimizer, ms per step")
            parts += [f"Ablations, {size}", markdown_table(heads, rows)]
    return "\n\n".join(parts) or "No contestant has all its runs yet."


def _comparison(study: Study, size: str, found: list[Summary], aim: float) -> list[str]:
    seeds = len(study.general["final_seeds"])
    title = (
        f"{size}: mean of {seeds} seeds ± their standard deviation, loss in nats per token on "
        f"held-out text; the target is {BASELINE}'s best seed, {aim:.4f}"
    )
    shorter = f"loss of one run of {study.general['shorter']:.0%} of the steps"
    heads = [
        *("optimizer", "chosen", "final loss", "steps to target", "time to target"),
        *(f"steps to {BASELINE}'s end, seed by seed", shorter, "optimizer, ms per step"),
    ]
    rows = []
    baseline = next(s for s in found if s.contestant == BASELINE)
    steps, time = baseline.whole()
    for summary in found:
        reached = summary.to_target(aim)
        saved = [
            _saving([None if r is None else r[0] for r in reached], steps, "{:.0f}"),
            _saving([None if r is None else r[1] for r in reached], time, "{:.0f} s"),
        ]
        pairs = summary.seed_by_seed(baseline)
        saved.append(_saving([None if r is None else r[0] for r in pairs], steps, "{:.0f}"))
        if summary is baseline:  # its full run, which the others are compared with
            saved = [f"{steps:.0f}", f"{time:.0f} s", f"{steps:.0f}"]
        cells = [
            summary.contestant,
            _chosen(study, summary),
            _mean_and_deviation(summary.losses()),
            *saved,
            _mean_and_deviation(summary.losses(shorter=True)),
            f"{summary.optimizer_ms():.0f}",
        ]
        rows.append(cells)
    return [title, markdown_table(heads, rows)]


def _chosen(study: Study, summary: Summary) -> str:
    names = [n for n in study.contestants[summary.contestant]["tune"] if n in summary.settings]
    return ", ".join(f"{_short(name)} {_value(summary.settings[name])}" for name in names)


def _saving(values: list[float | int | None], baseline: float, form: str) -> str:
    """The mean, and how much less than the baseline's full run; "never" if one seed does not."""
    reached = [value for value in values if value is not None]
    if len(reached) < len(values):
        return f"never ({len(reached)} of {len(values)} seeds)" if reached else "never"
    mean = statistics.fmean(reached)
    return f"{form.format(mean)} ({mean / baseline - 1:+.0%})"


def _mean_and_deviation(losses: list[float]) -> str:
    if not losses:
        return "-"
    deviation = f" ± {statistics.stdev(losses):.4f}" if len(losses) > 1 else ""
    return f"{statistics.fmean(losses):.4f}{deviation}"


def _ablations(study: Study, size: str, results: Results) -> Iterator[list[str]]:
    for ablation in study.ablations:
        for value, run, loss in ablation_losses(study, size, ablation, results):
            lost = "diverged" if math.isinf(loss) else f"{loss:.4f}"
            lr = f" (lr {_value(run.settings[LR])})" if "lr" in ablation else ""
            name = f"{ablation['contestant']}: {_short(ablation['setting'])}"
            yield [name, f"{_value(value)}{lr}", lost, f"{optimizer_ms(results[run]):.0f}"]


def _short(name: str) -> str:
    return name.rsplit(".", 1)[-1]


def _value(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list):
        return ", ".join(f"`{item}`" for item in value) or "none"
    return str(value)

"""The figures of the study, PNG files beside the results."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.patches import Patch
from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter

from studies.pretrain.plan import Study
from studies.pretrain.results import Results
from studies.pretrain.summary import (
    BASELINE,
    Summary,
    ablation_losses,
    by_lr,
    reached,
    seconds,
    summaries,
    target,
)

__all__ = ["draw"]

_SHOWN = 0.7  # nats above the best; ablations beyond are written at the edge


def draw(
    study: Study, sizes: Iterable[str], contestants: list[str], results: Results, folder: Path
) -> None:
    """Writes loss.png, ratio.png, to_target.png, lr.png, lr_by_size.png and ablations_SIZE.png, if
    there are results."""
    folder.mkdir(parents=True, exist_ok=True)
    colors = {name: f"C{i}" for i, name in enumerate(study.contestants)}
    by_size = {size: summaries(study, size, contestants, results) for size in sizes}
    done = {size: found for size, found in by_size.items() if target(found) is not None}
    if done:
        _loss(done, colors, folder / "loss.png")
        _ratio(done, colors, folder / "ratio.png")
        _to_target(done, colors, folder / "to_target.png")
    _lr(study, list(by_size), contestants, results, colors, folder / "lr.png")
    _lr_by_size(study, list(by_size), contestants, results, folder / "lr_by_size.png")
    for size in by_size:
        _ablations(study, size, results, folder / f"ablations_{size}.png")


def _loss(done: dict[str, list[Summary]], colors: dict[str, str], path: Path) -> None:
    figure, axes = plt.subplots(len(done), 2, figsize=(11, 3.6 * len(done)), squeeze=False)
    for row, (size, found) in zip(axes, done.items(), strict=True):
        aim = target(found)
        assert aim is not None
        for summary in found:
            color, name = colors[summary.contestant], summary.contestant
            # A run that diverged has fewer evaluations, the last of them without a loss.
            length = min(len(record["loss"]) for record in summary.final)
            losses = np.array([record["loss"][:length] for record in summary.final], dtype=float)
            times = np.mean([seconds(record)[:length] for record in summary.final], axis=0)
            tokens = np.multiply(summary.final[0]["step"][:length], _tokens(summary.settings))
            for axis, x in zip(row, (tokens, times), strict=True):
                axis.plot(x, losses.mean(0), color=color, label=name, lw=1.2)
                axis.fill_between(x, losses.min(0), losses.max(0), color=color, alpha=0.2, lw=0)
        for axis, label in zip(row, ("tokens", "seconds of training"), strict=True):
            axis.axhline(aim, color="0.4", lw=0.8, ls=":", label=f"{BASELINE}'s best seed")
            axis.set_ylim(_lowest(found) - 0.03, aim + 0.8)
            axis.set(xscale="log", xlabel=label, ylabel="held-out loss, nats per token")
            axis.xaxis.set_minor_formatter(NullFormatter())
            axis.set_title(f"{size}; mean, and range of {len(found[0].final)} seeds", size=10)
            axis.legend(fontsize=8)
    _save(figure, path)


def _tokens(settings: dict[str, Any]) -> int:
    """Of a step."""
    return int(settings["training.local_batch_size"] * settings["training.seq_len"])


def _ratio(done: dict[str, list[Summary]], colors: dict[str, str], path: Path) -> None:
    """Steps to a loss as a part of the baseline's steps to the same: how an early lead shrinks."""
    figure, axes = plt.subplots(1, len(done), figsize=(5.5 * len(done), 3.9), squeeze=False)
    for axis, (size, found) in zip(axes[0], done.items(), strict=True):
        aim = target(found)
        baseline = next(summary for summary in found if summary.contestant == BASELINE)
        first = max(record["loss"][1] for record in baseline.final)
        losses = np.linspace(aim or first, first, 60)
        of_baseline = _steps_to(losses, baseline)
        for summary in found:
            if summary is not baseline:
                ratio = _steps_to(losses, summary) / of_baseline
                axis.plot(losses, ratio, color=colors[summary.contestant], label=summary.contestant)
        axis.axhline(1.0, color="0.4", lw=0.8, ls=":")
        axis.set(ylim=(0, 1.1), xlabel="held-out loss, nats per token (training goes to the right)")
        axis.set_ylabel(f"steps to it, {BASELINE} = 1")
        axis.invert_xaxis()
        axis.set_title(f"{size}; mean of {len(baseline.final)} seeds", size=10)
        axis.legend(fontsize=8)
    _save(figure, path)


def _steps_to(losses: Any, summary: Summary) -> Any:
    """Mean of the seeds; NaN where one does not get there."""
    of_seeds = [[reached(record, loss) for loss in losses] for record in summary.final]
    steps = [[np.nan if r is None else r[0] for r in found] for found in of_seeds]
    return np.mean(steps, axis=0)


def _lowest(found: list[Summary]) -> float:
    return min(min(summary.losses()) for summary in found)


def _to_target(done: dict[str, list[Summary]], colors: dict[str, str], path: Path) -> None:
    figure, axes = plt.subplots(1, 2, figsize=(11, 3.9), sharey=True)
    for column, (axis, what) in enumerate(zip(axes, ("steps", "time"), strict=True)):
        middles = []
        for group, found in enumerate(done.values()):
            aim = target(found)
            assert aim is not None
            whole = next(s.whole() for s in found if s.contestant == BASELINE)[column]
            others = [summary for summary in found if summary.contestant != BASELINE]
            first = group * (len(colors) + 1)
            middles.append(first + (len(others) - 1) / 2)
            for x, summary in enumerate(others, first):
                values = [r[column] / whole for r in summary.to_target(aim) if r is not None]
                if values:
                    color = colors[summary.contestant]
                    axis.bar(x, np.mean(values), color=color, alpha=0.6)
                    axis.plot(x + np.linspace(-0.2, 0.2, len(values)), values, "k.", ms=4)
                if len(values) < len(summary.final):
                    axis.text(x, 1.02, "never" if not values else "not all", ha="center", size=7)
        axis.axhline(1.0, color="0.4", lw=0.8, ls=":")
        axis.set_xticks(middles, list(done))
        axis.set_title(f"{what} to {BASELINE}'s best final loss (dots: seeds)", size=10)
        shown = {s.contestant for found in done.values() for s in found} - {BASELINE}
        bars = {name: Patch(color=colors[name], alpha=0.6) for name in colors if name in shown}
        axis.legend(bars.values(), bars.keys(), fontsize=8)
    axes[0].set_ylabel(f"1 = {BASELINE}'s full run")
    _save(figure, path)


def _lr(
    study: Study,
    sizes: list[str],
    contestants: list[str],
    results: Results,
    colors: dict[str, str],
    path: Path,
) -> None:
    curves = {
        size: {name: by_lr(study, size, name, results) for name in contestants} for size in sizes
    }
    sizes = [size for size in sizes if any(curves[size].values())]
    if not sizes:
        return
    figure, axes = plt.subplots(1, len(sizes), figsize=(4.5 * len(sizes), 3.6), squeeze=False)
    for axis, size in zip(axes[0], sizes, strict=True):
        for name, points in curves[size].items():
            if points:
                axis.plot(*zip(*points, strict=True), "o-", color=colors[name], label=name, ms=3)
        losses = [loss for points in curves[size].values() for _, loss in points]
        axis.set_ylim(min(losses) - 0.03, min(losses) + 0.8)
        axis.set(xscale="log", xlabel="lr", ylabel="final loss, tuning text")
        _lr_ticks(axis)
        axis.set_title(f"{size}, before the other settings are chosen", size=10)
        axis.legend(fontsize=8)
    _save(figure, path)


def _lr_by_size(
    study: Study, sizes: list[str], contestants: list[str], results: Results, path: Path
) -> None:
    """For each contestant the curves of all sizes, above their lowest: does the best lr move?"""
    curves = {
        name: {size: by_lr(study, size, name, results) for size in sizes} for name in contestants
    }
    curves = {name: found for name, found in curves.items() if sum(map(bool, found.values())) > 1}
    if not curves:
        return
    shape = (4.5 * len(curves), 3.6)
    figure, axes = plt.subplots(1, len(curves), figsize=shape, squeeze=False, sharey=True)
    for axis, (name, found) in zip(axes[0], curves.items(), strict=True):
        for size, points in found.items():
            if points:
                lr, losses = zip(*points, strict=True)
                above = np.subtract(losses, min(losses))
                (line,) = axis.plot(lr, above, "o-", label=size, ms=3)
                axis.plot(lr[losses.index(min(losses))], 0.0, "*", color=line.get_color(), ms=12)
        axis.set(xscale="log", xlabel="lr", ylim=(-0.02, 0.3))
        _lr_ticks(axis)
        axis.set_title(f"{name} (stars: the best)", size=10)
        axis.legend(fontsize=8)
    axes[0][0].set_ylabel("final loss above the lowest of that size")
    _save(figure, path)


def _lr_ticks(axis: Any) -> None:
    axis.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.xaxis.set_major_formatter(FormatStrFormatter("%g"))
    axis.xaxis.set_minor_formatter(NullFormatter())


def _ablations(study: Study, size: str, results: Results, path: Path) -> None:
    found = [(a, ablation_losses(study, size, a, results)) for a in study.ablations]
    found = [(ablation, rows) for ablation, rows in found if len(rows) > 1]
    if not found:
        return
    columns = 3
    rows_of_axes = -(-len(found) // columns)
    shape = (4 * columns, 3 * rows_of_axes)
    figure, axes = plt.subplots(rows_of_axes, columns, figsize=shape, squeeze=False, sharey=True)
    lowest = min(loss for _, rows in found for _, _, loss in rows)
    for axis in axes.flat[len(found) :]:
        axis.remove()
    for axis, (ablation, rows) in zip(axes.flat, found, strict=False):
        labels, losses = [_label(value) for value, _, _ in rows], [loss for _, _, loss in rows]
        ordered = all(isinstance(value, int | float) for value in ablation["values"])
        axis.plot(labels, np.minimum(losses, lowest + _SHOWN), "o-" if ordered else "o")
        for x, loss in enumerate(losses):
            if loss > lowest + _SHOWN:
                text = "diverged" if np.isinf(loss) else f"{loss:.2f}"
                axis.text(x, lowest + _SHOWN - 0.05, text, ha="center", size=8)
        axis.set_ylim(lowest - 0.03, lowest + _SHOWN + 0.03)
        axis.axhline(lowest, color="0.4", lw=0.8, ls=":")
        setting = ablation["setting"].rsplit(".", 1)[-1]
        axis.set_title(f"{ablation['contestant']}: {setting}", size=10)
        axis.tick_params(axis="x", labelsize=8)
    for axis in axes[:, 0]:
        axis.set_ylabel("final loss, tuning text")
    _save(figure, path)


def _label(value: Any) -> str:
    return "\n".join(value) or "none" if isinstance(value, list) else str(value)


def _save(figure: Any, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)

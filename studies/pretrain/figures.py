"""The figures of the study, PNG files beside the results."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.patches import Patch
from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter

from studies import plots
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
    by_size = {size: summaries(study, size, contestants, results) for size in sizes}
    done = {size: found for size, found in by_size.items() if target(found) is not None}
    if done:
        _loss(done, folder / "loss.png")
        _ratio(done, folder / "ratio.png")
        _to_target(done, folder / "to_target.png")
    _lr(study, list(by_size), contestants, results, folder / "lr.png")
    _lr_by_size(study, list(by_size), contestants, results, folder / "lr_by_size.png")
    for size in by_size:
        _ablations(study, size, results, folder / f"ablations_{size}.png")


def _loss(done: dict[str, list[Summary]], path: Path) -> None:
    figure, axes = plots.panels(len(done), 2, (5.5, 3.6))
    for row, (size, found) in zip(axes, done.items(), strict=True):
        aim = target(found)
        assert aim is not None
        for summary in found:
            # A run that diverged has fewer evaluations, the last of them without a loss.
            length = min(len(record["loss"]) for record in summary.final)
            losses = [record["loss"][:length] for record in summary.final]
            times = np.mean([seconds(record)[:length] for record in summary.final], axis=0)
            tokens = np.multiply(summary.final[0]["step"][:length], _tokens(summary.settings))
            for axis, x in zip(row, (tokens, times), strict=True):
                plots.band(axis, x, losses, summary.contestant, _color(summary))
        for axis, label in zip(row, ("tokens", "seconds of training"), strict=True):
            plots.reference(axis, aim, f"{BASELINE}'s best seed")
            axis.set_ylim(_lowest(found) - 0.03, aim + 0.8)
            axis.set(xscale="log", xlabel=label, ylabel="held-out loss, nats per token")
            axis.xaxis.set_minor_formatter(NullFormatter())
            plots.finish(axis, f"{size}; mean, and range of {len(found[0].final)} seeds")
    plots.save(figure, path)


def _color(summary: Summary) -> str:
    return plots.color_of(summary.contestant)


def _tokens(settings: dict[str, Any]) -> int:
    """Of a step."""
    return int(settings["training.local_batch_size"] * settings["training.seq_len"])


def _ratio(done: dict[str, list[Summary]], path: Path) -> None:
    """Steps to a loss as a part of the baseline's steps to the same: how an early lead shrinks."""
    figure, axes = plots.panels(1, len(done), (5.5, 3.9))
    for axis, (size, found) in zip(axes[0], done.items(), strict=True):
        aim = target(found)
        baseline = next(summary for summary in found if summary.contestant == BASELINE)
        first = max(record["loss"][1] for record in baseline.final)
        losses = np.linspace(aim or first, first, 60)
        of_baseline = _steps_to(losses, baseline)
        for summary in found:
            if summary is not baseline:
                ratio = _steps_to(losses, summary) / of_baseline
                axis.plot(losses, ratio, color=_color(summary), label=summary.contestant)
        plots.reference(axis, 1.0)
        axis.set(ylim=(0, 1.1), xlabel="held-out loss, nats per token (training goes to the right)")
        axis.set_ylabel(f"steps to it, {BASELINE} = 1")
        axis.invert_xaxis()
        plots.finish(axis, f"{size}; mean of {len(baseline.final)} seeds")
    plots.save(figure, path)


def _steps_to(losses: Any, summary: Summary) -> Any:
    """Mean of the seeds; NaN where one does not get there."""
    of_seeds = [[reached(record, loss) for loss in losses] for record in summary.final]
    steps = [[np.nan if r is None else r[0] for r in found] for found in of_seeds]
    return np.mean(steps, axis=0)


def _lowest(found: list[Summary]) -> float:
    return min(min(summary.losses()) for summary in found)


def _to_target(done: dict[str, list[Summary]], path: Path) -> None:
    figure, axes = plots.panels(1, 2, (5.5, 3.9), sharey=True)
    places = 2 + max(map(len, done.values()))
    for column, (axis, what) in enumerate(zip(axes[0], ("steps", "time"), strict=True)):
        middles = []
        for group, found in enumerate(done.values()):
            aim = target(found)
            assert aim is not None
            whole = next(s.whole() for s in found if s.contestant == BASELINE)[column]
            others = [summary for summary in found if summary.contestant != BASELINE]
            first = group * places
            middles.append(first + (len(others) - 1) / 2)
            for x, summary in enumerate(others, first):
                values = [r[column] / whole for r in summary.to_target(aim) if r is not None]
                if values:
                    axis.bar(x, np.mean(values), color=_color(summary), alpha=0.6)
                    axis.plot(x + np.linspace(-0.2, 0.2, len(values)), values, "k.", ms=4)
                if len(values) < len(summary.final):
                    axis.text(x, 1.02, "never" if not values else "not all", ha="center", size=7)
        plots.reference(axis, 1.0)
        axis.set_xticks(middles, list(done))
        axis.set_title(f"{what} to {BASELINE}'s best final loss (dots: seeds)", size=10)
        shown = dict.fromkeys(s.contestant for found in done.values() for s in found)
        del shown[BASELINE]
        bars = [Patch(color=plots.color_of(name), alpha=0.6) for name in shown]
        axis.legend(bars, shown, fontsize=8)
    axes[0][0].set_ylabel(f"1 = {BASELINE}'s full run")
    plots.save(figure, path)


def _lr(
    study: Study, sizes: list[str], contestants: list[str], results: Results, path: Path
) -> None:
    curves = {
        size: {
            name: points for name in contestants if (points := by_lr(study, size, name, results))
        }
        for size in sizes
    }
    curves = {size: found for size, found in curves.items() if found}
    if not curves:
        return
    figure, axes = plots.panels(1, len(curves), (4.5, 3.6))
    for axis, (size, found) in zip(axes[0], curves.items(), strict=True):
        for name, points in found.items():
            color = plots.color_of(name)
            axis.plot(*zip(*points, strict=True), "o-", color=color, label=name, ms=3)
        lowest = min(loss for points in found.values() for _, loss in points)
        axis.set_ylim(lowest - 0.03, lowest + 0.8)
        axis.set(xscale="log", xlabel="lr", ylabel="final loss, tuning text")
        _lr_ticks(axis)
        plots.finish(axis, f"{size}, before the other settings are chosen")
    plots.save(figure, path)


def _lr_by_size(
    study: Study, sizes: list[str], contestants: list[str], results: Results, path: Path
) -> None:
    """For each contestant the curves of all sizes, above their lowest: does the best lr move?"""
    curves = {
        name: {size: points for size in sizes if (points := by_lr(study, size, name, results))}
        for name in contestants
    }
    curves = {name: found for name, found in curves.items() if len(found) > 1}
    if not curves:
        return
    figure, axes = plots.panels(1, len(curves), (4.5, 3.6), sharey=True)
    for axis, (name, found) in zip(axes[0], curves.items(), strict=True):
        for size, points in found.items():
            lr, losses = zip(*points, strict=True)
            above = np.subtract(losses, min(losses))
            (line,) = axis.plot(lr, above, "o-", label=size, ms=3)
            axis.plot(lr[losses.index(min(losses))], 0.0, "*", color=line.get_color(), ms=12)
        axis.set(xscale="log", xlabel="lr", ylim=(-0.02, 0.3))
        _lr_ticks(axis)
        plots.finish(axis, f"{name} (stars: the best)")
    axes[0][0].set_ylabel("final loss above the lowest of that size")
    plots.save(figure, path)


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
    figure, axes = plots.panels(rows_of_axes, columns, (4, 3), sharey=True)
    lowest = min(loss for _, rows in found for _, _, loss in rows)
    for axis in axes.flat[len(found) :]:
        axis.remove()
    for axis, (ablation, rows) in zip(axes.flat, found, strict=False):
        labels, losses = [_label(value) for value, _, _ in rows], [loss for _, _, loss in rows]
        ordered = all(isinstance(value, int | float) for value in ablation["values"])
        color = plots.color_of(ablation["contestant"])
        style = "o-" if ordered else "o"
        axis.plot(labels, np.minimum(losses, lowest + _SHOWN), style, color=color)
        for x, loss in enumerate(losses):
            if loss > lowest + _SHOWN:
                text = "diverged" if np.isinf(loss) else f"{loss:.2f}"
                axis.text(x, lowest + _SHOWN - 0.05, text, ha="center", size=8)
        axis.set_ylim(lowest - 0.03, lowest + _SHOWN + 0.03)
        plots.reference(axis, lowest)
        setting = ablation["setting"].rsplit(".", 1)[-1]
        axis.set_title(f"{ablation['contestant']}: {setting}", size=10)
        axis.tick_params(axis="x", labelsize=8)
    for axis in axes[:, 0]:
        axis.set_ylabel("final loss, tuning text")
    plots.save(figure, path)


def _label(value: Any) -> str:
    return "\n".join(value) or "none" if isinstance(value, list) else str(value)

"""The figures of the study, PNG files beside the results."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.ticker import (
    EngFormatter,
    FormatStrFormatter,
    LogLocator,
    MaxNLocator,
    NullFormatter,
)

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

_SHOWN = 0.7  # nats above the best; ablations beyond are written at the edge
_LOSS = "held-out loss, nats per token"
_TUNING_LOSS = "final loss, tuning text"


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
    figure, axes = plots.panels(2 * len(done), 2)
    rows = zip(axes[::2], axes[1::2], done.items(), strict=True)
    for *row, (size, found) in rows:
        aim = target(found)
        assert aim is not None
        for summary in found:
            # A run that diverged has fewer evaluations, the last of them without a loss.
            length = min(len(record["loss"]) for record in summary.final)
            losses = [record["loss"][:length] for record in summary.final]
            times = np.mean([seconds(record)[:length] for record in summary.final], axis=0)
            tokens = np.multiply(summary.final[0]["step"][:length], _tokens(summary.settings))
            for axis, x in zip(row, (tokens, times), strict=True):
                style = plots.style_of(summary.contestant)
                plots.band(axis, x, losses, summary.contestant, **style)
        title = f"{size}; mean, and range of {len(found[0].final)} seeds"
        for axis, label in zip(row, ("tokens", "seconds of training"), strict=True):
            plots.reference(axis, aim, f"{BASELINE}'s best seed")
            axis.set(ylim=(_lowest(found) - 0.03, aim + 0.6), xlim=(0, None))
            plots.finish(axis, title, xlabel=label, ylabel=_LOSS if axis is row[0] else "")
        row[0].xaxis.set_major_locator(MaxNLocator(5))
        row[0].xaxis.set_major_formatter(EngFormatter(sep=" "))
    plots.save(figure, path)


def _tokens(settings: dict[str, Any]) -> int:
    """Of a step."""
    return int(settings["training.local_batch_size"] * settings["training.seq_len"])


def _ratio(done: dict[str, list[Summary]], path: Path) -> None:
    """Steps to a loss as a part of the baseline's steps to the same: how an early lead shrinks."""
    figure, axes = plots.panels(len(done), min(2, len(done)))
    for axis, (size, found) in zip(axes, done.items(), strict=True):
        aim = target(found)
        baseline = next(summary for summary in found if summary.contestant == BASELINE)
        first = max(record["loss"][1] for record in baseline.final)
        losses = np.linspace(aim or first, first, 60)
        of_baseline = _steps_to(losses, baseline)
        for summary in found:
            if summary is not baseline:
                ratio = _steps_to(losses, summary) / of_baseline
                style = plots.style_of(summary.contestant)
                axis.plot(losses, ratio, label=summary.contestant, **style)
        plots.reference(axis, 1.0)
        axis.set_ylim(0, 1.1)
        axis.invert_xaxis()
        plots.finish(
            axis,
            f"{size}; mean of {len(baseline.final)} seeds",
            xlabel=f"{_LOSS} (training goes to the right)",
            ylabel=f"steps to it, {BASELINE} = 1",
        )
    plots.save(figure, path)


def _steps_to(losses: Any, summary: Summary) -> Any:
    """Mean of the seeds; NaN where one does not get there."""
    of_seeds = [[reached(record, loss) for loss in losses] for record in summary.final]
    steps = [[np.nan if r is None else r[0] for r in found] for found in of_seeds]
    return np.mean(steps, axis=0)


def _lowest(found: list[Summary]) -> float:
    return min(min(summary.losses()) for summary in found)


def _to_target(done: dict[str, list[Summary]], path: Path) -> None:
    figure, axes = plots.panels(2, 2, sharey=True)
    places = 2 + max(map(len, done.values()))
    for column, (axis, what) in enumerate(zip(axes, ("steps", "time"), strict=True)):
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
                    color = plots.style_of(summary.contestant)["color"]
                    axis.bar(x, np.mean(values), color=color, label=summary.contestant)
                    axis.plot(x + np.linspace(-0.2, 0.2, len(values)), values, "k.", ms=4)
                if len(values) < len(summary.final):
                    axis.text(x, 1.02, "never" if not values else "not all", ha="center", size=7)
        plots.reference(axis, 1.0)
        axis.set_xticks(middles, list(done))
        plots.finish(axis, f"{what} to {BASELINE}'s best final loss (dots: seeds)")
    axes[0].set_ylabel(f"1 = {BASELINE}'s full run")
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
    curves = {size: found for size, found in curves.items() if len(found) > 1}
    if not curves:
        return
    figure, axes = plots.panels(len(curves), min(2, len(curves)))
    for axis, (size, found) in zip(axes, curves.items(), strict=True):
        for name, points in found.items():
            style = plots.style_of(name)
            axis.plot(*zip(*points, strict=True), marker="o", label=name, ms=3, **style)
        losses = [loss for points in found.values() for _, loss in points]
        axis.set_ylim(*_limits(losses))
        axis.set_xscale("log")
        _lr_ticks(axis)
        title = f"{size}, before the other settings are chosen"
        plots.finish(axis, title, xlabel="lr", ylabel=_TUNING_LOSS)
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
    figure, axes = plots.panels(len(curves), 2, sharey=True)
    for axis, (name, found) in zip(axes, curves.items(), strict=True):
        for number, (size, points) in enumerate(found.items()):
            lr, losses = zip(*points, strict=True)
            above = np.subtract(losses, min(losses))
            color = plots.shade(number, len(found))
            axis.plot(lr, above, "o-", color=color, label=size, ms=3)
            axis.plot(lr[losses.index(min(losses))], 0.0, "*", color=color, ms=11)
        axis.set(xscale="log", ylim=(-0.02, 0.3))
        _lr_ticks(axis)
        plots.finish(axis, f"{name} (stars: the best)", xlabel="lr")
    for axis in axes[::2]:
        axis.set_ylabel("final loss above the lowest")
    plots.save(figure, path)


def _limits(losses: Sequence[float]) -> tuple[float, float]:
    """Of an axis: what is far above the best is beyond it."""
    lowest = min(losses)
    margin = 0.08 * (min(max(losses), lowest + _SHOWN) - lowest)
    return lowest - margin, min(max(losses), lowest + _SHOWN) + margin


def _lr_ticks(axis: Any) -> None:
    axis.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.xaxis.set_major_formatter(FormatStrFormatter("%g"))
    axis.xaxis.set_minor_formatter(NullFormatter())


def _ablations(study: Study, size: str, results: Results, path: Path) -> None:
    found = [(a, ablation_losses(study, size, a, results)) for a in study.ablations]
    found = [(ablation, rows) for ablation, rows in found if len(rows) > 1]
    if not found:
        return
    figure, axes = plots.panels(len(found), 3, 2.2, sharey=True)
    limits = _limits([loss for _, rows in found for _, _, loss in rows])
    for axis, (ablation, rows) in zip(axes, found, strict=True):
        labels, losses = [_label(value) for value, _, _ in rows], [loss for _, _, loss in rows]
        ordered = all(isinstance(value, int | float) for value in ablation["values"])
        color = plots.style_of(ablation["contestant"])["color"]
        top = limits[0] + 0.95 * (limits[1] - limits[0])
        axis.plot(labels, np.minimum(losses, top), "o-" if ordered else "o", color=color, ms=4)
        for x, loss in enumerate(losses):
            if loss > limits[1]:
                axis.text(x, top, "diverged " if np.isinf(loss) else f"{loss:.2f} ", ha="right")
        axis.set_ylim(*limits)
        plots.reference(axis, min(loss for _, rows in found for _, _, loss in rows))
        plots.finish(axis, ablation["setting"].rsplit(".", 1)[-1])
        slanted = {"labelrotation": 15} if max(map(len, labels)) > 8 else {}
        axis.tick_params(axis="x", labelsize=8, **slanted)
    for axis in axes[::3]:
        axis.set_ylabel(_TUNING_LOSS)
    plots.save(figure, path)


def _label(value: Any) -> str:
    return ", ".join(value).replace("^", "") or "none" if isinstance(value, list) else str(value)

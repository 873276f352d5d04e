"""What the runs of a contestant amount to: losses, and steps and seconds to a target."""

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from studies.pretrain.plan import LR, Study
from studies.pretrain.results import Results, Run

BASELINE = "AdamW"


def smoothed(losses: Iterable[float | None]) -> list[float]:
    """The mean of each evaluation and its neighbours: one lucky evaluation reaches no target."""
    values = [float("inf") if loss is None else loss for loss in losses]
    return [statistics.fmean(values[max(0, i - 1) : i + 2]) for i in range(len(values))]


def seconds(record: dict[str, Any]) -> list[float]:
    """Training time at each evaluation, without start-up and evaluations.

    On the CPU that is the time that the process had a core, which is what it takes on a machine
    with nothing else to do; on GPUs, where the host does not tell, the time on the clock. Records
    of `summaries` have had their times made comparable.
    """
    found: list[float] = record["cpu_seconds" if record["device"] == "cpu" else "seconds"]
    return found


def optimizer_ms(record: dict[str, Any]) -> float:
    """Time of the optimizer in a step, mean of the run."""
    return float(1e3 * record["optimizer_seconds"] / record["step"][-1])


def _with_common_passes(found: list["Summary"]) -> None:
    """Sets the times of all runs to what they are if forward and backward take equally long.

    These do the same work for every optimizer; how long it takes differs with what else the
    machine does, by more than some optimizers differ. All runs get the median of all. Not on GPUs,
    where the host cannot tell the optimizer's part.
    """
    records = [record for summary in found for record in summary.final]
    if not records or any(record["device"] != "cpu" for record in records):
        return
    common = statistics.median(_pass_seconds(record) for record in records)
    for record in records:
        change = common - _pass_seconds(record)
        pairs = zip(record["step"], record["cpu_seconds"], strict=True)
        record["cpu_seconds"] = [time + step * change for step, time in pairs]


def _pass_seconds(record: dict[str, Any]) -> float:
    """Forward and backward of a step."""
    passes: float = record["cpu_seconds"][-1] - record["optimizer_seconds"]
    return passes / record["step"][-1]


def reached(record: dict[str, Any], target: float) -> tuple[float, float] | None:
    """Steps and seconds until the smoothed loss is at the target; None if it never is.

    Between two evaluations the loss counts as linear.
    """
    points = list(zip(smoothed(record["loss"]), record["step"], seconds(record), strict=True))
    for before, (loss, step, time) in zip([None, *points], points, strict=False):
        if loss <= target:
            if before is None:
                return step, time
            part = (before[0] - target) / (before[0] - loss)
            return before[1] + part * (step - before[1]), before[2] + part * (time - before[2])
    return None


def at(record: dict[str, Any], along: Sequence[float], where: float) -> float:
    """The loss in the middle of a run, linear between two evaluations, those at the ends beyond.

    Args:
        along: What `where` is one of, at each evaluation: steps, seconds; ascending.
    """
    losses = [float("inf") if loss is None else loss for loss in record["loss"]]
    return float(np.interp(where, along, losses))


@dataclass(frozen=True, kw_only=True)
class Summary:
    """A contestant at one size: the settings that were chosen, and its records by seed."""

    contestant: str
    settings: dict[str, Any]
    final: list[dict[str, Any]]
    shorter: list[dict[str, Any]]

    def losses(self, shorter: bool = False) -> list[float]:
        """Last losses on held-out text, of each seed."""
        records = self.shorter if shorter else self.final
        return [float("inf") if r["loss"][-1] is None else r["loss"][-1] for r in records]

    def to_target(self, target: float) -> list[tuple[float, float] | None]:
        """Steps and seconds to the target, of each seed."""
        return [reached(record, target) for record in self.final]

    def seed_by_seed(self, other: "Summary") -> list[tuple[float, float] | None]:
        """Steps and seconds to where the other ends that began with the same weights and has had
        the same batches, for each seed."""
        pairs = zip(self.final, other.losses(), strict=True)
        return [reached(record, loss) for record, loss in pairs]

    def whole(self) -> tuple[float, float]:
        """Steps and seconds of a full run, mean of the seeds."""
        return (
            statistics.fmean(record["step"][-1] for record in self.final),
            statistics.fmean(seconds(record)[-1] for record in self.final),
        )

    def optimizer_ms(self) -> float:
        """Time of the optimizer in a step, mean of the seeds."""
        return statistics.fmean(optimizer_ms(record) for record in self.final)


def summaries(
    study: Study, size: str, contestants: Iterable[str], results: Results
) -> list[Summary]:
    """Of the contestants that have all their final runs, their times made comparable."""
    found = []
    for contestant in contestants:
        _, settings = study.tuning(size, contestant, results.loss)
        if settings is None:
            continue
        final = study.final(size, contestant, settings)
        if not all(run in results for run in final):
            continue
        shorter = study.shorter(size, contestant, settings)
        found.append(
            Summary(
                contestant=contestant,
                settings=settings,
                final=[dict(results[run]) for run in final],
                shorter=[results[run] for run in shorter if run in results],
            )
        )
    _with_common_passes(found)
    return found


def target(found: list[Summary]) -> float | None:
    """AdamW's best final loss on held-out text: that of its best seed."""
    losses = [x for s in found if s.contestant == BASELINE for x in s.losses()]
    return min(losses) if losses else None


def by_lr(study: Study, size: str, contestant: str, results: Results) -> list[tuple[float, float]]:
    """lr and final loss of the runs that lr was chosen by, ascending."""
    runs, _ = study.tuning(size, contestant, results.loss)
    losses = {run.settings[LR]: results.loss(run) for run in runs if _same_but_lr(run, runs[0])}
    return sorted((lr, loss) for lr, loss in losses.items() if loss is not None)


def _same_but_lr(run: Run, other: Run) -> bool:
    return {**run.settings, LR: None} == {**other.settings, LR: None}


def ablation_losses(
    study: Study, size: str, ablation: dict[str, Any], results: Results
) -> list[tuple[Any, Run, float]]:
    """Each value, its best run, and that run's final loss; values without a finished run lack."""
    _, best = study.tuning(size, ablation["contestant"], results.loss)
    if best is None or size not in study.general["ablations"]:
        return []
    found: dict[str, tuple[Any, Run, float]] = {}
    for value, run in study.ablation(size, ablation, best):
        loss = results.loss(run)
        if loss is not None and (str(value) not in found or loss < found[str(value)][2]):
            name = ablation.get("names", {}).get(str(value), value)
            found[str(value)] = (name, run, loss)
    return list(found.values())

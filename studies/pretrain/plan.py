"""Which runs the study consists of, given the results so far.

Settings are chosen one after the other, so that later runs depend on the losses of earlier ones:
`Study.runs` is asked again after each result. All choices are by the validation loss on the job's
own validation text; the final runs are validated on other text, which no choice sees.
"""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from studies.pretrain.results import Run
from studies.pretrain.toml_files import flat, read_toml, tomllib

Loss = Callable[[Run], float | None]
"""The final validation loss of a run, or None while there is none."""

TUNING, FINAL, SHORTER, ABLATIONS = STAGES = ("tuning", "final", "shorter", "ablations")

LR = "optimizer.lr"
_GROWTH = 4  # values of lr added at most


class Study:
    """The study that a file describes.

    Args:
        file: Like study.toml, with the folder `jobs` beside it.
        changes: Settings of the jobs that replace those of the files, dots in their names.
    """

    def __init__(self, file: Path, changes: dict[str, Any] | None = None) -> None:
        tables = tomllib.loads(file.read_text())
        self.general: dict[str, Any] = tables["study"]
        self.seconds_per_step: dict[str, float] = tables["seconds_per_step"]
        self.contestants: dict[str, dict[str, Any]] = {
            name: {"tune": {}, **contestant} for name, contestant in tables["contestants"].items()
        }
        self.of_size: dict[str, dict[str, Any]] = tables.get("size", {})
        """Where a size has no job file of its own: that of `job`, and what is other in it."""
        self.ablations: list[dict[str, Any]] = tables.get("ablation", [])
        self._file, self._changes = file, changes or {}

    @property
    def sizes(self) -> list[str]:
        """The names of the models' sizes, in the order of the file."""
        return list(self.seconds_per_step)

    def job(self, size: str, contestant: str) -> dict[str, Any]:
        """The settings of a contestant's job before anything is chosen."""
        of_size = dict(self.of_size.get(size, {}))
        file = self._file.parent / "jobs" / f"{of_size.pop('job', size)}.toml"
        common = read_toml(file.read_text()) | flat(of_size)
        own = flat(self.contestants[contestant]["job"])
        return {**common, "debug.seed": self.general["seed"], **own, **self._changes}

    def runs(self, size: str, contestant: str, stages: Iterable[str], loss: Loss) -> list[Run]:
        """All runs that are known by now, finished or not; some may be in it twice."""
        runs, best = self.tuning(size, contestant, loss)
        if best is None:
            return runs
        for stage in stages:
            if stage == FINAL:
                runs += self.final(size, contestant, best)
            elif stage == SHORTER:
                runs += self.shorter(size, contestant, best)
            elif stage == ABLATIONS and size in self.general["ablations"]:
                for ablation in self.ablations:
                    if ablation["contestant"] == contestant:
                        runs += [run for _, run in self.ablation(size, ablation, best)]
        return runs

    def tuning(
        self, size: str, contestant: str, loss: Loss
    ) -> tuple[list[Run], dict[str, Any] | None]:
        """The runs that choose settings, and the settings once all of these have finished."""
        settings, part = self.job(size, contestant), self.general["tuning_part"][size]
        all_runs: list[Run] = []
        for name, values in self.contestants[contestant]["tune"].items():
            tried = sorted(values)
            for _ in range(_GROWTH + 1):
                choices = [{**settings, name: value} for value in tried]
                if name != LR:
                    choices.append(settings)  # the value, or the default, that is there
                runs = [
                    self._run(size, contestant, TUNING, _with_steps(choice, part))
                    for choice in choices
                ]
                losses = [loss(run) for run in runs]
                if None in losses:
                    return all_runs + runs, None
                best = losses.index(min(losses))  # type: ignore[type-var]
                more = _beyond(tried, best) if name == LR else None
                if more is None:
                    break
                tried = sorted([*tried, more])
            all_runs += runs
            settings = choices[best]
        return all_runs, settings

    def final(self, size: str, contestant: str, best: dict[str, Any]) -> list[Run]:
        """The runs that contestants are compared by, one for each seed."""
        best = {**best, "validation.dataset": self.general["held_out"]}
        return [
            self._run(size, contestant, FINAL, {**best, "debug.seed": seed})
            for seed in self.general["final_seeds"]
        ]

    def shorter(self, size: str, contestant: str, best: dict[str, Any]) -> list[Run]:
        """The first of these runs with a schedule of fewer steps."""
        first = self.final(size, contestant, best)[:1]
        fewer = [_with_steps(run.settings, self.general["shorter"]) for run in first]
        return [self._run(size, contestant, SHORTER, settings) for settings in fewer]

    def ablation(
        self, size: str, ablation: dict[str, Any], best: dict[str, Any]
    ) -> list[tuple[Any, Run]]:
        """Pairs of a value and a run, as long as those that chose the other settings; several of
        one value if lr is tried anew for it. The contestant's own value is the run without it."""
        best = {
            **_with_steps(best, self.general["tuning_part"][size]),
            **flat(ablation.get("beside", {})),
        }
        pairs = []
        for value in ablation["values"]:
            changed = {} if value == ablation.get("own") else {ablation["setting"]: value}
            for factor in ablation.get("lr", {}).get(str(value), [1.0]):
                settings = {**best, **changed, LR: factor * best[LR]}
                pairs.append((value, self._run(size, ablation["contestant"], ABLATIONS, settings)))
        return pairs

    def _run(self, size: str, contestant: str, stage: str, settings: dict[str, Any]) -> Run:
        return Run(size=size, contestant=contestant, stage=stage, settings=settings)


def _with_steps(settings: dict[str, Any], part: float) -> dict[str, Any]:
    """The same with a part of the steps, and the schedule that goes with them."""
    names = ("training.steps", "lr_scheduler.warmup_steps")
    return {**settings, **{name: round(part * settings[name]) for name in names}}


def _beyond(tried: list[float], best: int) -> float | None:
    """The next value of a geometric row, if the best is its first or last."""
    if len(tried) < 2 or 0 < best < len(tried) - 1:
        return None
    inner = tried[1] if best == 0 else tried[-2]
    return float(f"{tried[best] ** 2 / inner:.6g}")

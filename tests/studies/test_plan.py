"""Which runs follow from which losses, and what of a killed study survives."""

import json
from pathlib import Path

import pytest

from studies.pretrain.execute import missing
from studies.pretrain.plan import LR, Study
from studies.pretrain.results import Results, Run

_STUDY = """
[study]
seed = 0
final_seeds = [1, 2]
shorter = 0.5
tuning_part = { tiny = 0.2 }
held_out = "unseen"
ablations = ["tiny"]
[seconds_per_step]
tiny = 0.1
[contestants.AdamW.job.optimizer]
name = "AdamW"
[contestants.AdamW.tune]
"optimizer.lr" = [1e-3, 1e-2, 1e-1]
"optimizer.weight_decay" = [0.3]
[[ablation]]
contestant = "AdamW"
setting = "optimizer.eps"
values = [1e-8, 1e-4]
"""

_JOB = """
optimizer = { lr = 1.0, weight_decay = 0.1 }
lr_scheduler.warmup_steps = 10
training.steps = 100
validation.dataset = "tuning"
"""


@pytest.fixture
def study(tmp_path: Path) -> Study:
    (tmp_path / "jobs").mkdir()
    (tmp_path / "jobs" / "tiny.toml").write_text(_JOB)
    (tmp_path / "study.toml").write_text(_STUDY)
    return Study(tmp_path / "study.toml")


def _loss(run: Run) -> float:
    """Best at lr 1e-2 and weight decay 0.3."""
    settings = run.settings
    return abs(settings[LR] - 1e-2) + abs(settings["optimizer.weight_decay"] - 0.3)


def _curve(loss: float, step: int = 100) -> dict:
    return {"step": [step], "loss": [loss], "seconds": [5.0], "cpu_seconds": [5.0]}


def test_the_best_lr_then_the_best_weight_decay_are_kept(study):
    runs, best = study.tuning("tiny", "AdamW", lambda run: None)
    assert len(runs) == 3 and best is None
    runs, best = study.tuning("tiny", "AdamW", _loss)
    assert (best[LR], best["optimizer.weight_decay"]) == (1e-2, 0.3)
    decays = [(run.settings[LR], run.settings["optimizer.weight_decay"]) for run in runs]
    assert decays[:3] == [(1e-3, 0.1), (1e-2, 0.1), (1e-1, 0.1)]
    assert set(decays[3:]) == {(1e-2, 0.1), (1e-2, 0.3)}
    # The list of lr grows until the best is inside.
    runs, best = study.tuning("tiny", "AdamW", lambda run: abs(run.settings[LR] - 1e-5))
    assert best[LR] == pytest.approx(1e-5)
    assert min(run.settings[LR] for run in runs) == pytest.approx(1e-6)


def test_only_the_runs_that_are_compared_see_the_held_out_text(study):
    runs = study.runs("tiny", "AdamW", ("final", "shorter", "ablations"), _loss)
    text = {(run.stage, run.settings["validation.dataset"]) for run in runs}
    assert text == {
        *((stage, "tuning") for stage in ("tuning", "ablations")),
        *((stage, "unseen") for stage in ("final", "shorter")),
    }
    final = [run for run in runs if run.stage == "final"]
    assert [run.settings["debug.seed"] for run in final] == [1, 2]
    assert all(_loss(run) == 0 for run in final)
    steps = {
        (r.stage, r.settings["training.steps"], r.settings["lr_scheduler.warmup_steps"])
        for r in runs
    }
    assert {("tuning", 20, 2), ("final", 100, 10), ("shorter", 50, 5)} <= steps


def test_a_killed_study_goes_on(study, tmp_path):
    path = tmp_path / "results" / "runs.jsonl"
    results = Results(path)
    todo = list(missing(study, ["tiny"], ["AdamW"], ["final"], results.loss).values())
    results.add(todo[0], _curve(1.0))
    results.add(todo[1], _curve(float("inf"), step=20))
    with path.open("a") as file:
        file.write('{"id": "half a li')

    again = Results(path)
    assert [again.loss(run) for run in todo] == [1.0, float("inf"), None]
    left = missing(study, ["tiny"], ["AdamW"], ["final"], again.loss)
    assert list(left) == [todo[2].id]
    again.add(todo[2], _curve(2.0))
    assert Results(path).loss(todo[2]) == 2.0
    record = json.loads(path.read_text().splitlines()[0])
    assert record["settings"][LR] == 1e-3

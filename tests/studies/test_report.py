"""Table and figures from made-up results."""

from pathlib import Path

import pytest

from studies.pretrain import report
from studies.pretrain.execute import missing
from studies.pretrain.plan import STAGES, Study
from studies.pretrain.results import Results

_FILE = Path(report.__file__).parent / "study.toml"
_SPEED = {"AdamW": 1.0, "Muon": 1.6, "KL-Shampoo": 2.0}  # steps of AdamW for one of theirs


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A study of three contestants at one size, each loss 1 / (1 + steps of AdamW)."""
    study = Study(_FILE, {"training.steps": 300})
    results = Results(tmp_path_factory.mktemp("results") / "runs.jsonl")
    while todo := missing(study, ["1M"], list(_SPEED), STAGES, results.loss):
        for run in todo.values():
            steps = list(range(10, run.settings["training.steps"] + 1, 10))
            penalty = abs(run.settings["optimizer.lr"] - 8e-3)
            penalty += run.settings["debug.seed"] * 1e-5
            curve = {
                "step": steps,
                "loss": [1 / (1 + 0.01 * s * _SPEED[run.contestant]) + penalty for s in steps],
                "seconds": [0.1 * s for s in steps],
                "cpu_seconds": [0.1 * s for s in steps],
                "optimizer_seconds": 1.0,
                "device": "cpu",
            }
            results.add(run, curve)
    return study, results


def test_the_table_says_how_many_steps_are_saved(finished):
    study, results = finished
    lines = report.markdown(study, ["1M"], list(_SPEED), results).splitlines()
    rows = {line.split(" | ")[0][2:]: line.split(" | ") for line in lines if line.startswith("| ")}
    assert rows["AdamW"][1].startswith("lr 0.008, weight_decay ")
    steps = {name: rows[name][3] for name in _SPEED}
    # KL-Shampoo's curve is AdamW's at twice the speed.
    assert steps["KL-Shampoo"] == "150 (-50%)"
    assert steps["Muon"] == "188 (-37%)"
    assert rows["KL-Shampoo"][4] == "15 s (-50%)"
    assert rows["KL-Shampoo"][5] == "150 (-50%)"  # as all seeds are alike
    assert rows["AdamW"][5] == "300"
    assert "Ablations, 1M" in lines
    assert any("start_preconditioning_step | never (lr 0.008)" in line for line in lines)


def test_figures_are_drawn(finished, tmp_path):
    figures = pytest.importorskip("studies.pretrain.figures", exc_type=ImportError)
    study, results = finished
    figures.draw(study, ["1M", "3M"], list(_SPEED), results, tmp_path)
    drawn = {path.name for path in tmp_path.iterdir()}
    assert drawn == {"loss.png", "ratio.png", "to_target.png", "lr.png", "ablations_1M.png"}

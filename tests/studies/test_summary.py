"""What counts as reaching the target."""

from pathlib import Path

import pytest

from studies.pretrain import summary
from studies.pretrain.execute import missing
from studies.pretrain.plan import Study
from studies.pretrain.results import Results
from studies.pretrain.summary import at, reached, summaries

_FILE = Path(summary.__file__).parent / "study.toml"


def _record(losses):
    n = range(1, len(losses) + 1)
    return {
        "step": [10 * i for i in n],
        "loss": losses,
        "seconds": [100.0 * i for i in n],
        "cpu_seconds": [float(i) for i in n],
        "device": "cpu",
    }


def test_one_lucky_evaluation_does_not_reach_the_target():
    # Means of neighbours: 2, 2.33, 2, 2, 1.33, 1; linear between them.
    found = reached(_record([3.0, 1.0, 3.0, 2.0, 1.0, 1.0]), 1.5)
    assert found == pytest.approx((47.5, 4.75))


def test_the_loss_in_the_middle_of_a_run():
    record = _record([3.0, 2.0, 1.0])  # at 10, 20 and 30
    assert at(record, record["step"], 25.0) == pytest.approx(1.5)
    assert at(record, record["cpu_seconds"], 1.5) == pytest.approx(2.5)
    assert at(record, record["step"], 40.0) == 1.0  # its end
    assert at(record, record["step"], 1.0) == 3.0
    diverged = _record([3.0, None])
    assert at(diverged, diverged["step"], 20.0) == float("inf")


def test_a_run_beside_other_work_counts_no_slower(tmp_path):
    """Two runs whose optimizers take equally long, one of them with slow forward and backward."""
    study = Study(_FILE)
    results = Results(tmp_path / "runs.jsonl")
    slow = {"AdamW": 1.0, "Muon": 1.5}
    while todo := missing(study, ["1M"], list(slow), ["final"], results.loss):
        for run in todo.values():
            record = _record([3.0, 2.0, 1.0])
            passes = [0.8 * slow[run.contestant] * i for i in range(1, 4)]
            optimizer = [0.2, 0.3, 0.4]  # dearer at the start
            record["cpu_seconds"] = [sum(pair) for pair in zip(passes, optimizer, strict=True)]
            results.add(run, {**record, "optimizer_seconds": optimizer[-1]})
    adamw, muon = summaries(study, "1M", list(slow), results)
    assert muon.whole() == pytest.approx(adamw.whole())
    assert muon.to_target(2.0)[0] == pytest.approx((20, 2 * 0.8 * 1.25 + 0.3))

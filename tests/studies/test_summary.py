"""What counts as reaching the target."""

import pytest

from studies.pretrain.summary import Summary, first_at_or_below, target


def _record(losses):
    n = range(1, len(losses) + 1)
    return {
        "step": [10 * i for i in n],
        "loss": losses,
        "seconds": [100.0 * i for i in n],
        "cpu_seconds": [float(i) for i in n],
        "device": "cpu",
    }


def _summary(contestant, *losses):
    return Summary(
        contestant=contestant, settings={}, final=[_record(x) for x in losses], shorter=[]
    )


def test_one_lucky_evaluation_does_not_reach_the_target():
    record = _record([3.0, 1.0, 3.0, 2.0, 1.0, 1.0])
    assert first_at_or_below(record, 1.5) == (50, 5.0)


def test_a_diverged_run_never_reaches_it():
    assert first_at_or_below(_record([3.0, 2.0, None]), 1.5) is None


def test_time_on_a_gpu_is_the_clock():
    record = {**_record([1.0]), "device": "cuda"}
    assert first_at_or_below(record, 1.5) == (10, 100.0)


def test_the_target_is_the_best_seed_of_adamw():
    found = [_summary("AdamW", [2.0, 1.5], [2.0, 1.4]), _summary("Shampoo", [1.0], [1.0])]
    assert target(found) == pytest.approx(1.4)
    assert target(found[1:]) is None

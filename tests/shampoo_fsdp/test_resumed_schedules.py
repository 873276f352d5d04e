"""Independent weight decay follows the schedule alone, also where a job goes on from a checkpoint
with another lr: what the weights lose is weight_decay times the factor of the schedule in use."""

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from shampoo_fsdp import Shampoo

DECAY = 0.1
STEPS = 20  # before the checkpoint
SCHEDULES = {
    "steady": lambda step: 1.0,
    "warm up": lambda step: min(1.0, 0.01 * (step + 1)),
    "falling": lambda step: 1.0 - step / 60,
}


def build(lr: float) -> Shampoo:
    named = [("w", nn.Parameter(torch.ones(4, 4))), ("b", nn.Parameter(torch.ones(4)))]
    decay = {"weight_decay": DECAY, "weight_decay_type": "independent"}
    optimizer = Shampoo(named, lr=lr, **decay)
    for parameter in optimizer.param_groups[0]["params"]:
        parameter.grad = torch.zeros_like(parameter)
    return optimizer


def lost(optimizer: Shampoo) -> float:
    """The share of the weights on a step."""
    before = [p.detach().clone() for p in optimizer.param_groups[0]["params"]]
    optimizer.step()
    after = optimizer.param_groups[0]["params"]
    matrix, vector = (1.0 - (b / a).mean().item() for a, b in zip(before, after, strict=True))
    assert matrix == pytest.approx(vector, abs=1e-6)
    return matrix


def check(optimizer: Shampoo, scheduler: LambdaLR, schedule, steps: range) -> None:
    for step in steps:
        assert lost(optimizer) == pytest.approx(DECAY * schedule(step), abs=1e-6), step
        scheduler.step()


def saved(schedule) -> tuple[dict, dict]:
    """State dicts of an optimizer with an lr of 0.01 and of its scheduler."""
    optimizer = build(0.01)
    scheduler = LambdaLR(optimizer, schedule)
    check(optimizer, scheduler, schedule, range(STEPS))
    return optimizer.state_dict(), scheduler.state_dict()


each_lr = pytest.mark.parametrize("lr", [0.033, 0.01, 0.003])


@each_lr
@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
@pytest.mark.parametrize("scheduler_is_loaded", [True, False])
def test_the_schedule_goes_on(lr, schedule, scheduler_is_loaded):
    """TorchTitan 0.3 takes over the step alone, and sets lr anew."""
    optimizer = build(lr)
    scheduler = LambdaLR(optimizer, schedule)
    of_optimizer, of_scheduler = saved(schedule)
    optimizer.load_state_dict(of_optimizer)
    if scheduler_is_loaded:
        scheduler.load_state_dict(of_scheduler)
    else:
        scheduler.last_epoch = STEPS
        optimizer.param_groups[0]["lr"] = lr * schedule(STEPS)
    check(optimizer, scheduler, schedule, range(STEPS, STEPS + 8))
    assert optimizer.param_groups[0]["initial_lr"] == (0.01 if scheduler_is_loaded else lr)


@each_lr
def test_a_scheduler_that_is_built_after_loading_takes_the_lr_of_the_checkpoint(lr):
    optimizer = build(lr)
    optimizer.load_state_dict(saved(SCHEDULES["falling"])[0])
    scheduler = LambdaLR(optimizer, SCHEDULES["warm up"])
    check(optimizer, scheduler, SCHEDULES["warm up"], range(8))
    assert scheduler.base_lrs == [0.01]


@each_lr
def test_without_a_scheduler_the_lr_is_that_of_the_job(lr, caplog):
    optimizer = build(lr)
    optimizer.load_state_dict(saved(SCHEDULES["steady"])[0])
    assert (lr == 0.01) == (f"0.01 in the checkpoint and {lr} here" not in caplog.text)
    optimizer.param_groups[0]["lr"] = lr
    for _ in range(3):
        assert lost(optimizer) == pytest.approx(DECAY, abs=1e-6)

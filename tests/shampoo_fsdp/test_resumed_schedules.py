"""Independent weight decay follows the schedule alone, also where a job goes on from a checkpoint
with another lr: what the weights lose is weight_decay times the factor of the schedule in use."""

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from shampoo_fsdp import Shampoo

DECAY = 0.1
STEPS = 20  # before the checkpoint


def steady(step: int) -> float:
    return 1.0


def warm_up(step: int) -> float:
    return min(1.0, 0.01 * (step + 1))


def falling(step: int) -> float:
    return 1.0 - step / 60


def build(lr: float) -> Shampoo:
    optimizer = Shampoo(
        [("w", nn.Parameter(torch.ones(4, 4))), ("b", nn.Parameter(torch.ones(4)))],
        lr=lr,
        weight_decay=DECAY,
        weight_decay_type="independent",
    )
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


def saved(lr: float, schedule) -> tuple[dict, dict]:
    optimizer = build(lr)
    scheduler = LambdaLR(optimizer, schedule)
    for step in range(STEPS):
        assert lost(optimizer) == pytest.approx(DECAY * schedule(step), abs=1e-6)
        scheduler.step()
    return optimizer.state_dict(), scheduler.state_dict()


def check(optimizer: Shampoo, scheduler: LambdaLR, schedule, first: int) -> None:
    for step in range(first, first + 8):
        assert lost(optimizer) == pytest.approx(DECAY * schedule(step), abs=1e-6), step - first
        scheduler.step()


each_lr = pytest.mark.parametrize("lr", [0.033, 0.01, 0.003])
each_schedule = pytest.mark.parametrize("schedule", [steady, warm_up, falling])


@each_lr
@each_schedule
def test_optimizer_and_scheduler_go_on_from_the_checkpoint(lr, schedule):
    state, schedulers = saved(0.01, schedule)
    optimizer = build(lr)
    scheduler = LambdaLR(optimizer, schedule)
    optimizer.load_state_dict(state)
    scheduler.load_state_dict(schedulers)
    check(optimizer, scheduler, schedule, STEPS)
    assert optimizer.param_groups[0]["initial_lr"] == 0.01


@each_lr
@each_schedule
def test_the_scheduler_goes_on_with_the_lr_of_this_job(lr, schedule):
    """TorchTitan 0.3 takes over the step alone, and sets lr anew."""
    optimizer = build(lr)
    scheduler = LambdaLR(optimizer, schedule)
    optimizer.load_state_dict(saved(0.01, schedule)[0])
    scheduler.last_epoch = STEPS
    optimizer.param_groups[0]["lr"] = lr * schedule(STEPS)
    check(optimizer, scheduler, schedule, STEPS)
    assert optimizer.param_groups[0]["initial_lr"] == lr


@each_lr
def test_a_scheduler_that_is_built_after_loading_takes_the_lr_of_the_checkpoint(lr):
    optimizer = build(lr)
    optimizer.load_state_dict(saved(0.01, falling)[0])
    scheduler = LambdaLR(optimizer, warm_up)
    check(optimizer, scheduler, warm_up, 0)
    assert scheduler.base_lrs == [0.01]


@each_lr
def test_without_a_scheduler_the_lr_is_that_of_the_job(lr, caplog):
    optimizer = build(lr)
    optimizer.load_state_dict(saved(0.01, steady)[0])
    assert (lr == 0.01) == (f"0.01 in the checkpoint and {lr} here" not in caplog.text)
    optimizer.param_groups[0]["lr"] = lr
    for _ in range(3):
        assert lost(optimizer) == pytest.approx(DECAY, abs=1e-6)

"""Gradients that are bad on every step, and roots that always fail: someone hears of it by name."""

import logging
import math
from logging.handlers import BufferingHandler

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

from shampoo_fsdp import Shampoo
from shampoo_fsdp.rules import shampoo
from tests.models import set_gradients
from tests.ranks import ranks


class Model(nn.Module):
    """Each matrix has 4 blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.ill = nn.Linear(8, 8, bias=False)
        self.well = nn.Linear(8, 8)


def optimizer_of(model: nn.Module, **options) -> Shampoo:
    options = {"max_preconditioner_dim": 4, "precondition_frequency": 1, **options}
    return Shampoo(model.named_parameters(), **options)


def step(model: nn.Module, optimizer: Shampoo, bad: dict[str, tuple[slice, ...]]) -> None:
    """Gradients of zero, and NaN in places."""
    gradients = {name: torch.zeros(p.shape) for name, p in model.named_parameters()}
    for name, where in bad.items():
        gradients[name][where] = math.nan
    set_gradients(model, gradients)
    optimizer.step()


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    found = [record.getMessage() for record in caplog.records]
    caplog.clear()
    return found


def test_blocks_that_are_always_skipped_are_named_until_a_good_gradient_or_a_load(caplog):
    model = Model()
    optimizer = optimizer_of(model)
    bad = {"ill.weight": (slice(0, 4), slice(0, 4))}

    def said(steps: int, last: int = 0) -> dict[int, list[str]]:
        """By step; every `last`-th gradient is a good one."""
        found = {}
        for number in range(1, steps + 1):
            step(model, optimizer, {} if last and number % last == 0 else bad)
            if heard := lines(caplog):
                found[number] = heard
        return found

    found = said(130)
    assert list(found) == [20, 110]
    (line,) = found[110]
    assert "'ill.weight' has been unusable for 100 steps in a row" in line
    assert said(60, last=9) == {}
    assert len(said(30)) == 1
    optimizer.load_state_dict(optimizer.state_dict())
    assert list(said(25)) == [20]


def test_weights_whose_gradients_are_always_bad_do_not_decay():
    model = Model()
    optimizer = optimizer_of(model, lr=0.1, weight_decay=0.1)
    sizes = []
    for number in range(80):
        step(model, optimizer, {"ill.weight": (slice(0, 4), slice(0, 4))} if number < 40 else {})
        sizes.append([p.norm().item() for p in (model.ill.weight, model.well.weight)])
    ill, well = zip(*sizes, strict=True)
    assert ill[19] == ill[39] > ill[79]
    assert well[19] > well[39] > well[79]


def test_roots_that_always_fail_are_named(caplog, monkeypatch):
    def inverse_root(factors, *rest):
        return factors, torch.ones(len(factors), dtype=torch.bool)

    model = Model()
    optimizer = optimizer_of(model, root_method="eigh")
    monkeypatch.setattr(shampoo, "inverse_root", inverse_root)
    for _ in range(30):
        step(model, optimizer, {})
    (line,) = lines(caplog)
    assert "eigenbasis of 'ill.weight', 'well.weight' has failed" in line


@ranks(2)
def test_the_first_rank_tells_of_a_block_that_any_one_owns():
    model = Model()
    fully_shard(model)
    optimizer = optimizer_of(model)
    heard = BufferingHandler(100)
    logging.getLogger("shampoo_fsdp").addHandler(heard)
    bad = {"ill.weight": (slice(1, 2), slice(1, 2)), "well.weight": (slice(5, 6),)}
    for _ in range(40):
        step(model, optimizer, bad)
    assert len(heard.buffer) == (dist.get_rank() == 0)
    assert all("'ill.weight', 'well.weight'" in record.getMessage() for record in heard.buffer)

"""Gradients that are bad on every step, and roots that always fail: someone hears of it by name,
and weights without updates do not decay away."""

import copy
import logging
import math

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

from shampoo_fsdp import Shampoo
from shampoo_fsdp.rules import root_rule
from tests.models import full_parameters, set_gradients
from tests.ranks import ranks

LOST = 0.1 * 0.05  # of the weights, on a step


class Model(nn.Module):
    """The first matrix has 4 blocks."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.ill = nn.Linear(8, 8, bias=False)
        self.well = nn.Linear(8, 8)


def optimizer_of(model: nn.Module, **options) -> Shampoo:
    return Shampoo(
        model.named_parameters(),
        lr=0.1,
        weight_decay=0.05,
        max_preconditioner_dim=4,
        precondition_frequency=1,
        **options,
    )


def step(model: nn.Module, optimizer: Shampoo, bad: dict[str, tuple[slice, ...]]) -> None:
    """Gradients of zero, which leave weight decay alone, and NaN in places."""
    gradients = {name: torch.zeros(p.shape) for name, p in model.named_parameters()}
    for name, where in bad.items():
        gradients[name][where] = math.nan
    set_gradients(model, gradients)
    optimizer.step()


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    found = [record.getMessage() for record in caplog.records]
    caplog.clear()
    return found


def test_blocks_that_are_always_skipped_keep_their_weights_and_are_named(caplog):
    model = Model()
    optimizer = optimizer_of(model)
    before = full_parameters(model)
    bad = {"ill.weight": (slice(0, 4), slice(0, 4)), "well.bias": (slice(2, 3),)}
    said = {}
    for number in range(1, 131):
        step(model, optimizer, bad)
        if found := lines(caplog):
            said[number] = found
    assert list(said) == [20, 30, 110, 120]
    for number, name in (20, "ill.weight"), (30, "well.bias"), (110, "ill.weight"):
        (line,) = said[number]
        assert f"'{name}'" in line
    assert "100 steps in a row in 1 of 4 blocks" in said[110][0]

    after = full_parameters(model)
    kept = after["ill.weight"] / before["ill.weight"]
    assert kept[:4, :4].min() > (1.0 - LOST) ** 21
    torch.testing.assert_close(
        kept[4:], torch.full((4, 8), (1.0 - LOST) ** 130), rtol=1e-3, atol=0.0
    )
    assert torch.equal(after["well.bias"][2], before["well.bias"][2])

    # What comes back to life decays again, and a new streak is said anew.
    for _ in range(30):
        step(model, optimizer, {})
    again = full_parameters(model)["ill.weight"] / after["ill.weight"]
    assert again[:4, :4].max() < 1.0 - 5 * LOST
    assert not lines(caplog)
    for _ in range(30):
        step(model, optimizer, bad)
    assert len(lines(caplog)) == 2


def test_excluded_parameters_are_named_also_beside_an_unused_one_and_for_huge_entries(caplog):
    model = Model()
    model.unused = nn.Parameter(torch.ones(3))
    optimizer = optimizer_of(model)
    for bad in (1e20, math.nan, -math.inf):
        for _ in range(30):
            model.well.bias.grad = torch.zeros(8)
            model.well.bias.grad[2] = bad
            optimizer.step()
        (line,) = lines(caplog)
        assert "'well.bias'" in line
        for _ in range(20):  # without a gradient a streak neither grows nor ends
            model.well.bias.grad = None
            model.ill.weight.grad = torch.zeros(8, 8)
            optimizer.step()
        model.well.bias.grad = torch.zeros(8)
        for _ in range(20):
            optimizer.step()
        assert not lines(caplog)


def test_what_is_loaded_decays_at_once():
    model = Model()
    optimizer = optimizer_of(model)
    state = copy.deepcopy(optimizer.state_dict())
    for _ in range(25):
        step(model, optimizer, {"ill.weight": (slice(None),)})
    optimizer.load_state_dict(state)
    for _ in range(20):
        before = full_parameters(model)["ill.weight"]
        step(model, optimizer, {})
        torch.testing.assert_close(full_parameters(model)["ill.weight"], before * (1.0 - LOST))


def test_a_bad_gradient_now_and_then_is_no_streak(caplog):
    model = Model()
    optimizer = optimizer_of(model)
    for number in range(60):
        bad = {} if number % 9 == 0 else {"ill.weight": (slice(None),)}
        step(model, optimizer, bad)
    assert not lines(caplog)


def test_roots_that_always_fail_are_named(caplog, monkeypatch):
    def inverse_root(factors, *rest):
        return factors, torch.ones(len(factors), dtype=torch.bool)

    model = Model()
    optimizer = optimizer_of(model, root_method="eigh")
    monkeypatch.setattr(root_rule, "inverse_root", inverse_root)
    for _ in range(30):
        step(model, optimizer, {})
    (line,) = lines(caplog)
    assert "'ill.weight', 'well.weight'" in line and "in a row in 8 of 8 blocks" in line


class Lines(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.found = list[str]()

    def emit(self, record: logging.LogRecord) -> None:
        self.found.append(record.getMessage())


@ranks(2)
def test_all_ranks_know_of_a_block_that_one_owns():
    model = Model()
    before = full_parameters(model)
    fully_shard(model)
    optimizer = optimizer_of(model)
    heard = Lines()
    logging.getLogger("shampoo_fsdp").addHandler(heard)
    bad = {"ill.weight": (slice(1, 2), slice(1, 2)), "well.weight": (slice(5, 6),)}
    for _ in range(40):
        # The bias has its bad entry on the second rank, and all of it is excluded.
        step(model, optimizer, {**bad, "well.bias": (slice(6, 7),)})
    if dist.get_rank() == 0:
        blocks, bias = heard.found
        assert "'ill.weight', 'well.weight'" in blocks and "'well.bias'" in bias
    else:
        assert not heard.found
    kept = {name: value / before[name] for name, value in full_parameters(model).items()}
    for stalled, rest in (
        (kept["ill.weight"][:4, :4], kept["ill.weight"][4:]),
        (kept["well.weight"][4:], kept["well.weight"][:4]),
    ):
        assert stalled.min() > (1.0 - LOST) ** 21
        assert rest.max() < (1.0 - LOST) ** 35

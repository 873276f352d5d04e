"""Before preconditioning starts each grafted method is the optimizer of torch of its name.

So are the excluded parameters at all times. Moving from such an optimizer to Shampoo therefore
changes nothing but what preconditioning changes.
"""

import functools
import itertools

import pytest
import torch
from torch import Tensor, nn

from shampoo_fsdp import Shampoo
from tests.models import deterministic_gradients, set_gradients

STEPS = 50
SHAPES = {
    "layers.0.w": (9, 14),
    "layers.0.small": (8, 8),
    "layers.0.experts": (2, 5, 6),
    "layers.0.conv": (4, 3, 2, 2),
    "layers.0.norm.weight": (6,),
    "tok_embeddings.weight": (12, 6),
}
LR = 3e-2

L2 = {"weight_decay_type": "l2"}
SGD = {"grafting": "sgd", "betas": (0.0, 0.9), "weight_decay": 0.0}
EQUAL = {
    "adamw": (torch.optim.AdamW, {"betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.3}, {}, {}),
    "adamw with its own beta2 and eps": (
        torch.optim.AdamW,
        {"weight_decay": 0.1},
        {"betas": (0.8, 0.9), "grafting_beta2": 0.95, "eps": 1e-3, "grafting_eps": 1e-6},
        {"betas": (0.8, 0.95), "eps": 1e-6},
    ),
    "adamw, as soap without grafting": (
        torch.optim.AdamW,
        {"betas": (0.9, 0.95), "eps": 1e-12, "weight_decay": 0.0},
        {"preconditioner": "soap", "grafting": "none"},
        {},
    ),
    "adam": (torch.optim.Adam, {"betas": (0.9, 0.99), "weight_decay": 0.3}, L2, {}),
    "rmsprop with momentum and weight decay": (
        torch.optim.RMSprop,
        {"momentum": 0.7, "weight_decay": 0.2},
        {"grafting": "rmsprop", "betas": (0.0, 0.97), **L2},
        {"alpha": 0.97},
    ),
    "adagrad with weight decay and sums in the factors": (
        torch.optim.Adagrad,
        {"weight_decay": 0.2},
        {"grafting": "adagrad", "betas": (0.0, 1.0), "grafting_eps": 1e-10, **L2},
        {"eps": 1e-10},
    ),
    "sgd with nesterov momentum": (torch.optim.SGD, {"momentum": 0.9, "nesterov": True}, SGD, {}),
    "sgd with dampened momentum": (torch.optim.SGD, {"momentum": 0.9, "dampening": 0.3}, SGD, {}),
}
"""The optimizer of torch, settings of both, and those of ours and of torch's alone."""


def scheduled(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Its lr decays."""
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    optimizer.register_step_post_hook(lambda *_: scheduler.step())
    return optimizer


def train(make, steps: int = STEPS) -> dict[str, Tensor]:
    """Parameters after the steps, one of them without a gradient at times."""
    generator = torch.Generator().manual_seed(0)
    parameters = {
        name: nn.Parameter(torch.randn(shape, generator=generator))
        for name, shape in SHAPES.items()
    }
    optimizer = make(parameters)
    for step in range(steps):
        gradients: dict[str, Tensor | None] = dict(deterministic_gradients(SHAPES, step))
        gradients["layers.0.small"] *= 10.0 ** -torch.arange(8.0)  # which are no rounding
        if step % 7 in (0, 3):
            gradients["layers.0.w"] = gradients["layers.0.norm.weight"] = None
        set_gradients(parameters, gradients)
        optimizer.step()
    return {name: p.detach() for name, p in parameters.items()}


def check(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    for name, expected in theirs.items():
        error = torch.linalg.vector_norm(ours[name] - expected)
        assert error <= 1e-6 * torch.linalg.vector_norm(expected), name


@functools.cache
def train_with_torch(case: str) -> dict[str, Tensor]:
    kind, shared, _, options = EQUAL[case]
    return train(lambda parameters: kind(parameters.values(), lr=LR, **shared, **options))


@pytest.mark.parametrize(
    ("preconditioner", "case"),
    [("shampoo", case) for case in EQUAL]
    + list(itertools.product(["soap", "kl_shampoo"], ["adamw", "sgd with nesterov momentum"])),
)
def test_before_the_start_it_is_the_optimizer_of_torch(preconditioner, case):
    _, shared, options, _ = EQUAL[case]
    options = {"betas": (0.9, 0.95), "preconditioner": preconditioner, **shared, **options}
    options["beta3"] = options["betas"][0]
    options |= {"lr_factor": 1, "max_preconditioner_dim": 5, "start_preconditioning_step": 1000}
    check(train(lambda named: Shampoo(named.items(), lr=LR, **options)), train_with_torch(case))


def test_excluded_parameters_take_exactly_the_steps_of_adamw():
    options = {"lr": 3e-3, "betas": (0.8, 0.9), "eps": 1e-6, "weight_decay": 0.2}
    ours = train(lambda named: Shampoo(named.items(), lr_factor=1, exclude=["."], **options))
    theirs = train(lambda named: torch.optim.AdamW(named.values(), fused=True, **options))
    assert all(torch.equal(ours[name], theirs[name]) for name in SHAPES)


OF_EXCLUDED = {"exclude": ["."], "excluded_lr_factor": 0.25, "weight_decay": 0.01}
INDEPENDENT = {"weight_decay_type": "independent"}
SCHEDULED = {
    "independent decay is that of AdamW over the first lr": (
        {"weight_decay": 0.2 * LR, "beta3": 0.9, "start_preconditioning_step": 1000, **INDEPENDENT},
        {"lr": LR, "weight_decay": 0.2},
    ),
    "a smaller lr": (OF_EXCLUDED, {"lr": 0.25 * LR, "weight_decay": 0.01}),
    "a larger lr": ({"exclude": ["."], "lr_factor": 2.0}, {"lr": 2.0 * LR, "weight_decay": 0.1}),
    "a smaller lr does not shrink independent decay": (
        OF_EXCLUDED | INDEPENDENT,
        {"lr": 0.25 * LR, "weight_decay": 0.01 / (0.25 * LR)},
    ),
}


@pytest.mark.parametrize("case", SCHEDULED)
def test_a_schedule_of_lr_acts_as_on_adamw(case):
    ours, theirs = SCHEDULED[case]
    betas = {"betas": (0.9, 0.95)}
    ours = {"lr": LR, "lr_factor": 1, **betas, **ours}
    check(
        train(lambda named: scheduled(Shampoo(named.items(), **ours))),
        train(lambda named: scheduled(torch.optim.AdamW(named.values(), **betas, **theirs))),
    )


def test_lr_factor_is_a_multiple_of_the_lr_of_each_group():
    """To the last bit, under a schedule, for excluded parameters and weight decay as well."""

    def trained(*groups, **common):
        def make(named):
            parts = list(named.items())[:2], list(named.items())[2:]
            given = [{"params": p, **of} for p, of in zip(parts, groups, strict=True)]
            common.update(excluded_lr_factor=0.3, weight_decay=0.3, max_preconditioner_dim=8)
            return scheduled(Shampoo(given, **common))

        return train(make)

    found = trained({}, {"lr_factor": 0.5}, lr=LR, lr_factor=4)
    expected = trained({"lr": 4 * LR}, {"lr": 0.5 * LR}, lr_factor=1)
    assert all(torch.equal(found[name], expected[name]) for name in SHAPES)


@pytest.mark.parametrize(
    "options", [{}, {"weight_decay_type": "l2"}, INDEPENDENT | {"excluded_lr_factor": 0.5}]
)
def test_lr_may_be_a_tensor(options):
    """Which schedulers then change in place."""
    lr = torch.tensor(LR, dtype=torch.float64)
    found, expected = (
        train(lambda named, lr=lr: scheduled(Shampoo(named.items(), lr=lr, **options)), steps=9)
        for lr in (lr, LR)
    )
    assert lr != LR
    assert all(torch.equal(found[name], expected[name]) for name in SHAPES)


def test_a_state_dict_keeps_lr_as_a_tensor():
    weight = nn.Parameter(torch.zeros(4, 4))
    optimizer = Shampoo([("w", weight)], lr=torch.tensor(0.5))
    again = Shampoo([("w", weight)], lr=torch.tensor(0.1))
    again.load_state_dict(optimizer.state_dict())
    found = again.param_groups[0]["lr"]
    assert torch.equal(found, torch.tensor(0.5)) and found is not optimizer.param_groups[0]["lr"]

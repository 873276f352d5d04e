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
    "layers.0.experts": (2, 5, 6),
    "layers.0.conv": (4, 3, 2, 2),
    "layers.0.norm.weight": (6,),
    "tok_embeddings.weight": (12, 6),
}
LR = 3e-2

EQUAL = {
    "adamw": (
        {"betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.3},
        (torch.optim.AdamW, {"betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.3}),
    ),
    "adamw with its own beta2 and eps": (
        {"betas": (0.8, 0.9), "grafting_beta2": 0.95, "eps": 1e-3, "grafting_eps": 1e-6},
        (torch.optim.AdamW, {"betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}),
    ),
    "adam": (
        {"betas": (0.9, 0.99), "weight_decay": 0.3, "weight_decay_type": "l2"},
        (torch.optim.Adam, {"betas": (0.9, 0.99), "weight_decay": 0.3}),
    ),
    "rmsprop with momentum and weight decay": (
        {
            "grafting": "rmsprop",
            "betas": (0.0, 0.97),
            "momentum": 0.7,
            "weight_decay": 0.2,
            "weight_decay_type": "l2",
        },
        (torch.optim.RMSprop, {"alpha": 0.97, "momentum": 0.7, "weight_decay": 0.2}),
    ),
    "adagrad with weight decay and sums in the factors": (
        {
            "grafting": "adagrad",
            "betas": (0.0, 1.0),
            "grafting_eps": 1e-10,
            "weight_decay": 0.2,
            "weight_decay_type": "l2",
        },
        (torch.optim.Adagrad, {"eps": 1e-10, "weight_decay": 0.2}),
    ),
    "sgd with nesterov momentum": (
        {
            "grafting": "sgd",
            "betas": (0.0, 0.9),
            "momentum": 0.9,
            "nesterov": True,
            "weight_decay": 0.0,
        },
        (torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
    ),
    "sgd with dampened momentum": (
        {
            "grafting": "sgd",
            "betas": (0.0, 0.9),
            "momentum": 0.9,
            "dampening": 0.3,
            "weight_decay": 0.0,
        },
        (torch.optim.SGD, {"momentum": 0.9, "dampening": 0.3}),
    ),
}


class Scheduled:
    """An optimizer whose lr decays."""

    def __init__(self, optimizer):
        self.optimizer = optimizer
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)

    def step(self):
        self.optimizer.step()
        self.scheduler.step()


def train(make) -> dict[str, Tensor]:
    """Parameters after the steps, one of them without a gradient at times."""
    generator = torch.Generator().manual_seed(0)
    parameters = {
        name: nn.Parameter(torch.randn(shape, generator=generator))
        for name, shape in SHAPES.items()
    }
    optimizer = make(parameters)
    for step in range(STEPS):
        gradients: dict[str, Tensor | None] = dict(deterministic_gradients(SHAPES, step))
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
    kind, options = EQUAL[case][1]
    return train(lambda parameters: kind(parameters.values(), lr=LR, **options))


@pytest.mark.parametrize(
    ("preconditioner", "case"),
    [("shampoo", case) for case in EQUAL]
    + list(itertools.product(["soap", "kl_shampoo"], ["adamw", "sgd with nesterov momentum"])),
)
def test_before_the_start_it_is_the_optimizer_of_torch(preconditioner, case):
    options = {"betas": (0.9, 0.95), "preconditioner": preconditioner, **EQUAL[case][0]}
    options["beta3"] = options["betas"][0]
    ours = train(
        lambda parameters: Shampoo(
            parameters.items(),
            lr=LR,
            max_preconditioner_dim=5,
            start_preconditioning_step=1000,
            **options,
        )
    )
    check(ours, train_with_torch(case))


def test_excluded_parameters_take_exactly_the_steps_of_adamw():
    options = {"lr": 3e-3, "betas": (0.8, 0.9), "eps": 1e-6, "weight_decay": 0.2}
    ours = train(lambda named: Shampoo(named.items(), exclude=["."], **options))
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
    "a smaller lr does not shrink independent decay": (
        OF_EXCLUDED | INDEPENDENT,
        {"lr": 0.25 * LR, "weight_decay": 0.01 / (0.25 * LR)},
    ),
}


@pytest.mark.parametrize("case", SCHEDULED)
def test_a_schedule_of_lr_acts_as_on_adamw(case):
    ours, theirs = SCHEDULED[case]
    betas = {"betas": (0.9, 0.95)}
    check(
        train(lambda named: Scheduled(Shampoo(named.items(), lr=LR, **betas, **ours))),
        train(lambda named: Scheduled(torch.optim.AdamW(named.values(), **betas, **theirs))),
    )


def test_soap_is_adam_before_its_first_refresh():
    """In the axes' basis small entries are no rounding."""
    scales = 10.0 ** -torch.arange(8.0).unsqueeze(1)
    weights = [nn.Parameter(torch.zeros(8, 8)) for _ in range(2)]
    settings = {"lr": LR, "betas": (0.9, 0.95), "eps": 1e-12, "weight_decay": 0.0}
    soap = Shampoo(
        [("w", weights[0])],
        **settings,
        preconditioner="soap",
        grafting="none",
        beta3=0.9,
        start_preconditioning_step=1000,
    )
    adam = torch.optim.AdamW([weights[1]], **settings)
    for step in range(5):
        gradient = torch.randn(8, 8, generator=torch.Generator().manual_seed(step)) * scales
        for weight, optimizer in zip(weights, (soap, adam), strict=True):
            weight.grad = gradient.clone()
            optimizer.step()
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    "options", [{}, {"weight_decay_type": "l2"}, INDEPENDENT | {"excluded_lr_factor": 0.5}]
)
def test_lr_may_be_a_tensor(options):
    """Which schedulers then change in place."""
    lr = torch.tensor(LR, dtype=torch.float64)
    found, expected = (
        train(lambda named, lr=lr: Scheduled(Shampoo(named.items(), lr=lr, **options)))
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

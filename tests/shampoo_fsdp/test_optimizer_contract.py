"""What programs expect of any torch.optim.Optimizer, after the cases of PyTorch's own tests."""

import copy
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler as schedulers

from shampoo_fsdp import Shampoo

# Of those that only set lr, one.
SCHEDULERS = {
    "LambdaLR": lambda o: schedulers.LambdaLR(o, lambda step: 0.9**step),
    "ReduceLROnPlateau": lambda o: schedulers.ReduceLROnPlateau(o, patience=1),
    # These two turn beta1 as well.
    "CyclicLR": lambda o: schedulers.CyclicLR(o, 1e-3, 1e-2, step_size_up=3),
    "OneCycleLR": lambda o: schedulers.OneCycleLR(o, max_lr=1e-2, total_steps=20),
    "SequentialLR": lambda o: schedulers.SequentialLR(
        o, [schedulers.LinearLR(o, total_iters=3), schedulers.ExponentialLR(o, 0.9)], milestones=[3]
    ),
    "SWALR": lambda o: torch.optim.swa_utils.SWALR(o, swa_lr=1e-3),
}


def problem():
    """A model and a function that makes its gradients and returns its loss."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    inputs, targets = torch.randn(64, 6), torch.randn(64, 3)

    def loss():
        model.zero_grad()
        value = (model(inputs) - targets).square().mean()
        value.backward()
        return value.detach()

    return model, loss


@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_loss_falls_under_each_scheduler(name):
    model, loss = problem()
    optimizer = Shampoo(model.named_parameters(), lr=torch.tensor(1e-2))  # changed in place
    scheduler = SCHEDULERS[name](optimizer)
    first, seen = loss(), set()
    for _ in range(12):
        value = loss()
        optimizer.step()
        seen.add(float(optimizer.param_groups[0]["lr"]))
        scheduler.step(value) if name == "ReduceLROnPlateau" else scheduler.step()
    assert loss() < 0.97 * first
    assert len(seen) > 1 or name == "ReduceLROnPlateau"


def test_a_first_step_of_zeros_changes_nothing():
    """As loaders of checkpoints take it where they do not know that state is there."""
    model, loss = problem()
    optimizer = Shampoo(model.named_parameters(), lr=torch.tensor(1e-2), momentum=0.5)
    now = lambda: (optimizer.state_dict()["state"], model.state_dict())  # noqa: E731
    before = copy.deepcopy(now())
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.param_groups[0]["lr"] = 0.0
    optimizer.step()
    optimizer.param_groups[0]["lr"] = torch.tensor(1e-2)
    torch.testing.assert_close(now(), before, rtol=0, atol=0)
    loss()
    optimizer.param_groups[0]["lr"] = 0.0  # of a schedule: the gradients count
    optimizer.step()
    assert {int(of["step"]) for of in optimizer.state.values()} == {1}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_state_dict_loads_into_a_model_of_another_type(dtype):
    model, loss = problem()
    optimizer = Shampoo(model.named_parameters(), lr=1e-2)
    loss()
    optimizer.step()
    other, _ = problem()
    other = other.to(dtype)
    loaded = Shampoo(other.named_parameters(), lr=1e-2)
    loaded.load_state_dict(optimizer.state_dict())
    for parameter in other.parameters():
        parameter.grad = torch.ones_like(parameter)
    before = [p.detach().clone() for p in other.parameters()]
    loaded.step()
    assert all(p.dtype == dtype and p.isfinite().all() for p in other.parameters())
    assert not any(map(torch.equal, before, other.parameters()))
    assert {float(state["step"]) for state in loaded.state.values()} == {2.0}


def test_gradient_scaling_skips_infinite_steps_and_undoes_the_scale():
    (plain, plain_loss), (scaled, scaled_loss) = problem(), problem()
    one = Shampoo(plain.named_parameters(), lr=1e-2)
    other = Shampoo(scaled.named_parameters(), lr=1e-2)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    for step in range(6):
        plain_loss()
        scaled_loss()
        for parameter in scaled.parameters():
            parameter.grad *= scaler.get_scale()
        scaler.scale(torch.ones(()))  # it starts with the first loss
        if step == 2:
            scaled[0].weight.grad[0, 0] = torch.inf
        else:
            one.step()
        scaler.step(other)
        scaler.update()
    torch.testing.assert_close(scaled.state_dict(), plain.state_dict())
    assert other.counters()[2:].tolist() == [0, 0]  # the scaler saw it first


def test_frozen_groups_and_parameters_without_elements_are_along():
    model, loss = problem()
    frozen = nn.Parameter(torch.ones(3, 3), requires_grad=False)
    empty = nn.Parameter(torch.zeros(0, 5))
    named = [*model.named_parameters(), ("empty", empty)]
    groups = [{"params": named}, {"params": [("frozen", frozen)], "lr": 1.0}]
    optimizer = Shampoo(groups, lr=1e-2)
    first = loss()
    for _ in range(5):
        loss()
        empty.grad = torch.zeros(0, 5)
        optimizer.step()
    assert loss() < first and torch.equal(frozen, torch.ones(3, 3))
    again = Shampoo(groups, lr=1e-2)
    again.load_state_dict(optimizer.state_dict())
    assert float(again.state[empty]["step"]) == 5.0 and frozen not in again.state


def test_a_copy_is_refused_with_what_to_do_instead():
    model, _ = problem()
    with pytest.raises(TypeError, match=r"build another one and load_state_dict\(\)"):
        copy.deepcopy(Shampoo(model.named_parameters()))


def test_importing_it_imports_torch_alone():
    code = "import shampoo_fsdp, sys; print(*sorted({name.split('.')[0] for name in sys.modules}))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "torch" in found.stdout.split()
    assert not {"rich", "matplotlib", "torchtitan", "tomli"} & set(found.stdout.split())


def test_state_loads_again_and_again_without_names():
    matrix = nn.Parameter(torch.randn(4, 3))
    named, nameless = Shampoo([("weight", matrix)]), Shampoo([matrix], exclude=[])
    matrix.grad = torch.randn(4, 3)
    named.step()
    for _ in range(2):
        nameless.load_state_dict(named.state_dict())
        nameless.load_state_dict(nameless.state_dict())
    assert nameless.state[matrix]["step"] == 1.0


def test_a_step_that_is_refused_does_not_count():
    optimizer = Shampoo([("weight", nn.Parameter(torch.randn(4, 3)))])
    (group,) = optimizer.param_groups
    (matrix,) = group["params"]
    matrix.grad = torch.randn(4, 3)
    betas, group["betas"] = group["betas"], (0.9,)
    for _ in range(2):
        with pytest.raises(ValueError, match="not enough values"):
            optimizer.step()
    group["betas"] = betas
    optimizer.step()
    assert optimizer.state[matrix]["step"] == 1.0


def test_a_warning_of_names_points_at_who_builds_the_optimizer():
    with pytest.warns(UserWarning, match="none of 1") as caught:
        Shampoo([("vector", nn.Parameter(torch.zeros(3)))])
    assert {warning.filename for warning in caught} == {__file__}

"""`shampoo_torchtitan.Shampoo` in the containers of TorchTitan 0.4: of a checkout that has them, or
of the stand-in (see `tests/titan_04`)."""

import copy

import pytest
import torch
import torch.distributed as dist
import torchtitan.components.optimizer
from torch import nn

from tests.models import (
    TinyLlama,
    build,
    deterministic_gradients,
    full_parameters,
    set_gradients,
)
from tests.ranks import run_ranks

if not hasattr(torchtitan.components.optimizer, "BaseOptimizer"):
    pytest.skip("needs TorchTitan 0.4", allow_module_level=True)

from torchtitan.components.optimizer import Adam, AdamW, OptimizersContainer

from shampoo_torchtitan import Shampoo
from shampoo_torchtitan.configs import ShampooOptimizers, shampoo, use_shampoo
from shampoo_torchtitan.container import JobError
from shampoo_torchtitan.generation import groups

SETTINGS = {"precondition_frequency": 2, "start_preconditioning_step": 2, "lr": 1e-2}


def several() -> list[object]:
    """Two Shampoos of another lr, and AdamW for the rest."""
    return [
        Shampoo.Config(pattern=r"feed_forward", **SETTINGS | {"lr": 3e-3}),
        Shampoo.Config(pattern=r"^layers", **SETTINGS),
        AdamW.Config(pattern=".*", lr=1e-3),
    ]


def container(model: nn.Module, *listed: object) -> OptimizersContainer:
    return OptimizersContainer.Config(optimizers=list(listed)).build(model_parts=[model])


def train(model: nn.Module, optimizers: OptimizersContainer, steps: range) -> None:
    for step in steps:
        set_gradients(model, deterministic_gradients(model, step))
        optimizers.step()


def contents(optimizers: OptimizersContainer) -> dict[str, torch.Tensor]:
    """What a checkpoint would have, whole."""
    whole = lambda value: value.full_tensor() if hasattr(value, "full_tensor") else value  # noqa: E731
    return copy.deepcopy({key: whole(value) for key, value in optimizers.state_dict().items()})


# ------------------------------------------------------------------------ training and state


def on_ranks() -> tuple[int, dict, dict, dict, dict]:
    model, _ = build("fsdp")
    given = dist.distributed_c10d._world.group_count
    optimizers = container(model, *several())
    made = dist.distributed_c10d._world.group_count - given
    start = contents(optimizers)
    for optimizer in optimizers.optimizers[:2]:  # as TorchTitan does where it finds no state
        (group,) = optimizer.param_groups
        lr, group["lr"] = group["lr"], 0.0
        for p in group["params"]:
            p.grad = torch.zeros_like(p)
        optimizer.step(closure=None)
        group["lr"] = lr
    unmoved = contents(optimizers)
    train(model, optimizers, range(4))
    return made, start, unmoved, full_parameters(model), contents(optimizers)


def test_several_train_beside_adamw_on_the_same_groups_of_ranks():
    """And end where one process does; a step of zeros before the first one changes nothing."""
    model, _ = build("single")
    optimizers = container(model, *several())
    train(model, optimizers, range(4))
    alone = contents(optimizers)
    for made, start, unmoved, weights, state in run_ranks(2, on_ranks):
        assert made == 0
        torch.testing.assert_close(unmoved, start, rtol=0, atol=0)
        torch.testing.assert_close(weights, full_parameters(model), rtol=1e-4, atol=1e-6)
        assert state.keys() == alone.keys()
    again = container(model, *several())  # one process goes on from two
    again.load_state_dict(copy.deepcopy(state))
    torch.testing.assert_close(contents(again), state, rtol=0, atol=0)


def test_another_goes_on_where_it_was_also_with_adamw_and_back():
    model = TinyLlama()
    optimizers = container(model, *several())
    train(model, optimizers, range(3))
    saved, weights = contents(optimizers), copy.deepcopy(model.state_dict())
    train(model, optimizers, range(3, 6))
    end = contents(optimizers)

    model.load_state_dict(weights)
    again = container(model, *several())
    again.load_state_dict(copy.deepcopy(saved))
    train(model, again, range(3, 6))
    torch.testing.assert_close(contents(again), end, rtol=0, atol=0)

    adamw = container(model, AdamW.Config(pattern=".*"))
    adamw.load_state_dict(copy.deepcopy(saved))
    moments = contents(adamw)
    assert all(torch.equal(moments[k], saved[k]) for k in moments if k.endswith(".exp_avg"))
    back = shampoo(param_groups=list(several())).build(model_parts=[model])
    back.load_state_dict(moments)
    now = contents(back)
    for key in (key for key in moments if key.endswith(("exp_avg", "exp_avg_sq", ".step"))):
        torch.testing.assert_close(now[key], saved[key], rtol=0, atol=0, check_dtype=False)
    assert now["state.layers.0.attention.wq.weight.factor_step"] == 0


def test_entries_that_titan_would_leave_out_are_named(caplog):
    model = TinyLlama()
    saved = contents(container(model, *several()))
    name = "layers.1.feed_forward.w2.weight"
    del saved[f"state.{name}.factors"]
    with pytest.raises(ValueError, match=f"'factors' of parameter '{name}' has none"):
        container(model, *several()).load_state_dict(saved)
    rebuilding = Shampoo.Config(pattern=".*", **SETTINGS, on_mismatch="rebuild")
    # TorchTitan's own container misses it.
    saved["param_groups.tok_embeddings.weight.lr_factor"] = 1.0
    container(model, rebuilding).load_state_dict(saved)
    assert f"factors start anew for '{name}'" in caplog.text
    fewer = shampoo(
        param_groups=[Shampoo.Config(pattern=".*", **SETTINGS, exclude=["default", "layers.1"])]
    )
    saved = {"state.gone.weight.exp_avg": saved[f"state.{name}.exp_avg"]} | saved
    fewer.build(model_parts=[model]).load_state_dict(saved)
    assert "The saved 'state.gone.weight.exp_avg', 'state.layers.1." in caplog.text
    assert caplog.text.count("is not used") == 1


# ----------------------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"precondition_frequency": 0}, "'precondition_frequency' is 0; allowed: an integer >= 1"),
        ({"lr": -1.0}, "'lr' is -1.0; allowed"),
        ({"betas": (1.0, 0.9)}, "'beta1' is 1.0"),
        ({"precondition_frequncy": 2}, "precondition_frequncy"),
    ],
)
def test_a_wrong_setting_is_refused_where_it_is_written(settings, error):
    with pytest.raises((TypeError, ValueError), match=error):
        Shampoo.Config(pattern=".*", **settings)


def test_what_needs_the_model_is_refused_alone_and_found_by_our_container():
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head_dim, self.wq = 4, nn.Linear(8, 8)

    model = nn.ModuleDict({"token": nn.Embedding(16, 8), "a": Attention(), "b": nn.Linear(8, 8)})
    heads = Shampoo.Config(pattern=".*", split_heads=["wq"])
    with pytest.raises(JobError, match=r"'split_heads' matches .*'head_dim' is None"):
        container(model, heads)
    (optimizer,) = shampoo(param_groups=[heads]).build(model_parts=[model])
    assert optimizer.config.head_dim == 4
    assert optimizer.matrices_left_to_grafting() == ["token.weight"]
    with pytest.raises(JobError, match="settings of the container would change nothing"):
        shampoo(lr=1e-2, param_groups=[heads]).build(model_parts=[model])


def test_an_override_takes_the_places_of_adam_and_adamw():
    other = Shampoo.Config(pattern="x", lr=1.0)
    adam, adamw = Adam.Config(pattern="norm", lr=1e-4), AdamW.Config(pattern=".*", eps=1e-6)
    old = OptimizersContainer.Config(optimizers=[other, adam, adamw])
    config = use_shampoo(old, weight_decay=0.2, beta3=0.5)
    assert type(config) is ShampooOptimizers.Config and config.optimizers[0] is other
    first, second = config.optimizers[1:]
    assert (first.pattern, first.lr, first.betas) == ("norm", 1e-4, (0.9, 0.999))
    assert (second.eps, second.weight_decay, second.beta3) == (1e-6, 0.2, 0.5)
    with pytest.raises(JobError, match="it would change nothing"):
        use_shampoo(OptimizersContainer.Config(optimizers=[other]))


def test_the_plan_knows_which_parameters_are_whose():
    config = OptimizersContainer.Config(optimizers=several())
    names = ["layers.0.feed_forward.w1.weight", "layers.0.attention.wq.weight", "norm.weight"]
    settings = groups().settings(config, names)
    assert settings.precondition_frequency == 2
    assert settings.exclude == ["default", r"^norm\.weight$"]
    other = Shampoo.Config(pattern="x")
    with pytest.raises(ValueError, match="3 Shampoos of different settings"):
        groups().settings(OptimizersContainer.Config(optimizers=[other, *several()]), names)

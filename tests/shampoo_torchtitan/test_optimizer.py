"""The builder of optimizers of TorchTitan 0.2."""

from types import SimpleNamespace

import pytest
import torch
import torchtitan.components.metrics
import torchtitan.components.optimizer
import torchtitan.models.deepseek_v3
import torchtitan.models.llama3

import shampoo_torchtitan
from shampoo_torchtitan.container import shampoos_of
from shampoo_torchtitan.generation import JOBS_ARE_FUNCTIONS

if JOBS_ARE_FUNCTIONS:
    pytest.skip("TorchTitan 0.3 has no such builder", allow_module_level=True)

from torchtitan.components.optimizer import OptimizersContainer

from shampoo_torchtitan import optimizer


def _config(**changes):
    values = {
        "name": "SHAMPOO",
        "lr": 1e-3,
        "beta1": 0.9,
        "beta2": 0.95,
        "eps": 1e-8,
        "weight_decay": 0.1,
        "implementation": "for-loop",
        "early_step_in_backward": False,
    }
    return SimpleNamespace(**(values | changes))


_ONE_RANK = SimpleNamespace(
    dp_replicate_enabled=False, fsdp_enabled=False, ep_enabled=False, pp_enabled=False
)


def test_every_model_gets_our_builder_however_it_reaches_titans():
    assert torchtitan.models.llama3.get_train_spec().build_optimizers_fn is (
        optimizer.build_optimizers
    )
    # MoE: through TorchTitan's function that also adds the hook for the experts' bias.
    model = torch.nn.Module()
    model.layers = torch.nn.ModuleDict({"0": torch.nn.Linear(4, 4)})
    model.layers["0"].moe_enabled = True
    model.layers["0"].moe = SimpleNamespace(load_balance_coeff=1e-3)
    build = torchtitan.models.deepseek_v3.get_train_spec().build_optimizers_fn
    container = build([model], _config(), _ONE_RANK)
    assert shampoos_of(container)
    assert len(container._optimizer_step_pre_hooks) == 1


def test_registering_again_changes_nothing():
    before = torchtitan.components.metrics.MetricsProcessor
    shampoo_torchtitan.register()
    assert torchtitan.components.metrics.MetricsProcessor is before
    assert torchtitan.components.optimizer.build_optimizers is optimizer.build_optimizers
    config = _config(name="AdamW")
    adamw = optimizer.build_optimizers([torch.nn.Linear(2, 2)], config, _ONE_RANK)
    assert type(adamw) is OptimizersContainer


@pytest.mark.parametrize(
    "changes, ft_manager, said",
    [
        ({"early_step_in_backward": True}, None, "early_step_in_backward"),
        ({}, SimpleNamespace(enabled=True), "fault_tolerance"),
    ],
)
def test_what_shampoo_cannot_do_is_refused(changes, ft_manager, said):
    with pytest.raises(ValueError, match=said):
        optimizer.build_optimizers(
            [torch.nn.Linear(2, 2)], _config(**changes), _ONE_RANK, ft_manager
        )


def test_wrapped_modules_keep_their_names():
    """Activation checkpointing and torch.compile wrap modules, and change the names inside."""
    model = torch.nn.Module()
    model._checkpoint_wrapped_module = torch.nn.Module()
    model._checkpoint_wrapped_module._orig_mod = torch.nn.Module()
    model._checkpoint_wrapped_module._orig_mod.output = torch.nn.Linear(8, 8, bias=False)
    container = optimizer.build_optimizers([model], _config(), _ONE_RANK)
    assert container.optimizers[0].matrices_left_to_grafting() == ["output.weight"]

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


def config(**changes):
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


ONE_RANK = SimpleNamespace(
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
    container = build([model], config(), ONE_RANK)
    assert shampoos_of(container)
    assert len(container._optimizer_step_pre_hooks) == 1


def test_registering_again_changes_nothing():
    before = torchtitan.components.metrics.MetricsProcessor
    shampoo_torchtitan.register()
    assert torchtitan.components.metrics.MetricsProcessor is before
    assert torchtitan.components.optimizer.build_optimizers is optimizer.build_optimizers
    of_adamw = config(name="AdamW")
    adamw = optimizer.build_optimizers([torch.nn.Linear(2, 2)], of_adamw, ONE_RANK)
    assert type(adamw) is OptimizersContainer


def test_torchft_is_refused():
    """As is what else Shampoo cannot do; the rest is in test_job_config."""
    manager = SimpleNamespace(enabled=True)
    with pytest.raises(ValueError, match="fault_tolerance"):
        optimizer.build_optimizers([torch.nn.Linear(2, 2)], config(), ONE_RANK, manager)


def test_wrapped_modules_keep_their_names():
    """Activation checkpointing and torch.compile wrap modules, and change the names inside."""
    model = torch.nn.Module()
    model._checkpoint_wrapped_module = torch.nn.Module()
    model._checkpoint_wrapped_module._orig_mod = torch.nn.Module()
    model._checkpoint_wrapped_module._orig_mod.output = torch.nn.Linear(8, 8, bias=False)
    container = optimizer.build_optimizers([model], config(), ONE_RANK)
    assert container.optimizers[0].matrices_left_to_grafting() == ["output.weight"]

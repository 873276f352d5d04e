"""A checkpoint of a GPU is one of a CPU, and training goes on from either."""

from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from shampoo_fsdp import Shampoo
from tests.cuda.training import SETTINGS
from tests.distributed.test_meshes import relative_difference
from tests.models import TinyLlama, deterministic_gradients, full_parameters, set_gradients

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.filterwarnings("ignore:.*torch.distributed is"),  # it says that it is unavailable
]

SAVED_AT, END = 8, 14  # in the middle of a period
OPTIONS = StateDictOptions(flatten_optimizer_state_dict=True)
CPU = torch.device("cpu")
RULES = pytest.mark.parametrize(
    "settings",
    [
        {"preconditioner": "shampoo", "root_method": "coupled_newton"},
        {"preconditioner": "kl_shampoo", "root_method": "eigh", "large_dim": "diagonal"},
        {"preconditioner": "soap", "momentum": 0.5},
        {"preconditioner": "kl_shampoo", "symmetric_packing": True, "root_method": "eigh"},
    ],
    ids=lambda settings: settings["preconditioner"],
)


def make(device: torch.device, settings: dict[str, object]) -> tuple[nn.Module, Shampoo]:
    model = TinyLlama(n_layers=1).to(device)
    common = {**SETTINGS, "start_preconditioning_step": 2, "matmul_precision": "highest"}
    return model, Shampoo(model.named_parameters(), **{**common, **settings})


def train(model: nn.Module, optimizer: Shampoo, steps: range) -> dict[str, Tensor]:
    device = next(model.parameters()).device
    for step in steps:
        gradients = deterministic_gradients(model, step)
        set_gradients(model, {name: g.to(device) for name, g in gradients.items()})
        optimizer.step()
    return {name: p.cpu() for name, p in full_parameters(model).items()}


def states(model: nn.Module, optimizer: Shampoo) -> dict[str, dict[str, object]]:
    return {
        "model": get_model_state_dict(model),
        "optimizer": get_optimizer_state_dict(model, optimizer, options=OPTIONS),
    }


def load(folder: Path, device: torch.device, settings: dict) -> tuple[nn.Module, Shampoo]:
    model, optimizer = make(device, settings)
    saved = states(model, optimizer)
    dcp.load(saved, checkpoint_id=folder)
    set_model_state_dict(model, saved["model"])
    set_optimizer_state_dict(model, optimizer, saved["optimizer"], options=OPTIONS)
    return model, optimizer


@RULES
@pytest.mark.parametrize("way", ["to the CPU", "from the CPU"])
def test_training_goes_on_where_it_is_loaded(device, tmp_path, settings, way):
    here, there = (device, CPU) if way == "to the CPU" else (CPU, device)
    model, optimizer = make(here, settings)
    train(model, optimizer, range(SAVED_AT))
    dcp.save(states(model, optimizer), checkpoint_id=tmp_path)
    uninterrupted = train(model, optimizer, range(SAVED_AT, END))
    moved = load(tmp_path, there, settings)
    assert all(p.device.type == there.type for p in moved[0].parameters())
    assert relative_difference(train(*moved, range(SAVED_AT, END)), uninterrupted) < 1e-4


@RULES
def test_the_way_there_and_back_changes_no_bit(device, tmp_path, settings):
    model, optimizer = make(device, settings)
    train(model, optimizer, range(SAVED_AT))
    dcp.save(states(model, optimizer), checkpoint_id=tmp_path / "there")
    uninterrupted = train(model, optimizer, range(SAVED_AT, END))
    moved = load(tmp_path / "there", CPU, settings)
    dcp.save(states(*moved), checkpoint_id=tmp_path / "back")
    back = load(tmp_path / "back", device, settings)
    assert relative_difference(train(*back, range(SAVED_AT, END)), uninterrupted) == 0.0

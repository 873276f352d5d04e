"""A checkpoint of a GPU is one of a CPU, and training goes on from either."""

from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from shampoo_fsdp import Shampoo
from tests.cuda.training import SETTINGS
from tests.distributed.test_checkpoints import load, states
from tests.distributed.test_meshes import relative_difference
from tests.models import Built, TinyLlama, full_parameters, train

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.filterwarnings("ignore:.*torch.distributed is"),  # it says that it is unavailable
]

SAVED_AT, END = 8, 14  # in the middle of a period
CPU = torch.device("cpu")
RULES = [
    {"preconditioner": "shampoo", "root_method": "coupled_newton"},
    {"preconditioner": "kl_shampoo", "root_method": "eigh", "large_dim": "diagonal"},
    {"preconditioner": "soap", "momentum": 0.5},
    {"preconditioner": "kl_shampoo", "symmetric_packing": True, "root_method": "eigh"},
]


def make(device: torch.device, settings: dict[str, object]) -> tuple[Built, Shampoo]:
    model = TinyLlama(n_layers=1).to(device)
    common = {**SETTINGS, "start_preconditioning_step": 2, "matmul_precision": "highest"}
    return Built(model, None), Shampoo(model.named_parameters(), **{**common, **settings})


def end(built: Built, optimizer: Shampoo) -> dict[str, Tensor]:
    train(built, optimizer, range(SAVED_AT, END))
    return {name: p.cpu() for name, p in full_parameters(built.model).items()}


def loaded(folder: Path, device: torch.device, settings: dict) -> tuple[Built, Shampoo]:
    built, optimizer = make(device, settings)
    load(built, optimizer, folder, True)
    assert all(p.device.type == device.type for p in built.model.parameters())
    return built, optimizer


@pytest.mark.parametrize("settings", RULES, ids=lambda settings: settings["preconditioner"])
def test_training_goes_on_on_the_cpu_and_back_on_the_device(device, tmp_path, settings):
    """There by the rounding of a CPU, and back to the last bit."""
    built, optimizer = make(device, settings)
    train(built, optimizer, range(SAVED_AT))
    dcp.save(states(built, optimizer, True), checkpoint_id=tmp_path / "there")
    uninterrupted = end(built, optimizer)
    moved = loaded(tmp_path / "there", CPU, settings)
    dcp.save(states(*moved, True), checkpoint_id=tmp_path / "back")
    assert relative_difference(end(*moved), uninterrupted) < 1e-4
    back = loaded(tmp_path / "back", device, settings)
    assert relative_difference(end(*back), uninterrupted) == 0.0

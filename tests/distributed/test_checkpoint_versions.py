"""A checkpoint that an earlier version has written goes on as it did then.

    python -m tests.distributed.test_checkpoint_versions FOLDER

writes one with this version, on two ranks: the state of the whole family after some steps, and in
expected.pt where each of its members was at the end.

SOAP's rule has changed since 0.1 (its second moments move with their basis): where it is at the end
was computed anew, from the state that 0.1 has saved.
"""

import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from shampoo_fsdp import Shampoo
from shampoo_fsdp.checkpoint import ShampooLoadPlanner
from shampoo_fsdp.checkpoint.fits import explanation
from shampoo_fsdp.rules.layout import MARKER
from tests.models import deterministic_gradients, full_parameters, train
from tests.ranks import run_ranks

DATA = Path(__file__).parent.parent / "data"
VERSIONS = sorted(path.name for path in DATA.glob("checkpoint-*"))
SAVED_AT, END = 7, 13
COMMON: dict[str, Any] = {"lr": 1e-2, "max_preconditioner_dim": 4, "precondition_frequency": 3}
FAMILY: dict[str, dict[str, Any]] = {
    "shampoo": {"preconditioner": "shampoo", "momentum": 0.5},
    "soap": {"preconditioner": "soap"},
    "kl_shampoo": {"preconditioner": "kl_shampoo", "symmetric_packing": True},
}
FLAT = StateDictOptions(flatten_optimizer_state_dict=True)


class Model(nn.Module):
    """A matrix of two blocks, and for Shampoo a vector."""

    def __init__(self, member: str) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 4, bias=member == "shampoo")
        values = deterministic_gradients(self, -1)
        with torch.no_grad():
            for name, p in self.named_parameters():
                p.copy_(values[name])


def make(member: str, sharded: bool) -> tuple[Model, Shampoo]:
    model = Model(member)
    if sharded:
        fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    return model, Shampoo(model.named_parameters(), **COMMON, **FAMILY[member])


def state(model: Model, optimizer: Shampoo) -> dict[str, Any]:
    optimizer_state = get_optimizer_state_dict(model, optimizer, options=FLAT)
    return {"model": dict(model.named_parameters()), "optimizer": optimizer_state}


def save(folder: Path) -> dict[str, dict[str, Tensor]]:
    family = {member: make(member, sharded=True) for member in FAMILY}
    for model, optimizer in family.values():
        train(model, optimizer, range(SAVED_AT))
    dcp.save({member: state(*pair) for member, pair in family.items()}, checkpoint_id=folder)
    for model, optimizer in family.values():
        train(model, optimizer, range(SAVED_AT, END))
    return {member: full_parameters(model) for member, (model, _) in family.items()}


def write(folder: Path) -> None:
    expected, _ = run_ranks(2, save, folder=folder)
    torch.save(expected, folder / "expected.pt")


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("member", FAMILY)
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_an_earlier_version_goes_on(version, member):
    folder = DATA / version
    model, optimizer = make(member, sharded=False)
    saved = {member: state(model, optimizer)}
    dcp.load(saved, checkpoint_id=folder, planner=ShampooLoadPlanner())
    set_optimizer_state_dict(model, optimizer, saved[member]["optimizer"], options=FLAT)
    assert optimizer.param_groups[0]["lr_factor"] == (1.0 if version == "checkpoint-0.1" else 3.0)
    train(model, optimizer, range(SAVED_AT, END))
    expected = torch.load(folder / "expected.pt", weights_only=True)[member]
    for name, p in model.named_parameters():
        assert torch.allclose(p, expected[name], rtol=1e-4, atol=1e-6), name
        assert not torch.equal(p, Model(member).state_dict()[name])


def test_there_is_one():
    assert VERSIONS
    assert all(sum(f.stat().st_size for f in (DATA / v).iterdir()) < 150e3 for v in VERSIONS)


def test_factors_of_an_earlier_form_are_refused_as_such():
    here = {MARKER: torch.empty(16, 7, 2, 0)}
    message = explanation("w", here, {MARKER: torch.empty(16, 7, 0)})
    assert "factors of parameter 'w' were saved by an earlier version" in message
    assert 'on_mismatch = "rebuild"' in message


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    write(Path(sys.argv[1]))

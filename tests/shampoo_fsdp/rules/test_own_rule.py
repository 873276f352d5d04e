"""A rule from outside the package: trains, is saved, resumed, inspected and planned like others."""

import json
from typing import ClassVar

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from shampoo_fsdp import Shampoo, ShampooConfig
from shampoo_fsdp.checkpoint import ShampooLoadPlanner
from shampoo_fsdp.plan.shards import ParameterSpec, Sharded
from shampoo_fsdp.rules import Rule, register
from shampoo_fsdp.tools.command import main
from shampoo_fsdp.tools.plan_figures import JobPlan
from shampoo_fsdp.validation import refuse
from tests.models import SMALL, full_parameters, train, with_shampoo
from tests.ranks import run_ranks


@register
class Rows(Rule):
    """Divides rows by the root of their mean square; keeps one number for each."""

    name = "rows"
    number = 1000
    entries = ("row_squares",)
    root_methods: ClassVar[tuple[str, ...]] = ("halving", "eigh")
    products = 1
    works_cold = True

    @classmethod
    def check(cls, config):
        if config.large_dim == "diagonal":
            refuse("large_dim", config.large_dim, "'block' or 'one_sided' for rows")

    @classmethod
    def layout(cls, shape, config):
        return {"row_squares_0": ((shape[0],), torch.float32)}

    def restart(self, where):
        self.state["row_squares_0"][where] = 0.0

    def accumulate(self, gradient, now):
        squares = gradient.square().mean(2)
        kept = self.state["row_squares_0"].mul_(now.decay.view(-1, 1))
        kept.add_(squares, alpha=now.weight)

    def refresh(self, where, cold, correction):
        return torch.zeros(1, len(self.state["row_squares_0"][where]), dtype=torch.bool)

    def direction(self, momentum, now, out):
        roots = self.state["row_squares_0"].sqrt().add_(now.eps)
        return torch.div(momentum, roots.unsqueeze(2), out=out)

    def health(self, correction):
        return torch.ones(1, 1), torch.zeros(1, 1)


SETTINGS = {"preconditioner": "rows", "max_preconditioner_dim": 16, "precondition_frequency": 2}


def test_its_direction_is_its_own():
    parameter = nn.Parameter(torch.zeros(3, 2))
    group = {"lr": 1.0, "lr_factor": 1, "betas": (0.0, 0.0), "eps": 0.0, "weight_decay": 0.0}
    optimizer = Shampoo([("w", parameter)], **group, grafting="none", preconditioner="rows")
    gradient = torch.tensor([[3.0, 4.0], [0.6, 0.8], [-6.0, 8.0]])
    parameter.grad = gradient
    optimizer.step()
    expected = -gradient / gradient.square().mean(1, keepdim=True).sqrt()
    torch.testing.assert_close(parameter.detach(), expected)


def test_its_settings_are_its_own():
    assert ShampooConfig(preconditioner="rows").basis_method == "halving"
    with pytest.raises(ValueError, match=r"'large_dim' is 'diagonal'.* for rows"):
        ShampooConfig(preconditioner="rows", large_dim="diagonal")
    with pytest.raises(ValueError, match=r"'root_method' is 'qr'; .*'halving' or 'eigh' for rows"):
        ShampooConfig(preconditioner="rows", root_method="qr")
    with pytest.raises(ValueError, match=r"'columns'; allowed: .*'kl_shampoo'.*'rows'"):
        ShampooConfig(preconditioner="columns")


def test_a_name_or_a_number_cannot_be_taken_twice():
    with pytest.raises(ValueError, match=r"'other'.* of 'rows'"):
        register(type("Other", (Rows,), {"name": "other"}))


def trained_and_resumed(folder: str) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Parameters after six steps, and after three and three more from a checkpoint."""
    result = []
    for resumed in (False, True):
        (model, _), optimizer = with_shampoo("fsdp", **SETTINGS)
        train(model, optimizer, range(3))
        if resumed:
            dcp.save(get_optimizer_state_dict(model, optimizer), checkpoint_id=folder)
            optimizer = Shampoo(model.named_parameters(), **SETTINGS)
            state = get_optimizer_state_dict(model, optimizer)
            dcp.load(state, checkpoint_id=folder, planner=ShampooLoadPlanner())
            set_optimizer_state_dict(model, optimizer, state)
        train(model, optimizer, range(3, 6))
        result.append([*full_parameters(model).values()])
    return tuple(result)


def test_it_trains_on_ranks_and_resumes_and_is_inspected(tmp_path, capsys):
    folder = str(tmp_path / "saved")
    for straight, resumed in run_ranks(2, trained_and_resumed, folder=folder):
        assert all(torch.equal(a, b) for a, b in zip(straight, resumed, strict=True))
    assert main(["inspect", folder, "--json"]) == 0
    parameters = json.loads(capsys.readouterr().out)["parameters"]
    rules = {p["name"]: p["preconditioner"] for p in parameters}
    assert rules["layers.0.attention.wq.weight"] == "rows"
    assert rules["tok_embeddings.weight"] == ""


def test_a_checkpoint_of_another_rule_is_refused_by_name():
    _, rows = with_shampoo("single", SMALL, **SETTINGS)
    _, other = with_shampoo("single", SMALL, max_preconditioner_dim=16)
    with pytest.raises(ValueError, match=r"'preconditioner' is 'rows' .* 'kl_sh"):
        other.load_state_dict(rows.state_dict())


def test_it_is_planned():
    spec = ParameterSpec("w", (64, 64), (0, 1), (2,), (Sharded(0),))
    report = JobPlan("a matrix", [[spec]], ShampooConfig(**SETTINGS)).figures
    assert report["settings"]["preconditioner"] == "rows" and report["even"]

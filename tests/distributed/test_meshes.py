"""The mesh never changes the mathematics: the same gradients give the same parameters."""

import pytest
from torch import Tensor

from shampoo_fsdp import Shampoo
from tests.models import build, deterministic_gradients, full_parameters, set_gradients
from tests.ranks import run_ranks

STEPS = 20
SETTINGS = {"lr": 1e-2, "max_preconditioner_dim": 16, "precondition_frequency": 4}


def train(layout: str, sizes: dict[str, int] | None = None, **settings) -> dict[str, Tensor]:
    """Full parameters after some steps with given gradients; layer 1's wq has none at times."""
    built = build(layout, **(sizes or {}))
    optimizer = Shampoo(
        built.model.named_parameters(),
        replicas=built.mesh if layout == "ddp" else None,
        **{**SETTINGS, **settings},
    )
    for step in range(STEPS):
        gradients: dict[str, Tensor | None] = dict(deterministic_gradients(built.model, step))
        if step % 5 == 2:
            gradients["layers.1.attention.wq.weight"] = None
        set_gradients(built.model, gradients)
        optimizer.step()
    return full_parameters(built.model)


def relative_difference(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    return max(((ours[n] - theirs[n]).norm() / theirs[n].norm()).item() for n in theirs)


@pytest.mark.parametrize(
    ("layout", "world"),
    [
        ("fsdp", 2),
        ("fsdp", 4),
        ("ddp", 2),
        ("hsdp", 4),
        ("tp", 2),
        ("tp_fsdp", 4),
    ],
)
def test_every_mesh_equals_one_process(layout: str, world: int) -> None:
    alone = train("single")
    for parameters in run_ranks(world, train, layout=layout):
        assert relative_difference(parameters, alone) <= 1e-5

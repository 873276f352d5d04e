"""Trainings with given gradients on any device, whose results are on the CPU."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from shampoo_fsdp import Shampoo
from tests.models import set_gradients
from tests.shampoo_fsdp.test_family import spread_gradients

STEPS = 16
SHAPES = {
    "layers.0.w": (96, 64),  # blocks of 32 x 32
    "layers.0.wide": (24, 88),  # of 24 x 30 and 24 x 29
    "layers.0.experts": (3, 32, 20),
    "layers.0.conv": (16, 4, 3, 3),
    "layers.0.norm.weight": (7,),
    "tok_embeddings.weight": (40, 24),
}
SETTINGS = {
    "lr": 1e-2,
    "lr_factor": 1.0,
    "betas": (0.9, 0.9),
    "max_preconditioner_dim": 32,
    "precondition_frequency": 3,
    "start_preconditioning_step": 9,  # factors have full rank by then
    "refresh_warmup_steps": 0,
}


class Training:
    """Parameters and their optimizer."""

    def __init__(self, device: torch.device, **settings: object) -> None:
        generator = torch.Generator().manual_seed(0)
        self.parameters = {
            name: nn.Parameter((0.1 * torch.randn(shape, generator=generator)).to(device))
            for name, shape in SHAPES.items()
        }
        self.optimizer = Shampoo(self.parameters.items(), **{**SETTINGS, **settings})

    def give(self, step: int) -> None:
        set_gradients(self.parameters, spread_gradients(SHAPES, step))

    def run(self, steps: Iterable[int]) -> dict[str, Tensor]:
        """The parameters after these steps."""
        for step in steps:
            self.give(step)
            self.optimizer.step()
        return {name: p.detach().cpu().clone() for name, p in self.parameters.items()}


def trained(device: torch.device, **settings: object) -> dict[str, Tensor]:
    return Training(device, **settings).run(range(STEPS))


def difference(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """Relative to the way that a parameter has gone, the largest of all."""
    start = Training(torch.device("cpu")).run(())
    return max(
        ((ours[n] - theirs[n]).norm() / (theirs[n] - start[n]).norm()).item() for n in theirs
    )

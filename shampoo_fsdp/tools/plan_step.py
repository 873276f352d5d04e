"""What a step of the rank with the most work would take on a GPU, and of a training step."""

import dataclasses
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console

from shampoo_fsdp.config import ShampooConfig
from shampoo_fsdp.plan.shards import ParameterSpec
from shampoo_fsdp.tools.dry_step import dry_optimizer, dry_step
from shampoo_fsdp.tools.machine import Machine

__all__ = ["ModelledStep", "model_step"]


@dataclass(frozen=True)
class ModelledStep:
    """A step of a rank by the assumed rates of a machine; times in ms."""

    rank: int
    machine: Machine
    elements: int
    """Of all parameters of the model."""
    sharing: int
    """GPUs of a data-parallel rank, see :meth:`Machine.training_step`."""
    parts: dict[str, float]
    """What the GPU computes for each part of a step."""
    waited: float
    """How long it has nothing to do but wait for the network."""
    kernels: int
    decompositions: int
    """Of matrices, by LAPACK's counterparts: what they take is not in the times."""
    peak_bytes: int
    """Beside parameters, gradients and state."""

    @property
    def total(self) -> float:
        return sum(self.parts.values()) + self.waited

    @property
    def training(self) -> float:
        """Forward and backward."""
        return self.machine.training_step(self.elements, self.sharing)

    @property
    def share(self) -> float:
        """The optimizer's time by that of forward and backward."""
        return self.total / self.training

    def share_with(self, *, period: float = 1.0, tokens: float = 1.0) -> float:
        """The same if `precondition_frequency` or the tokens of a step were so many times what they
        are."""
        saved = self.parts.get("roots", 0.0) * (1.0 - 1.0 / period)
        return (self.total - saved) / (self.training * tokens)

    def as_json(self) -> dict[str, Any]:
        """Plain dicts and numbers."""
        figures = dataclasses.asdict(self)
        return figures | {"ms": self.total, "training_ms": self.training, "share": self.share}


def model_step(
    plan: dict[str, Any],
    models: Sequence[Sequence[ParameterSpec]],
    machine: Machine,
    sharing: int = 1,
) -> ModelledStep:
    """Model a step of the rank with the most work.

    Args:
        plan: see :func:`shampoo_fsdp.tools.plan_figures.plan_figures`.
        models: what it was made of.
        sharing: GPUs of a data-parallel rank, see :meth:`Machine.training_step`.

    Raises:
        RuntimeError: if torch.distributed is in use already.
    """
    rank, settings = plan["worst_rank"]["rank"], ShampooConfig(**plan["settings"])
    errors = Console(stderr=True)
    parts: Counter[str] = Counter()
    kernels = decompositions = peak = 0
    waited = 0.0
    for specs in models:
        here = [spec for spec in specs if rank in spec.ranks]
        if not here:
            continue
        doing = errors.status("Modelling a step")  # of large models for half a minute
        with doing, dry_optimizer(here, settings, rank) as optimizer:
            work = dry_step(optimizer, machine)
        parts.update(work.busy)
        waited += sum(transfer.waited for transfer in work.transfers)
        kernels += work.total["launches"]
        decompositions += work.total["decompositions"]
        peak = max(peak, work.peak)
    busy = {part: float(took) for part, took in parts.items()}
    return ModelledStep(
        rank, machine, plan["elements"], sharing, busy, waited, kernels, decompositions, peak
    )

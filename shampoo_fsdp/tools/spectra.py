"""The eigenvalues of a factor, and what they say."""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from shampoo_fsdp.rules.matrices import condition_number, resolution_of, unpacked
from shampoo_fsdp.tools.reader import CheckpointReader

__all__ = ["Factor", "elements_of", "factor_in"]

_CURVE_POINTS = 65


@dataclass
class Factor:
    """One factor of a block, of n rows."""

    dimension: int
    n: int
    kind: str
    """"full", "packed" (kept as its upper triangle) or "diagonal"."""
    condition_number: float
    """See :func:`shampoo_fsdp.rules.matrices.condition_number`; NaN if all eigenvalues are zero or
    one is not finite."""
    effective_rank: float
    """exp of the entropy of the eigenvalues divided by their sum (Roy and Vetterli 2007): n if all
    are equal, 1 if all but one are zero; NaN as above."""
    vanishing: float
    """Share of the eigenvalues that are below the rule's resolution of the largest: roots count
    them as this."""
    spectrum: list[float] = field(repr=False)
    """The eigenvalues by the largest, descending, at evenly spaced places; [] for NaN."""


def factor_in(
    reader: CheckpointReader,
    key: str,
    start: int,
    dimension: int,
    n: int,
    kind: str,
    resolution: float,
) -> Factor:
    """Read a factor and look at its eigenvalues.

    Args:
        start: where it begins in the entry.
        resolution: of the rule.
    """
    values = reader.part(key, (start,), (elements_of(n, kind),))
    resolution = max(resolution, resolution_of(values.dtype))
    spectrum = _eigenvalues(values.double(), n, kind)
    if spectrum is None:
        return Factor(dimension, n, kind, math.nan, math.nan, math.nan, [])
    relative = spectrum / spectrum[0]
    shares = spectrum / spectrum.sum()
    entropy = -torch.special.xlogy(shares, shares).sum()
    places = torch.linspace(0, n - 1, _CURVE_POINTS).round().long()
    return Factor(
        dimension=dimension,
        n=n,
        kind=kind,
        condition_number=condition_number(spectrum[0], spectrum[-1], resolution).item(),
        effective_rank=entropy.exp().item(),
        vanishing=(relative < resolution).double().mean().item(),
        spectrum=relative[places].tolist(),
    )


def elements_of(n: int, kind: str) -> int:
    """How many numbers are kept of a factor."""
    return {"full": n * n, "packed": n * (n + 1) // 2, "diagonal": n}[kind]


def _eigenvalues(values: Tensor, n: int, kind: str) -> Tensor | None:
    """Descending and at least zero; None if there is none above zero or one is not finite."""
    if not values.isfinite().all():
        return None
    if kind == "packed":
        values = unpacked(values.unsqueeze(0), n)
    if kind != "diagonal":
        values = torch.linalg.eigvalsh(values.view(n, n))
    values = values.clamp(min=0.0).sort(descending=True).values
    return values if values[0] > 0.0 else None

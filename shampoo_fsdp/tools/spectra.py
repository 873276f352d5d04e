"""The eigenvalues of a factor, and what they say."""

from typing import Any

import torch
from torch import Tensor

from shampoo_fsdp.rules.matrices import condition_number, resolution_of, unpacked
from shampoo_fsdp.tools.reader import CheckpointReader

_CURVE_POINTS = 65


def factor_in(
    reader: CheckpointReader,
    key: str,
    start: int,
    dimension: int,
    n: int,
    kind: str,
    resolution: float,
) -> dict[str, Any]:
    """Read a factor of n rows and look at its eigenvalues.

    "kind" is "full", "packed" (kept as its upper triangle) or "diagonal"; "condition_number" see
    :func:`shampoo_fsdp.rules.matrices.condition_number`; "effective_rank" exp of the entropy of the
    eigenvalues divided by their sum (Roy and Vetterli 2007), n if all are equal, 1 if all but one
    are zero; "vanishing" the share of the eigenvalues that are below the rule's resolution of the
    largest, as which roots count them; "spectrum" the eigenvalues by the largest, descending, at
    evenly spaced places. All of these are None if all eigenvalues are zero or one is not finite.

    Args:
        start: where it begins in the entry.
        resolution: of the rule.
    """
    values = reader.part(key, (start,), (elements_of(n, kind),))
    resolution = max(resolution, resolution_of(values.dtype))
    of_all = {"dimension": dimension, "n": n, "kind": kind}
    spectrum = _eigenvalues(values.double(), n, kind)
    if spectrum is None:
        names = ("condition_number", "effective_rank", "vanishing", "spectrum")
        return of_all | dict.fromkeys(names)
    relative = spectrum / spectrum[0]
    shares = spectrum / spectrum.sum()
    entropy = -torch.special.xlogy(shares, shares).sum()
    places = torch.linspace(0, n - 1, _CURVE_POINTS).round().long()
    return {
        **of_all,
        "condition_number": condition_number(spectrum[0], spectrum[-1], resolution).item(),
        "effective_rank": entropy.exp().item(),
        "vanishing": (relative < resolution).double().mean().item(),
        "spectrum": relative[places].tolist(),
    }


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

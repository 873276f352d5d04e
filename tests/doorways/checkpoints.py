"""Look into the checkpoints of examples."""

from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

__all__ = ["changed"]


def changed(one: Path, other: Path) -> int:
    """How many weights of a model differ between two folders of torch.distributed.checkpoint."""
    before, after = _weights(one), _weights(other)
    assert before.keys() == after.keys()
    return sum(not torch.equal(before[name], after[name]) for name in before)


def _weights(folder: Path) -> dict[str, Any]:
    file = folder.with_suffix(".pt")
    dcp_to_torch_save(folder, file)
    weights: dict[str, Any] = torch.load(file)["model"]
    return weights

"""How often something went wrong for each block of a stack."""

import torch
from torch import Tensor

from shampoo_fsdp.rules.rule import Positions

__all__ = ["Tally"]


class Tally:
    """Counts on the device, [B], which nobody waits for."""

    def __init__(self, blocks: int, device: torch.device) -> None:
        self.total = torch.zeros(blocks, dtype=torch.int32, device=device)
        """In all."""
        self.streak = torch.zeros(blocks, dtype=torch.int32, device=device)
        """The last times in a row."""

    def add(self, times: Tensor, stays: Tensor, where: Positions = slice(None)) -> None:
        """
        Args:
            times: how often it went wrong now, [n].
            stays: where the streak goes on, [n].
            where: n positions.
        """
        self.total[where] += times
        self.streak[where] = (self.streak[where] + (times > 0)) * stays

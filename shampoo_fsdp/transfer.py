"""From the host to the device, without waiting for it."""

import torch
from torch import Tensor

__all__ = ["to_device"]


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on this device. From memory that is not pinned an accelerator would
    copy at once, and the host wait for all that it still has to do."""
    if device.type == "cpu":
        return values
    return values.pin_memory().to(device, non_blocking=True)

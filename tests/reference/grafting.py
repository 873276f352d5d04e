"""The grafted methods: momentum, second moments, the direction that they make, and its momentum.

Sources:
    Shi et al. 2023, arXiv 2309.06497: Section 3 (the methods that may be grafted, bias correction).
    Sutskever et al. 2013, "On the importance of initialization and momentum in deep learning", as
        torch.optim.SGD has it: heavy-ball and Nesterov momentum of the direction.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from tests.reference.rule import Settings


@dataclass
class Moments:
    """What is remembered of the gradients, besides the factors."""

    momentum: Tensor
    """M"""
    graft: Tensor
    """A"""
    buffer: Tensor
    """B"""
    used: Tensor
    """The newest average of gradients, with other weights than M has."""

    @staticmethod
    def zeros(shape: tuple[int, ...]) -> "Moments":
        """Before the first step."""
        return Moments(*(torch.zeros(shape, dtype=torch.float64) for _ in range(4)))


class GraftedMethod:
    """One of "adam", "rmsprop" (no bias correction), "adagrad" (sums), "sgd" or "none"."""

    def __init__(self, name: str, beta3: float, settings: Settings) -> None:
        self.name, self.beta3, self.settings = name, beta3, settings

    def average(self, moments: Moments, grad: Tensor) -> None:
        """M and A after this gradient, and what is used of M."""
        beta1, beta2 = self.settings.betas[0], self.settings.grafting_beta2
        moments.used = self.beta3 * moments.momentum + (1 - self.beta3) * grad
        moments.momentum = beta1 * moments.momentum + (1 - beta1) * grad
        if self.name in ("adam", "rmsprop"):
            moments.graft = beta2 * moments.graft + (1 - beta2) * grad**2
        elif self.name == "adagrad":
            moments.graft = moments.graft + grad**2

    def momentum_hat(self, moments: Moments, t: int) -> Tensor:
        """M̂, used momentum over the sum of the weights in it."""
        if not self.settings.use_bias_correction:
            return moments.used
        return moments.used / (1 - self.beta3 * self.settings.betas[0] ** (t - 1))

    def direction(self, moments: Moments, t: int) -> Tensor:
        """D_graft = M̂ / (sqrt(Â) + eps); for "sgd" and "none" M̂."""
        momentum_hat = self.momentum_hat(moments, t)
        if self.name in ("sgd", "none"):
            return momentum_hat
        graft = moments.graft
        if self.name == "adam":
            graft = graft / self.settings.correction(self.settings.grafting_beta2, t)
        return momentum_hat / (graft.sqrt() + self.settings.grafting_eps)

    def accelerate(self, moments: Moments, direction: Tensor, t: int) -> Tensor:
        """The direction with momentum; the first one enters B as it is, without dampening."""
        momentum = self.settings.momentum
        if momentum == 0:
            return direction
        if t == 1:
            moments.buffer = direction.clone()
        else:
            added = (1 - self.settings.dampening) * direction
            moments.buffer = momentum * moments.buffer + added
        if self.settings.nesterov:
            return direction + momentum * moments.buffer
        return moments.buffer.clone()

"""One file per rule that turns a stack of gradient blocks into preconditioned ones."""

from shampoo_fsdp.preconditioners.base import Positions, Preconditioner
from shampoo_fsdp.preconditioners.kl_shampoo import KLShampooPreconditioner
from shampoo_fsdp.preconditioners.shampoo import ShampooPreconditioner
from shampoo_fsdp.preconditioners.soap import SoapPreconditioner

__all__ = ["PRECONDITIONERS", "Positions", "Preconditioner"]

PRECONDITIONERS: dict[str, type[Preconditioner]] = {
    "shampoo": ShampooPreconditioner,
    "soap": SoapPreconditioner,
    "kl_shampoo": KLShampooPreconditioner,
}
"""By the name that the setting `preconditioner` gives them. Their order is in checkpoints: new ones
come last."""

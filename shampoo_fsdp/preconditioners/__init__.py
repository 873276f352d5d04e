"""One file per rule that turns a stack of gradient blocks into preconditioned ones."""

from shampoo_fsdp.preconditioners.shampoo import ShampooPreconditioner

__all__ = ["ShampooPreconditioner"]

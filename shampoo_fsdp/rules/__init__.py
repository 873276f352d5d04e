"""The mathematics, on stacks of blocks [B, m, n]; nothing here knows of other ranks.

One file per rule: it turns the momentum of a block into a direction, and says itself what it keeps,
costs and allows (`rule.py`). `stack.py` runs a rule on all blocks of one shape, `roots.py` takes
inverse roots, where ridges are added (how large: the rule's `_ridge`), `grafting.py` is the
first-order method whose step size is taken, and that the other parameters get (Adam from torch's
fused kernel).
"""

from shampoo_fsdp.rules.kl_shampoo import KLShampooRule
from shampoo_fsdp.rules.matrices import Positions
from shampoo_fsdp.rules.rule import Rule, Step, register
from shampoo_fsdp.rules.shampoo import ShampooRule
from shampoo_fsdp.rules.soap import SoapRule

__all__ = ["KLShampooRule", "Positions", "Rule", "ShampooRule", "SoapRule", "Step", "register"]

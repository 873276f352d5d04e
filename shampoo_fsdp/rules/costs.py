"""What a block costs its owner."""

import math

from shampoo_fsdp.config import ShampooConfig
from shampoo_fsdp.rules.factors import factor_kinds
from shampoo_fsdp.rules.kept import state_bytes
from shampoo_fsdp.rules.roots import by_products
from shampoo_fsdp.rules.rule import rule_of

__all__ = ["BlockCosts"]

# A root or eigenbasis of an n x n factor takes as long as a matrix product in fp32 of this many
# FLOPs times n^3 and n^2: fitted to n = 64 to 1024 on a CPU (python -m benchmarks.roots). For
# "polynomial" it is what a GPU takes beside products in bf16, which take a quarter.
_BF16 = 0.25
_REFRESH_FLOPS = {
    "eigh": (10.0, 1900.0),
    "eigh_pseudo_inverse": (10.0, 1900.0),
    "coupled_newton": (84.0, 730.0),
    "polynomial": (13.0, 250.0),
    "qr": (15.0, 1400.0),
}


class BlockCosts(dict[tuple[int, ...], tuple[float, float, int]]):
    """For each shape of block FLOPs on every step (factors and preconditioning), those of a
    refresh, as many as a matrix product makes in its time, and bytes of state; made when asked."""

    def __init__(self, config: ShampooConfig) -> None:
        super().__init__()
        self._config = config

    def __missing__(self, shape: tuple[int, ...]) -> tuple[float, float, int]:
        config, rule = self._config, rule_of(self._config)
        kinds = factor_kinds(shape, config)
        full = [n for n, kind in zip(shape, kinds, strict=True) if kind == "full"]
        # The method of somebody else's rule costs what eigenvectors do, for want of a better guess.
        method = config.basis_method
        if full:
            method = by_products(
                method, -rule.root_exponent(config, len(shape) - kinds.count("none"))
            )
        cubed, squared = _REFRESH_FLOPS.get(method, _REFRESH_FLOPS["eigh"])
        refresh = rule.refresh_cost * sum(cubed * n**3 + squared * n**2 for n in full)
        if config.matmul_precision == "medium":
            refresh /= _BF16
        # Elementwise work counts as one more row of a product.
        every = 2.0 * rule.products * math.prod(shape) * (sum(full) + 1)
        self[shape] = every, refresh, state_bytes(shape, config)
        return self[shape]

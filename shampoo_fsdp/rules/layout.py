"""What is kept of a block, by name, for stacks and checkpoints; what a block costs its owner."""

import functools
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence

from torch import Tensor

from shampoo_fsdp.config import RULES, ShampooConfig
from shampoo_fsdp.rules.grafting import second_moment_name
from shampoo_fsdp.rules.matrices import StateEntry, factor_kinds, torch_dtype
from shampoo_fsdp.rules.roots import by_products

__all__ = ["MARKER", "block_costs", "factor_entries", "preconditioner_of"]

MARKER = "max_preconditioner_dim"
"""Name of the entry whose shape is :func:`settings_marker`."""


def factor_entries() -> frozenset[str]:
    """Names of the entries of a parameter's state that only mean something together."""
    of_rules = {entry for rule in RULES.values() for entry in rule.entries}
    return frozenset({"factor_step", "refreshed", MARKER, *of_rules})


def settings_marker(config: ShampooConfig, fingerprint: int) -> tuple[int, ...]:
    """The shape of an entry without elements that tells the settings and the grid: a checkpoint
    that was saved with others is refused in their name before anything is read."""
    return config.max_preconditioner_dim, fingerprint, config.rule.number, 0


def preconditioner_of(marker: Sequence[int]) -> str:
    """The setting that such a shape tells; "" for what is none, or of a rule that is not known."""
    names = {rule.number: name for name, rule in RULES.items()}
    return names.get(marker[2], "") if len(marker) == 4 else ""


def saved_entries(shape: Sequence[int], config: ShampooConfig) -> dict[str, StateEntry]:
    """What a checkpoint has for a block: shape and type by name.

    Momenta and second moments have the shape of the block; the rule's matrices of one kind are one
    row, dimension after dimension.
    """
    entries = {}
    for name, entry, start, (kept, dtype) in _places(shape, config):
        entries[entry] = (kept if name == entry else (start + math.prod(kept),)), dtype
    return entries


def split_rows(
    saved: Mapping[str, Tensor], shape: Sequence[int], config: ShampooConfig
) -> dict[str, Tensor]:
    """Stacked entries as :func:`saved_entries` says, [B, ...], with views of single matrices in the
    place of the rows."""
    split = {}
    for name, entry, start, (kept, _) in _places(shape, config):
        split[name] = row = saved[entry]
        if name != entry:
            split[name] = row[:, start : start + math.prod(kept)].view(len(row), *kept)
    return split


def _places(
    shape: Sequence[int], config: ShampooConfig
) -> Iterator[tuple[str, str, int, StateEntry]]:
    """For each tensor of a block's state its name, the name of the row that it is in (or its own),
    where it starts there, and its shape and type."""
    used: Counter[str] = Counter()
    for name, kept in (_moments(shape, config) | config.rule.layout(shape, config)).items():
        kind, _, dimension = name.rpartition("_")
        entry = kind if dimension.isdigit() else name
        yield name, entry, used[entry], kept
        used[entry] += math.prod(kept[0])


def _moments(shape: Sequence[int], config: ShampooConfig) -> dict[str, StateEntry]:
    momentum_dtype = torch_dtype(config.momentum_dtype)
    entries: dict[str, StateEntry] = {"exp_avg": (tuple(shape), momentum_dtype)}
    if second := second_moment_name(config.grafting):
        entries[second] = (tuple(shape), torch_dtype(config.second_moment_dtype))
    if config.momentum:
        entries["momentum_buffer"] = (tuple(shape), momentum_dtype)
    return entries


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


def block_costs(config: ShampooConfig) -> Callable[[tuple[int, ...]], tuple[float, float, int]]:
    """A function that gives for a shape of block FLOPs on every step (factors and preconditioning),
    those of a refresh, as many as a matrix product makes in its time, and bytes of state."""
    return functools.partial(_costs, config)


def _costs(config: ShampooConfig, shape: tuple[int, ...]) -> tuple[float, float, int]:
    rule, kinds = config.rule, factor_kinds(shape, config)
    full = [n for n, kind in zip(shape, kinds, strict=True) if kind == "full"]
    # The method of somebody else's rule costs what eigenvectors do, for want of a better guess.
    method = config.basis_method
    if full:
        factors = len(shape) - kinds.count("none")
        method = by_products(method, -rule.root_exponent(config, factors))
    cubed, squared = _REFRESH_FLOPS.get(method, _REFRESH_FLOPS["eigh"])
    refresh = rule.refresh_cost * sum(cubed * n**3 + squared * n**2 for n in full)
    if config.matmul_precision == "medium":
        refresh /= _BF16
    # Elementwise work counts as one more row of a product.
    every = 2.0 * rule.products * math.prod(shape) * (sum(full) + 1)
    entries = saved_entries(shape, config).values()
    return every, refresh, sum(math.prod(kept) * dtype.itemsize for kept, dtype in entries)

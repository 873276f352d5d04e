"""What is kept for a block, by name: the one description that stacks, costs and checkpoints use."""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from shampoo_fsdp.config import RULES, ShampooConfig
from shampoo_fsdp.rules.grafting import second_moment_name
from shampoo_fsdp.rules.matrices import StateEntry
from shampoo_fsdp.rules.precision import torch_dtype
from shampoo_fsdp.rules.rule import Rule, rule_of

__all__ = [
    "MARKER",
    "factor_entries",
    "preconditioner_of",
    "saved_entries",
    "settings_marker",
    "split_rows",
    "state_bytes",
]

MARKER = "max_preconditioner_dim"
"""Name of the entry whose shape is :func:`settings_marker`."""


def factor_entries() -> frozenset[str]:
    """Names of the entries of a parameter's state that only mean something together."""
    of_rules = {entry for rule in _rules().values() for entry in rule.entries}
    return frozenset({"factor_step", "refreshed", MARKER, *of_rules})


def settings_marker(config: ShampooConfig, fingerprint: int) -> tuple[int, ...]:
    """The shape of an entry without elements that tells the settings and the grid: a checkpoint
    that was saved with others is refused in their name before anything is read."""
    return config.max_preconditioner_dim, fingerprint, rule_of(config).number, 0


def preconditioner_of(marker: Sequence[int]) -> str:
    """The setting that such a shape tells; "" for what is none, or of a rule that is not known."""
    names = {rule.number: name for name, rule in _rules().items()}
    return names.get(marker[2], "") if len(marker) == 4 else ""


def _rules() -> Mapping[str, type[Rule]]:
    return RULES


def saved_entries(shape: Sequence[int], config: ShampooConfig) -> dict[str, StateEntry]:
    """What a checkpoint has for a block: shape and type by name.

    Momenta and second moments have the shape of the block; the rule's matrices of one kind are one
    row, dimension after dimension.
    """
    entries, rows = _moments(shape, config), dict[str, tuple[int, torch.dtype]]()
    for name, (kept, dtype) in _of_rule(shape, config).items():
        kind, _, dimension = name.rpartition("_")
        if dimension.isdigit():
            rows[kind] = rows.get(kind, (0, dtype))[0] + math.prod(kept), dtype
        else:
            entries[name] = kept, dtype
    return entries | {kind: ((size,), dtype) for kind, (size, dtype) in rows.items()}


def split_rows(
    saved: Mapping[str, Tensor], shape: Sequence[int], config: ShampooConfig
) -> dict[str, Tensor]:
    """Stacked entries as :func:`saved_entries` says, [B, ...], with views of single matrices in the
    place of the rows."""
    split = {name: saved[name] for name in _moments(shape, config)}
    used: dict[str, int] = defaultdict(int)
    for name, (kept, _) in _of_rule(shape, config).items():
        kind, _, dimension = name.rpartition("_")
        if dimension.isdigit():
            row, start = saved[kind], used[kind]
            used[kind] = start + math.prod(kept)
            split[name] = row[:, start : used[kind]].view(len(row), *kept)
        else:
            split[name] = saved[name]
    return split


def state_bytes(shape: Sequence[int], config: ShampooConfig) -> int:
    """Bytes of state of a block."""
    entries = saved_entries(shape, config).values()
    return sum(math.prod(kept) * dtype.itemsize for kept, dtype in entries)


def _moments(shape: Sequence[int], config: ShampooConfig) -> dict[str, StateEntry]:
    momentum_dtype = torch_dtype(config.momentum_dtype)
    entries: dict[str, StateEntry] = {"exp_avg": (tuple(shape), momentum_dtype)}
    if second := second_moment_name(config.grafting):
        entries[second] = (tuple(shape), torch.float32)
    if config.momentum:
        entries["momentum_buffer"] = (tuple(shape), momentum_dtype)
    return entries


def _of_rule(shape: Sequence[int], config: ShampooConfig) -> dict[str, StateEntry]:
    return rule_of(config).layout(shape, config)

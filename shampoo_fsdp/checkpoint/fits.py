"""What of a checkpoint's optimizer state is loaded: a pure function of shapes and metadata.

For each parameter

    moments and factors fit       all of its state is loaded
    only the moments fit          they are loaded, and its factors start anew
    the moments do not fit        all of its state starts anew

Factors of other settings cannot be used; moments of another optimizer can: AdamW's are Shampoo's.
"""

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from shampoo_fsdp.rules.layout import MARKER, factor_entries, preconditioner_of
from shampoo_fsdp.validation import name_some

__all__ = ["CheckpointMismatch", "LoadReport", "state_keys"]

OnMismatch = Literal["refuse", "rebuild"]

# The average of squares and their sum follow from each other by the number of steps.
_SECOND_MOMENTS = {"exp_avg_sq": "sum", "sum": "exp_avg_sq"}
_MOMENTS = ("step", "exp_avg", *_SECOND_MOMENTS)
_MOMENTUM = "momentum_buffer"
_STATE = re.compile(r"(?P<parameter>(?:.*?\.)?state\..+)\.(?P<entry>\w+)")
_SETTING_OF_GROUP = re.compile(r"(?:.*?\.)?param_groups\..+")
OF_BEFORE = (
    "The checkpoint has no 'lr_factor' and goes on with 1, as it was: keep its lr. To change that, "
    "set 'lr_factor' in the optimizer's param_groups after loading."
)
_HINT = 'Set it as it was, or on_mismatch = "rebuild" to keep what fits and start the rest anew.'


class CheckpointMismatch(ValueError):
    """A checkpoint that does not fit what shall be loaded; says why and what to do."""


def is_state_entry(name: str) -> bool:
    """Whether an entry of a parameter's state is Shampoo's or AdamW's."""
    return name in (*_MOMENTS, _MOMENTUM) or name in factor_entries()


def state_keys(keys: Iterable[str]) -> dict[str, dict[str, str]]:
    """The keys of an optimizer's state: for each parameter ("...state.NAME") those of its entries.

    Any prefix is understood, as are state dicts that were flattened by
    `torch.distributed.checkpoint.state_dict` and those that were not.
    """
    found: dict[str, dict[str, str]] = defaultdict(dict)
    for key in keys:
        if (match := _STATE.fullmatch(key)) and is_state_entry(match["entry"]):
            found[match["parameter"]][match["entry"]] = key
    return dict(found)


@dataclass
class LoadReport:
    """What is not just read of a state dict, and the parameters whose state is not all loaded."""

    restarted: list[str] = field(default_factory=list)
    """All of their state starts anew."""
    factors_restarted: list[str] = field(default_factory=list)
    """Their moments are loaded, their factors start anew."""
    factors_dropped: list[str] = field(default_factory=list)
    """They are not preconditioned any more."""
    momentum_started: list[str] = field(default_factory=list)
    """The checkpoint has no momentum of their updates, which starts at zero."""
    left_out: set[str] = field(default_factory=set)
    """Keys that are not read: state that starts anew, and settings of groups."""
    renamed: dict[str, str] = field(default_factory=dict)
    """Second moments that are read from the key of another kind, and are multiplied or divided by
    the number of steps."""
    of_before: bool = False
    """Whether the saved state is Shampoo's, and no group there has an `lr_factor`."""

    def merge(self, other: "LoadReport") -> None:
        """Add the names of parameters that another rank has."""
        for name in _SAID:
            names = [*getattr(self, name), *getattr(other, name)]
            setattr(self, name, list(dict.fromkeys(names)))

    def __str__(self) -> str:
        found = ((what, getattr(self, name)) for name, what in _SAID.items())
        return "; ".join(f"{what} {name_some(names)}" for what, names in found if names)


_SAID = {
    "restarted": "all starts anew for",
    "factors_restarted": "moments are loaded and factors start anew for",
    "factors_dropped": "factors are dropped for",
    "momentum_started": "the momentum of updates starts at zero for",
}


def decide(
    here: Mapping[str, Any], saved: Mapping[str, Any], on_mismatch: OnMismatch
) -> LoadReport:
    """Compare a flat state dict with another one, or with the metadata of a checkpoint.

    The same on every rank that has the same parameters.

    Args:
        here: what shall be loaded, by key.
        saved: the other one, or what the metadata says, by key.
        on_mismatch: see :class:`shampoo_fsdp.ShampooConfig`. To go on from AdamW's moments, or
            with AdamW, is no mismatch.

    Raises:
        CheckpointMismatch: state does not fit, and `on_mismatch` is "refuse".
    """
    keys_here, keys_saved = state_keys(here), state_keys(saved)
    if keys_here and not keys_saved and on_mismatch == "refuse":
        raise CheckpointMismatch(
            "the checkpoint has no optimizer state: was only the model saved? Load the model "
            'alone, or set on_mismatch = "rebuild" to start the optimizer anew.'
        )
    report = LoadReport()
    report.left_out |= {k for k in here if k not in saved and _SETTING_OF_GROUP.fullmatch(k)}
    shampoo_here = any(MARKER in entries for entries in keys_here.values())
    shampoo_saved = any(MARKER in entries for entries in keys_saved.values())
    report.of_before = shampoo_saved and not any(key.endswith(".lr_factor") for key in saved)
    switched_on = shampoo_here and not shampoo_saved
    switched_off = shampoo_saved and not shampoo_here
    for parameter, keys in keys_here.items():
        name = parameter.partition("state.")[2]
        mine = {entry: here[key] for entry, key in keys.items()}
        their_keys = keys_saved.get(parameter, {})
        theirs = {entry: saved[key] for entry, key in their_keys.items()}
        for entry, other in _SECOND_MOMENTS.items():
            if entry in mine and entry not in theirs and other in theirs:
                theirs[entry] = theirs[other]
                report.renamed[keys[entry]] = their_keys[other]
        if _MOMENTUM in mine and not fits(mine[_MOMENTUM], theirs.get(_MOMENTUM)):
            report.momentum_started.append(name)
            report.left_out.add(keys[_MOMENTUM])

        factors = [entry for entry in mine if entry in factor_entries()]
        if not all(fits(mine[e], theirs.get(e)) for e in _MOMENTS if e in mine):
            affected, anew = report.restarted, list(mine)
        elif not all(fits(mine[e], theirs.get(e)) for e in factors):
            affected, anew = report.factors_restarted, factors
        elif shampoo_here and MARKER in theirs and MARKER not in mine:
            affected, anew = report.factors_dropped, []
        else:
            continue
        if on_mismatch == "refuse" and not (switched_off or (switched_on and anew == factors)):
            raise CheckpointMismatch(explanation(name, mine, theirs))
        affected.append(name)
        report.left_out |= {keys[entry] for entry in anew}
    report.renamed = {k: v for k, v in report.renamed.items() if k not in report.left_out}
    return report


def fits(here: Any, saved: Any) -> bool:
    """Whether a tensor can be read from another one, or from what the metadata says of it."""
    return isinstance(saved, TensorStorageMetadata | Tensor) and shape_of(saved) == tuple(
        here.shape
    )


def check_others(here: Mapping[str, Any], saved: Mapping[str, Any]) -> None:
    """Raise a CheckpointMismatch if a key of a state dict is missing, has another shape, or was
    saved in part.

    Args:
        here: what shall be loaded, by key.
        saved: metadata of the checkpoint.
    """
    for key, value in here.items():
        if key not in saved or (isinstance(value, Tensor) and not fits(value, saved[key])):
            there = f"has shape {shape_of(saved[key])}" if key in saved else "has none"
            raise CheckpointMismatch(
                f"the checkpoint {there} for '{key}', which has shape {shape_of(value)} here; it "
                "is of another model or job, or holds the model alone."
            )
        chunks = getattr(saved[key], "chunks", None)
        if chunks is not None and sum(math.prod(c.sizes) for c in chunks) < value.numel():
            raise CheckpointMismatch(
                f"the checkpoint has only a part of '{key}': save on all ranks (not no_dist), or "
                "with StateDictOptions(full_state_dict=True)."
            )


def shape_of(value: Any) -> tuple[int, ...]:
    """The shape of a tensor or of its metadata; () for what is no tensor."""
    return tuple(getattr(value, "shape", getattr(value, "size", ())))


def explanation(name: str, here: Mapping[str, Any], saved: Mapping[str, Any]) -> str:
    """What has changed most since the state of a parameter was saved, and what to do.

    Args:
        name: of the parameter.
        here: its state, by the names of the entries.
        saved: metadata of its state in the checkpoint; it does not fit.
    """
    return f"{_reason(name, here, saved)} {_HINT}"


def _reason(name: str, here: Mapping[str, Any], saved: Mapping[str, Any]) -> str:
    if not saved:
        return f"the checkpoint has no optimizer state for parameter '{name}'."
    if (MARKER in here) != (MARKER in saved):
        then, now = ("is", "is not") if MARKER in saved else ("is not", "is")
        return (
            f"parameter '{name}' {then} preconditioned in the checkpoint, but {now} here; see the "
            "settings 'exclude' ('default' knows embeddings by type) and 'precondition_1d'."
        )
    if MARKER in here and (before := shape_of(saved[MARKER])) != (after := shape_of(here[MARKER])):
        if len(before) != len(after):
            return (
                f"the factors of parameter '{name}' were saved by an earlier version, in a form "
                "that is not read any more."
            )
        rules = preconditioner_of(before), preconditioner_of(after)
        for setting, (was, is_now) in ((MARKER, (before[0], after[0])), ("preconditioner", rules)):
            if was != is_now:
                return f"setting '{setting}' is {was!r} in the checkpoint, but {is_now!r} here."
        return (
            f"parameter '{name}' is cut into other blocks in the checkpoint; see the settings "
            "'split_heads' with 'head_dim', 'large_dim', 'merge_dims' and 'block_alignment'."
        )
    entry = next(entry for entry, value in here.items() if not fits(value, saved.get(entry)))
    found = f"shape {shape_of(saved[entry])}" if entry in saved else "none"
    settings = "'grafting' and 'merge_dims'"
    if entry in factor_entries():
        settings = "'root_method', 'max_factor_ratio' and 'symmetric_packing'"
    return (
        f"'{entry}' of parameter '{name}' has {found} in the checkpoint, but shape "
        f"{shape_of(here[entry])} here; see the settings {settings}."
    )

"""Saying why the state of a checkpoint does not fit, in the words of the settings."""

from collections.abc import Iterator, Mapping
from typing import Any

from shampoo_fsdp.rules.layout import MARKER, factor_entries, preconditioner_of

__all__ = ["CheckpointMismatch", "explanation", "shape_of"]

_HINT = 'Set it as it was, or on_mismatch = "rebuild" to keep what fits and start the rest anew.'


class CheckpointMismatch(ValueError):
    """A checkpoint that does not fit what shall be loaded; says why and what to do."""


def explanation(name: str, here: Mapping[str, Any], saved: Mapping[str, Any]) -> str:
    """What has changed since the state of a parameter was saved, and what to do.

    Args:
        name: of the parameter.
        here: its state, by the names of the entries.
        saved: metadata of its state in the checkpoint; it does not fit.
    """
    return f"{next(_reasons(name, here, saved))} {_HINT}"


def _reasons(name: str, here: Mapping[str, Any], saved: Mapping[str, Any]) -> Iterator[str]:
    """The most telling one first."""
    if not saved:
        yield f"the checkpoint has no optimizer state for parameter '{name}'."
    if (MARKER in here) != (MARKER in saved):
        then, now = ("is", "is not") if MARKER in saved else ("is not", "is")
        yield (
            f"parameter '{name}' {then} preconditioned in the checkpoint, but {now} here; see the "
            "settings 'exclude' (whose 'default' knows embeddings by their type too, and did not "
            "always) and 'precondition_1d' (which counts a matrix of one row or column as one "
            "dimension)."
        )
    if MARKER in here and len(shape_of(saved[MARKER])) != len(shape_of(here[MARKER])):
        yield (
            f"the factors of parameter '{name}' were saved by an earlier version, in a form that "
            "is not read any more."
        )
    if MARKER in here and shape_of(saved[MARKER])[0] != shape_of(here[MARKER])[0]:
        yield (
            f"setting '{MARKER}' is {shape_of(saved[MARKER])[0]} in the checkpoint, but "
            f"{shape_of(here[MARKER])[0]} here."
        )
    if MARKER in here:
        then, now = (
            preconditioner_of(shape_of(saved[MARKER])),
            preconditioner_of(shape_of(here[MARKER])),
        )
        if then != now:
            yield f"setting 'preconditioner' is '{then}' in the checkpoint, but '{now}' here."
    if MARKER in here and shape_of(saved[MARKER]) != shape_of(here[MARKER]):
        yield (
            f"parameter '{name}' is cut into other blocks in the checkpoint; see the settings "
            "'split_heads' with 'head_dim', 'large_dim', 'merge_dims' and 'block_alignment' "
            "(batched_3d = false and merge_dims = 'none' have been removed)."
        )
    for entry, value in here.items():
        if entry not in saved:
            setting = "root_method" if entry in factor_entries() else "grafting"
            yield (
                f"the checkpoint has no '{entry}' for parameter '{name}', only "
                f"{', '.join(sorted(saved))}; see the setting '{setting}'."
            )
        elif shape_of(value) != shape_of(saved[entry]):
            setting = "merge_dims"
            if entry in factor_entries():
                setting = "max_factor_ratio' or 'symmetric_packing"
            yield (
                f"'{entry}' of parameter '{name}' has shape {shape_of(saved[entry])} in the "
                f"checkpoint, but {shape_of(value)} here; see the setting '{setting}'."
            )


def shape_of(value: Any) -> tuple[int, ...]:
    """The shape of a tensor or of its metadata; () for what is no tensor."""
    return tuple(getattr(value, "shape", getattr(value, "size", ())))

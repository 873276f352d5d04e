"""Looking into a checkpoint without the model: its blocks, and how their factors look.

Everything is read piece by piece, so that a checkpoint of any size fits into one process.
"""

import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shampoo_fsdp.blocks import BlockGrid, make_grid, proportionate_sides
from shampoo_fsdp.checkpoint_reader import CheckpointReader
from shampoo_fsdp.config import ShampooConfig
from shampoo_fsdp.load_decision import state_keys
from shampoo_fsdp.mismatch import FACTORS, name_some
from shampoo_fsdp.state import CAP
from shampoo_fsdp.state_layout import preconditioner_of

__all__ = ["Block", "Checkpoint", "Factor", "Parameter", "inspect_checkpoint"]

_RESOLUTION = torch.finfo(torch.float32).eps
_CURVE_POINTS = 65
_LAYER = re.compile(r"(?<![^.])\d+(?![^.])")
_TRAINING = re.compile(r"(?:.*\.)?train_state\.(\w+)")


@dataclass
class Factor:
    """One factor of a block, of n rows."""

    dimension: int
    n: int
    kind: str
    """"full", "packed" (kept as its upper triangle) or "diagonal"."""
    condition_number: float
    """The largest eigenvalue by the smallest, which counts as at least 2^-23 of the largest, as it
    does when roots are taken; NaN if all are zero or one is not finite."""
    effective_rank: float
    """exp of the entropy of the eigenvalues divided by their sum (Roy and Vetterli 2007): n if all
    are equal, 1 if all but one are zero; NaN as above."""
    vanishing: float
    """Share of the eigenvalues that are below 2^-23 of the largest."""
    spectrum: list[float] = field(repr=False)
    """The eigenvalues by the largest, descending, at evenly spaced places; [] for NaN."""


@dataclass
class Block:
    """One block of a parameter, in the parameter's view."""

    offsets: tuple[int, ...]
    shape: tuple[int, ...]
    factors: list[Factor]


@dataclass
class Parameter:
    """The state of one parameter."""

    name: str
    shape: tuple[int, ...]
    """Of its view."""
    step: int
    factor_step: int | None
    """Steps that its factors have seen; None if it has none."""
    settings: dict[str, Any]
    """Of its parameter group."""
    preconditioner: str
    """"" if it has none."""
    max_preconditioner_dim: int | None
    bytes: dict[str, int]
    """Sizes of "moments" and "factors" (with roots and eigenbases)."""
    nonfinite: dict[str, int]
    """How many numbers are NaN or infinite, by entry; of "weight", if it is in the checkpoint."""
    number_of_blocks: int
    blocks: list[Block]
    """Those that were looked at."""

    @property
    def kind(self) -> str:
        """The name without the number of its layer."""
        return _LAYER.sub("#", self.name)

    @property
    def layer(self) -> int | None:
        """The first number between dots in its name."""
        match = _LAYER.search(self.name)
        return int(match[0]) if match else None


@dataclass
class Checkpoint:
    """What a checkpoint holds."""

    folder: str
    optimizer: str
    """"Shampoo", or "another" if no parameter is preconditioned."""
    training: dict[str, Any]
    """How far the training is, as TorchTitan counts."""
    files: int
    bytes_on_disk: int
    parameters: list[Parameter] = field(default_factory=list)


def inspect_checkpoint(
    folder: Path, pattern: str = "", most_blocks: int | None = None
) -> tuple[Checkpoint, int, Iterator[Parameter]]:
    """The checkpoint without its parameters, how many of them there are, and one after the other.

    Args:
        folder: the checkpoint.
        pattern: regular expression; only parameters whose name contains a match.
        most_blocks: factors of so many blocks of each parameter are looked at, evenly spread.

    Raises:
        ValueError: says what is wrong with the folder or the pattern.
    """
    reader = CheckpointReader(folder)
    found = {key.partition("state.")[2]: keys for key, keys in state_keys(reader.metadata).items()}
    if not found:
        raise ValueError(f"{folder} has no optimizer state; was only the model saved?")
    try:
        chosen = sorted((name for name in found if re.search(pattern, name)), key=_natural)
    except re.error as error:
        raise ValueError(f"'{pattern}' is no regular expression: {error}.") from None
    if not chosen:
        raise ValueError(f"no name matches '{pattern}'; there are {name_some(list(found))}.")
    files = [path for path in folder.iterdir() if path.is_file()]
    training = {
        m[1]: reader.value(key) for key in reader.metadata if (m := _TRAINING.fullmatch(key))
    }
    checkpoint = Checkpoint(
        folder=str(folder),
        optimizer="Shampoo" if any(CAP in keys for keys in found.values()) else "another",
        training=training,
        files=len(files),
        bytes_on_disk=sum(path.stat().st_size for path in files),
    )
    settings = reader.settings()
    return (
        checkpoint,
        len(chosen),
        (_one(reader, n, found[n], settings.get(n, {}), most_blocks) for n in chosen),
    )


def _natural(name: str) -> list[tuple[int, str]]:
    """For sorting: layer 2 comes before layer 10."""
    parts = name.split(".")
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in parts]


def _one(reader: CheckpointReader, name: str, *others: Any) -> Parameter:
    try:
        return _parameter(reader, name, *others)
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError) as error:
        (line, *_) = str(error).splitlines() or [""]
        raise ValueError(
            f"the state of '{name}' is not of the form that Shampoo gives it "
            f"({type(error).__name__}: {line})."
        ) from None


def _parameter(
    reader: CheckpointReader,
    name: str,
    keys: Mapping[str, str],
    settings: dict[str, Any],
    most_blocks: int | None,
) -> Parameter:
    moments = [key for entry, key in keys.items() if not FACTORS.fullmatch(entry)]
    factors = [key for entry, key in keys.items() if FACTORS.fullmatch(entry)]
    checked = {entry: key for entry, key in keys.items() if entry != CAP}
    checked.update(("weight", key) for key in (f"model.{name}", name) if key in reader.metadata)
    blocks = _blocks(reader, keys) if CAP in keys else []
    looked_at = blocks
    if most_blocks is not None and most_blocks < len(blocks):
        looked_at = [blocks[i * len(blocks) // most_blocks] for i in range(most_blocks)]
    return Parameter(
        name=name,
        shape=reader.shape(keys["exp_avg"]) if "exp_avg" in keys else (),
        step=int(reader.value(keys["step"])) if "step" in keys else 0,
        factor_step=int(reader.value(keys["factor_step"])) if "factor_step" in keys else None,
        settings=settings,
        preconditioner=preconditioner_of(reader.shape(keys[CAP])) if CAP in keys else "",
        max_preconditioner_dim=reader.shape(keys[CAP])[0] if CAP in keys else None,
        bytes={
            "moments": sum(map(reader.size_in_bytes, moments)),
            "factors": sum(map(reader.size_in_bytes, factors)),
        },
        nonfinite={entry: n for entry, key in checked.items() if (n := reader.nonfinite(key))},
        number_of_blocks=len(blocks),
        blocks=[
            Block(offsets, shape, [_factor(reader, *where) for where in places])
            for offsets, shape, places in looked_at
        ],
    )


_Place = tuple[str, int, int, int, int, str]
"""Where a factor is: key, offset and length there; its dimension, its rows, its kind."""


def _blocks(
    reader: CheckpointReader, keys: Mapping[str, str]
) -> list[tuple[tuple[int, ...], tuple[int, ...], list[_Place]]]:
    """Offsets, shape and factors of each block, in the order of the grid."""
    grid = _grid(reader, keys)
    shapes = [grid.block_shape(coordinate) for coordinate in grid.coordinates()]
    places: list[list[_Place]] = [[] for _ in shapes]
    (cap, *_) = reader.shape(keys[CAP])
    # Rows of the blocks one after the other, in each the dimensions one after the other.
    for entry, smallest, largest in (("factors", 1, cap), ("diagonals", cap + 1, math.inf)):
        if entry not in keys:
            continue
        sides = [[(i, n) for i, n in enumerate(s) if smallest <= n <= largest] for s in shapes]
        (total,), start = reader.shape(keys[entry]), 0
        kind = "diagonal"
        if entry == "factors":
            sides, kind = _sides_with_factor(shapes, sides, total)
        for place, block in zip(places, sides, strict=True):
            for i, n in block:
                length = {"full": n * n, "packed": n * (n + 1) // 2, "diagonal": n}[kind]
                place.append((keys[entry], start, length, i, n, kind))
                start += length
    offsets = [tuple(start for start, _ in grid.rectangle(c)) for c in grid.coordinates()]
    return list(zip(offsets, shapes, places, strict=True))


def _sides_with_factor(
    shapes: Sequence[tuple[int, ...]], sides: list[list[tuple[int, int]]], total: int
) -> tuple[list[list[tuple[int, int]]], str]:
    """Those of the sides that have a matrix, and how it is kept: by the total of their elements,
    as the checkpoint does not say its `max_factor_ratio`."""
    ratios = {n * n / math.prod(shape) for shape in shapes for n in shape}
    for ratio in sorted(ratios, reverse=True):
        kept = []
        for shape, block in zip(shapes, sides, strict=True):
            within = proportionate_sides(shape, ratio)
            kept.append([(i, n) for i, n in block if n in within])
        lengths = [n for block in kept for _, n in block]
        if sum(n * n for n in lengths) == total:
            return kept, "full"
        if sum(n * (n + 1) // 2 for n in lengths) == total:
            return kept, "packed"
    raise ValueError(f"no choice of factors has the {total:,} elements that the checkpoint has.")


def _grid(reader: CheckpointReader, keys: Mapping[str, str]) -> BlockGrid:
    """The grid that has the fingerprint in the checkpoint: that of the pieces in which it was
    saved, or, if one process has saved it whole, one of those that the settings give."""
    view, (cap, fingerprint, *_) = reader.shape(keys["exp_avg"]), reader.shape(keys[CAP])
    if not math.prod(view):
        raise ValueError(f"'{keys['exp_avg']}' is empty.")
    pieces = reader.pieces(keys["exp_avg"])
    cuts = tuple(
        tuple(sorted({0} | {offsets[d] + sizes[d] for offsets, sizes in pieces}))
        for d in range(len(view))
    )
    guesses = [BlockGrid(view, batch_dims, cuts) for batch_dims in (0, 1)]
    for large_dim, batched in itertools.product(("block", "one_sided", "diagonal"), (True, False)):
        config = ShampooConfig(
            max_preconditioner_dim=cap,
            large_dim=large_dim,  # type: ignore[arg-type]
            batched_3d=batched,
            merge_dims="none",
        )
        guesses.append(make_grid(view, config))
    for grid in guesses:
        if grid.fingerprint == fingerprint:
            return grid
    raise ValueError(f"the blocks of '{keys['exp_avg']}' are cut in a way that is not known here.")


def _factor(
    reader: CheckpointReader, key: str, start: int, length: int, dimension: int, n: int, kind: str
) -> Factor:
    values = reader.part(key, (start,), (length,)).double()
    spectrum = _eigenvalues(values, n, kind)
    if spectrum is None:
        return Factor(dimension, n, kind, math.nan, math.nan, math.nan, [])
    relative = spectrum / spectrum[0]
    shares = spectrum / spectrum.sum()
    entropy = -torch.special.xlogy(shares, shares).sum()
    places = torch.linspace(0, n - 1, _CURVE_POINTS).round().long()
    return Factor(
        dimension=dimension,
        n=n,
        kind=kind,
        condition_number=1.0 / max(relative[-1].item(), _RESOLUTION),
        effective_rank=entropy.exp().item(),
        vanishing=(relative < _RESOLUTION).double().mean().item(),
        spectrum=relative[places].tolist(),
    )


def _eigenvalues(values: Tensor, n: int, kind: str) -> Tensor | None:
    """Descending and at least zero; None if there is none above zero or one is not finite."""
    if not values.isfinite().all():
        return None
    if kind == "packed":
        matrix = torch.zeros(n, n, dtype=values.dtype)
        rows, columns = torch.triu_indices(n, n)
        matrix[rows, columns] = matrix[columns, rows] = values
        values = matrix
    if kind != "diagonal":
        values = torch.linalg.eigvalsh(values.view(n, n))
    values = values.clamp(min=0.0).sort(descending=True).values
    return values if values[0] > 0.0 else None

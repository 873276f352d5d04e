"""Looking into a checkpoint without the model: its blocks, and how their factors look.

Everything is read piece by piece, so that a checkpoint of any size fits into one process.
"""

import itertools
import math
import re
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shampoo_fsdp.checkpoint.fits import state_keys
from shampoo_fsdp.config import ShampooConfig
from shampoo_fsdp.plan.grid import BlockGrid, cut_view
from shampoo_fsdp.rules.factors import factor_kinds
from shampoo_fsdp.rules.kept import CAP, factor_entries, preconditioner_of
from shampoo_fsdp.tools.reader import CheckpointReader
from shampoo_fsdp.tools.spectra import Factor, elements_of, factor_in
from shampoo_fsdp.validation import name_some

__all__ = ["Block", "Checkpoint", "Parameter", "inspect_checkpoint"]

_LAYER = re.compile(r"(?<![^.])\d+(?![^.])")
_TRAINING = re.compile(r"(?:.*\.)?train_state\.(\w+)")
_ENTRIES = {"full": "factors", "packed": "factors", "diagonal": "diagonals"}
"""Where factors of a kind are kept."""


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
    parameters: list[Parameter]


def inspect_checkpoint(
    folder: Path,
    pattern: str = "",
    most_blocks: int | None = None,
    watched: Callable[[Sequence[str]], Iterable[str]] = iter,
) -> Checkpoint:
    """Read a checkpoint.

    Args:
        folder: the checkpoint.
        pattern: regular expression; only parameters whose name contains a match.
        most_blocks: factors of so many blocks of each parameter are looked at, evenly spread.
        watched: is given the names of the parameters, and goes through them while each is read.

    Raises:
        ValueError: says what is wrong with the folder, the pattern or the state of a parameter.
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
    settings = reader.settings()
    parameters = []
    for name in watched(chosen):
        try:
            parameters.append(
                _parameter(reader, name, found[name], settings.get(name, {}), most_blocks)
            )
        except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError) as error:
            (line, *_) = str(error).splitlines() or [""]
            raise ValueError(
                f"the state of '{name}' is not of the form that Shampoo gives it "
                f"({type(error).__name__}: {line})."
            ) from None
    return Checkpoint(
        folder=str(folder),
        optimizer="Shampoo" if any(CAP in keys for keys in found.values()) else "another",
        training=training,
        files=len(files),
        bytes_on_disk=sum(path.stat().st_size for path in files),
        parameters=parameters,
    )


def _natural(name: str) -> list[tuple[int, str]]:
    """For sorting: layer 2 comes before layer 10."""
    parts = name.split(".")
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in parts]


def _parameter(
    reader: CheckpointReader,
    name: str,
    keys: Mapping[str, str],
    settings: dict[str, Any],
    most_blocks: int | None,
) -> Parameter:
    sizes = {"moments": 0, "factors": 0}
    for entry, key in keys.items():
        sizes["factors" if entry in factor_entries() else "moments"] += reader.size_in_bytes(key)
    checked = {entry: key for entry, key in keys.items() if entry != CAP}
    checked.update(("weight", key) for key in (f"model.{name}", name) if key in reader.metadata)
    marker = reader.shape(keys[CAP]) if CAP in keys else ()
    blocks = _blocks(reader, keys) if marker else []
    looked_at = blocks
    if most_blocks is not None and most_blocks < len(blocks):
        looked_at = [blocks[i * len(blocks) // most_blocks] for i in range(most_blocks)]
    return Parameter(
        name=name,
        shape=reader.shape(keys["exp_avg"]) if "exp_avg" in keys else (),
        step=int(reader.value(keys["step"])) if "step" in keys else 0,
        factor_step=int(reader.value(keys["factor_step"])) if "factor_step" in keys else None,
        settings=settings,
        preconditioner=preconditioner_of(marker),
        max_preconditioner_dim=marker[0] if marker else None,
        bytes=sizes,
        nonfinite={entry: n for entry, key in checked.items() if (n := reader.nonfinite(key))},
        number_of_blocks=len(blocks),
        blocks=[
            Block(offsets, shape, [factor_in(reader, *place) for place in places])
            for offsets, shape, places in looked_at
        ],
    )


def _blocks(
    reader: CheckpointReader, keys: Mapping[str, str]
) -> list[tuple[tuple[int, ...], tuple[int, ...], list[tuple[str, int, int, int, str]]]]:
    """Offsets and shape of each block, in the order of the grid, and where its factors are: key,
    start, dimension, rows and kind."""
    grid = _grid(reader, keys)
    sides = _sides_with_factor(reader, keys, grid)
    start = dict.fromkeys(_ENTRIES.values(), 0)
    blocks = []
    # In each entry block after block, in each block dimension after dimension.
    for coordinate in grid.coordinates():
        shape = grid.block_shape(coordinate)
        offsets = tuple(first for first, _ in grid.rectangle(coordinate))
        places = []
        for dimension, n, kind in sides[shape]:
            entry = _ENTRIES[kind]
            places.append((keys[entry], start[entry], dimension, n, kind))
            start[entry] += elements_of(n, kind)
        blocks.append((offsets, shape, places))
    return blocks


def _sides_with_factor(
    reader: CheckpointReader, keys: Mapping[str, str], grid: BlockGrid
) -> dict[tuple[int, ...], list[tuple[int, int, str]]]:
    """For each shape of block the dimension, rows and kind of its factors, matrices first: by the
    total of their elements, as the checkpoint does not say its `max_factor_ratio`."""
    shapes, cap = grid.block_shapes, reader.shape(keys[CAP])[0]
    total = math.prod(reader.shape(keys["factors"])) if "factors" in keys else 0
    ratios = sorted({n * n / math.prod(shape) for shape in shapes for n in shape}, reverse=True)
    for ratio, matrix in itertools.product(ratios, ("full", "packed")):
        config = ShampooConfig(
            max_preconditioner_dim=cap, large_dim="diagonal", max_factor_ratio=ratio
        )
        sides = {}
        for shape in shapes:
            kinds = [matrix if kind == "full" else kind for kind in factor_kinds(shape, config)]
            kept = [
                (d, n, kind)
                for d, (n, kind) in enumerate(zip(shape, kinds))
                if _ENTRIES.get(kind) in keys
            ]
            sides[shape] = sorted(kept, key=lambda side: side[2] == "diagonal")
        elements = sum(
            number * elements_of(n, kind)
            for shape, number in shapes.items()
            for _, n, kind in sides[shape]
            if kind == matrix
        )
        if elements == total:
            return sides
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
    for large_dim in typing.get_args(typing.get_type_hints(ShampooConfig)["large_dim"]):
        config = ShampooConfig(max_preconditioner_dim=cap, large_dim=large_dim)
        guesses += [cut_view(view, batch_dims, config) for batch_dims in (0, 1)]
    for grid in guesses:
        if grid.fingerprint == fingerprint:
            return grid
    raise ValueError(f"the blocks of '{keys['exp_avg']}' are cut in a way that is not known here.")

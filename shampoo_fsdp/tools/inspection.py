"""Looking into a checkpoint without the model: its blocks, and how their factors look.

Everything is read piece by piece, so that a checkpoint of any size fits into one process.
"""

import dataclasses
import itertools
import math
import re
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from shampoo_fsdp.checkpoint.fits import state_keys
from shampoo_fsdp.config import RULES, ShampooConfig
from shampoo_fsdp.plan.grid import BlockGrid, cut_view
from shampoo_fsdp.rules.layout import MARKER, factor_entries, preconditioner_of
from shampoo_fsdp.rules.matrices import FactorKind, factor_kinds
from shampoo_fsdp.tools.reader import CheckpointReader
from shampoo_fsdp.tools.spectra import elements_of, factor_in
from shampoo_fsdp.validation import name_some

# What a checkpoint may claim, as each block is looked at.
_FEW_BLOCKS, _LEAST_BYTES, _MOST_SHAPES = 1_000, 32, 100
_TRAINING = re.compile(r"(?:.*\.)?train_state\.(\w+)")


def inspect_checkpoint(
    folder: Path,
    pattern: str = "",
    most_blocks: int | None = None,
    watched: Callable[[Sequence[str]], Iterable[str]] = iter,
) -> dict[str, Any]:
    """Read a checkpoint.

    "optimizer" is "Shampoo", or "another" if no parameter is preconditioned; "training" says how
    far the training is, as TorchTitan counts. Of each of the "parameters": "shape" is that of its
    view; "factor_step" the steps that its factors have seen; "settings" those of its group; "bytes"
    the sizes of "moments" and "factors" (with roots and eigenbases); "nonfinite" how many numbers
    are NaN or infinite, by entry (of "weight", if it is in the checkpoint); "blocks" are those that
    were looked at, each with its "factors" (see :func:`shampoo_fsdp.tools.spectra.factor_in`). What
    a parameter does not have is None, "" or empty.

    Args:
        folder: the checkpoint.
        pattern: regular expression; only parameters whose name contains a match.
        most_blocks: factors of so many blocks of each parameter are looked at, evenly spread.
        watched: is given the names of the parameters, and goes through them while each is read.

    Returns:
        plain dicts, lists, strings and numbers.

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
            group = settings.get(name, {})
            parameters.append(_parameter(reader, name, found[name], group, most_blocks))
        except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError) as error:
            (line, *_) = str(error).splitlines() or [""]
            raise ValueError(
                f"the state of '{name}' is not of the form that Shampoo gives it "
                f"({type(error).__name__}: {line})."
            ) from None
    return {
        "folder": str(folder),
        "optimizer": "Shampoo" if any(MARKER in keys for keys in found.values()) else "another",
        "training": training,
        "files": len(files),
        "bytes_on_disk": sum(path.stat().st_size for path in files),
        "parameters": parameters,
    }


def _natural(name: str) -> list[tuple[int, str]]:
    """A key to sort names by: layer 2 comes before layer 10."""
    parts = name.split(".")
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in parts]


def _parameter(
    reader: CheckpointReader,
    name: str,
    keys: Mapping[str, str],
    settings: dict[str, Any],
    most_blocks: int | None,
) -> dict[str, Any]:
    checked = {entry: key for entry, key in keys.items() if entry != MARKER}
    checked.update(("weight", key) for key in (f"model.{name}", name) if key in reader.metadata)
    marker = reader.shape(keys[MARKER]) if MARKER in keys else ()
    of_factors = factor_entries()
    preconditioner, number_of_blocks, blocks = preconditioner_of(marker), 0, list[dict[str, Any]]()
    if marker:
        resolution = getattr(RULES.get(preconditioner), "resolution", 0.0)
        number_of_blocks, blocks = _blocks(reader, keys, most_blocks, resolution)
    return {
        "name": name,
        "shape": reader.shape(keys["exp_avg"]) if "exp_avg" in keys else (),
        "step": int(reader.value(keys["step"])) if "step" in keys else 0,
        "factor_step": int(reader.value(keys["factor_step"])) if "factor_step" in keys else None,
        "settings": settings,
        "preconditioner": preconditioner,
        "max_preconditioner_dim": marker[0] if marker else None,
        "bytes": {
            name: sum(reader.size_in_bytes(k) for e, k in keys.items() if (e in of_factors) == of)
            for name, of in (("moments", False), ("factors", True))
        },
        "nonfinite": {entry: n for entry, key in checked.items() if (n := reader.nonfinite(key))},
        "number_of_blocks": number_of_blocks,
        "blocks": blocks,
    }


def _blocks(
    reader: CheckpointReader, keys: Mapping[str, str], most_blocks: int | None, resolution: float
) -> tuple[int, list[dict[str, Any]]]:
    """How many there are, and those that are looked at, in the order of the grid; `resolution` is
    that of the rule."""
    grid = _grid(reader, keys)
    room = sum(reader.size_in_bytes(key) for key in keys.values() if reader.is_tensor(key))
    if len(grid) > _FEW_BLOCKS + room // _LEAST_BYTES or len(grid.block_shapes) > _MOST_SHAPES:
        raise ValueError(
            f"'{keys['exp_avg']}' is said to be cut into {len(grid):,} blocks, more than its state "
            "has room for, or of more shapes than settings can give."
        )
    places = list(grid.coordinates())
    shapes = [grid.block_shape(place) for place in places]
    kinds, matrix = _kinds(reader, keys, shapes)
    count = min(most_blocks or len(places), len(places))
    chosen = {i * len(places) // count: list[dict[str, Any]]() for i in range(count)}
    # Rows of the blocks one after the other, in each the dimensions one after the other.
    for entry, kind, kept in (("factors", "full", matrix), ("diagonals", "diagonal", "diagonal")):
        start = 0
        for position, shape in enumerate(shapes):
            for dimension, n in enumerate(shape):
                if entry not in keys or kinds[shape][dimension] != kind:
                    continue
                if position in chosen:
                    where = reader, keys[entry], start
                    chosen[position].append(factor_in(*where, dimension, n, kept, resolution))
                start += elements_of(n, kept)
    return len(places), [
        {
            "offsets": [start for start, _ in grid.rectangle(places[position])],
            "shape": shapes[position],
            "factors": factors,
        }
        for position, factors in chosen.items()
    ]


def _kinds(
    reader: CheckpointReader, keys: Mapping[str, str], shapes: Sequence[tuple[int, ...]]
) -> tuple[dict[tuple[int, ...], tuple[FactorKind, ...]], str]:
    """The kind of factor of each dimension, for each shape of block, and how matrices are kept:
    by the total of their elements, as the checkpoint does not say its `max_factor_ratio`."""
    (cap, *_) = reader.shape(keys[MARKER])
    total = math.prod(reader.shape(keys["factors"])) if "factors" in keys else None
    ratios = {n * n / math.prod(shape) for shape in shapes for n in shape}
    base = ShampooConfig(max_preconditioner_dim=cap, large_dim="diagonal")
    for ratio in sorted(ratios, reverse=True):
        config = dataclasses.replace(base, max_factor_ratio=ratio)
        kinds = {shape: factor_kinds(shape, config) for shape in set(shapes)}
        sides = [side for shape in shapes for side in zip(shape, kinds[shape], strict=True)]
        for matrix in ("full", "packed"):
            elements = sum(elements_of(n, matrix) for n, kind in sides if kind == "full")
            if total in (None, elements):
                return kinds, matrix
    raise ValueError(f"no choice of factors has the {total:,} elements that the checkpoint has.")


def _grid(reader: CheckpointReader, keys: Mapping[str, str]) -> BlockGrid:
    """The grid that has the fingerprint in the checkpoint: that of the pieces in which it was
    saved, or, if one process has saved it whole, one of those that the settings give."""
    view, (cap, fingerprint, *_) = reader.shape(keys["exp_avg"]), reader.shape(keys[MARKER])
    if not math.prod(view):
        raise ValueError(f"'{keys['exp_avg']}' is empty.")
    ends = reader.rectangles(keys["exp_avg"]).sum(1).T.tolist()
    cuts = tuple(tuple(sorted({0, *along})) for along in ends)
    guesses = (BlockGrid(view, batch_dims, cuts) for batch_dims in (0, 1))
    for grid in itertools.chain(guesses, _grids(view, cap)):
        if grid.fingerprint == fingerprint:
            return grid
    raise ValueError(f"the blocks of '{keys['exp_avg']}' are cut in a way that is not known here.")


def _grids(view: tuple[int, ...], cap: int) -> Iterator[BlockGrid]:
    """Those that the settings give; those between heads of any size last, which take longer."""
    choices = typing.get_args(typing.get_type_hints(ShampooConfig)["large_dim"])
    configs = [ShampooConfig(max_preconditioner_dim=cap, large_dim=choice) for choice in choices]
    kinds = list(itertools.product(range(min(2, len(view))), configs))
    for batch_dims, config in kinds:
        yield cut_view(view, batch_dims, config)
    for batch_dims, config in kinds:
        rows = view[batch_dims]
        small = [n for n in range(1, math.isqrt(rows) + 1) if rows % n == 0]
        for head in sorted({*small, *(rows // n for n in small)} - {rows}):
            yield cut_view(view, batch_dims, config, head=head)

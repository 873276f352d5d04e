"""Looking into a checkpoint without the model: its blocks, and how their factors look.

One entry of one parameter is read at a time, so that a checkpoint of any size fits into a process.
"""

import dataclasses
import itertools
import math
import re
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shampoo_fsdp.checkpoint.fits import state_keys
from shampoo_fsdp.config import RULES, ShampooConfig
from shampoo_fsdp.plan.grid import BlockGrid, cut_view
from shampoo_fsdp.rules.layout import MARKER, factor_entries, preconditioner_of
from shampoo_fsdp.rules.matrices import (
    FactorKind,
    condition_number,
    factor_kinds,
    resolution_of,
    unpacked,
)
from shampoo_fsdp.tools.reader import CheckpointReader
from shampoo_fsdp.validation import name_some

_CURVE_POINTS = 65
_TRAINING = re.compile(r"(?:.*\.)?train_state\.(\w+)")


def inspect_checkpoint(
    folder: Path,
    pattern: str = "",
    most_blocks: int | None = None,
) -> dict[str, Any]:
    """Read a checkpoint.

    "optimizer" is "Shampoo", or "another" if no parameter is preconditioned; "training" says how
    far the training is, as TorchTitan counts. Of each of the "parameters": "shape" is that of its
    view; "factor_step" the steps that its factors have seen; "settings" those of its group; "bytes"
    the sizes of "moments" and "factors" (with roots and eigenbases); "nonfinite" how many numbers
    are NaN or infinite, by entry (of "weight", if it is in the checkpoint); "blocks" are those that
    were looked at, each with its "factors" (see :func:`_factor`). What
    a parameter does not have is None, "" or empty.

    Args:
        folder: the checkpoint.
        pattern: regular expression; only parameters whose name contains a match.
        most_blocks: factors of so many blocks of each parameter are looked at, evenly spread.

    Returns:
        plain dicts, lists, strings and numbers.

    Raises:
        ValueError: says what is wrong with the folder, the pattern or the state of a parameter.
    """
    reader, found = _opened(folder)
    try:
        chosen = sorted((name for name in found if re.search(pattern, name)), key=_natural)
    except re.error as error:
        raise ValueError(f"'{pattern}' is no regular expression: {error}.") from None
    if not chosen:
        raise ValueError(f"no name matches '{pattern}'; there are {name_some(list(found))}.")
    files = [path.stat().st_size for path in folder.iterdir() if path.is_file()]
    counts = filter(None, map(_TRAINING.fullmatch, reader.metadata))
    settings, parameters = reader.settings(), []
    for name in chosen:
        try:
            of_group = {"name": name, "settings": settings.get(name, {})}
            parameters.append(of_group | _parameter(reader, name, found[name], most_blocks))
        except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError) as error:
            (line, *_) = str(error).splitlines() or [""]
            raise ValueError(
                f"the state of '{name}' is not of the form that Shampoo gives it "
                f"({type(error).__name__}: {line})."
            ) from None
    return {
        "folder": str(folder),
        "optimizer": "Shampoo" if any(MARKER in keys for keys in found.values()) else "another",
        "training": {count[1]: reader.value(count[0]) for count in counts},
        "files": len(files),
        "bytes_on_disk": sum(files),
        "parameters": parameters,
    }


def differences(old: Path, new: Path, names: Sequence[str]) -> dict[str, dict[str, float]]:
    """How far entries have moved from one checkpoint to another: the norm of their difference by
    that of the old values, by parameter and entry ("weight" is the parameter itself); of entries
    that both have in one shape.

    Raises:
        ValueError: as :func:`inspect_checkpoint`.
    """
    (one, first), (other, second) = _opened(old), _opened(new)
    result = {}
    for name in names:
        before, after = _tensors(one, name, first[name]), _tensors(other, name, second[name])
        moved = {}
        for entry in sorted(before.keys() & after.keys() - {"step", "factor_step", "refreshed"}):
            shape = one.shape(before[entry])
            if shape == other.shape(after[entry]) and 0 not in shape:
                values = one.tensor(before[entry]).double()
                norm = values.norm().item()
                change = (other.tensor(after[entry]).double() - values).norm().item()
                moved[entry] = change / norm if norm else math.inf
        result[name] = moved
    return result


def _opened(folder: Path) -> tuple[CheckpointReader, dict[str, Mapping[str, str]]]:
    """A checkpoint, and the keys of each parameter's entries."""
    reader, found = CheckpointReader(folder), dict[str, Mapping[str, str]]()
    for key, keys in state_keys(reader.metadata).items():
        found[key.partition("state.")[2]] = keys
    if not found:
        raise ValueError(f"{folder} has no optimizer state; was only the model saved?")
    return reader, found


def _tensors(reader: CheckpointReader, name: str, keys: Mapping[str, str]) -> dict[str, str]:
    """The keys of what has values of a parameter, itself included."""
    tensors = {entry: key for entry, key in keys.items() if entry != MARKER}
    tensors.update(("weight", key) for key in (f"model.{name}", name) if key in reader.metadata)
    return tensors


def _natural(name: str) -> list[tuple[int, str]]:
    """A key to sort names by: layer 2 comes before layer 10."""
    parts = name.split(".")
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in parts]


def _parameter(
    reader: CheckpointReader, name: str, keys: Mapping[str, str], most_blocks: int | None
) -> dict[str, Any]:
    tensors = _tensors(reader, name, keys)
    marker, view = (reader.shape(keys[e]) if e in keys else () for e in (MARKER, "exp_avg"))
    grid = _grid(reader, keys["exp_avg"], marker) if marker else None
    places = list(grid.coordinates()) if grid else []
    count = min(most_blocks or len(places), len(places))
    blocks = {
        i * len(places) // count: {
            "offsets": [start for start, _ in grid.rectangle(place)],
            "shape": grid.block_shape(place),
            "factors": list[dict[str, Any]](),
        }
        for i in range(count)
        for place in [places[i * len(places) // count]]
        if grid
    }
    nonfinite, of_factors = {}, factor_entries()
    for entry, key in tensors.items():  # each is read once
        values = reader.tensor(key)
        if number := values.numel() - int(values.isfinite().sum()):
            nonfinite[entry] = number
        if grid and entry in ("factors", "diagonals"):
            _add_factors(blocks, entry, values, list(map(grid.block_shape, places)), marker)
    sizes = {"moments": 0, "factors": 0}
    for entry, key in keys.items():
        sizes["factors" if entry in of_factors else "moments"] += reader.size_in_bytes(key)
    return {
        "shape": view,
        "step": int(reader.value(keys["step"])) if "step" in keys else 0,
        "factor_step": int(reader.value(keys["factor_step"])) if "factor_step" in keys else None,
        "preconditioner": preconditioner_of(marker),
        "max_preconditioner_dim": marker[0] if marker else None,
        "bytes": sizes,
        "nonfinite": nonfinite,
        "number_of_blocks": len(places),
        "blocks": list(blocks.values()),
    }


def _add_factors(
    blocks: Mapping[int, dict[str, Any]],
    entry: str,
    values: Tensor,
    shapes: Sequence[tuple[int, ...]],
    marker: Sequence[int],
) -> None:
    """Add what is in an entry, in which the blocks lie one after the other, in each the dimensions
    one after the other, to the blocks that are looked at."""
    kinds, matrix = _kinds(shapes, marker[0], values.numel() if entry == "factors" else None)
    kind, kept = ("full", matrix) if entry == "factors" else ("diagonal", "diagonal")
    resolution = getattr(RULES.get(preconditioner_of(marker)), "resolution", 0.0)
    start = 0
    for position, shape in enumerate(shapes):
        for dimension, n in enumerate(shape):
            if kinds[shape][dimension] != kind:
                continue
            stop = start + _elements_of(n, kept)
            if position in blocks:
                spectrum = _factor(values[start:stop], n, kept, resolution)
                of_all = {"dimension": dimension, "n": n, "kind": kept}
                blocks[position]["factors"].append(of_all | spectrum)
            start = stop


def _kinds(
    shapes: Sequence[tuple[int, ...]], cap: int, total: int | None
) -> tuple[dict[tuple[int, ...], tuple[FactorKind, ...]], str]:
    """The kind of factor of each dimension, for each shape of block, and how matrices are kept:
    by the total of their elements, as the checkpoint does not say its `max_factor_ratio`."""
    ratios = {n * n / math.prod(shape) for shape in set(shapes) for n in shape}
    base = ShampooConfig(max_preconditioner_dim=cap, large_dim="diagonal")
    for ratio in sorted(ratios, reverse=True):
        config = dataclasses.replace(base, max_factor_ratio=ratio)
        kinds = {shape: factor_kinds(shape, config) for shape in set(shapes)}
        sides = [side for shape in shapes for side in zip(shape, kinds[shape], strict=True)]
        for matrix in ("full", "packed"):
            elements = sum(_elements_of(n, matrix) for n, kind in sides if kind == "full")
            if total in (None, elements):
                return kinds, matrix
    raise ValueError(f"no choice of factors has the {total:,} elements that the checkpoint has.")


def _grid(reader: CheckpointReader, key: str, marker: Sequence[int]) -> BlockGrid:
    """The grid that has the fingerprint in the checkpoint: that of the pieces in which it was
    saved, or, if one process has saved it whole, one of those that the settings give."""
    view, (cap, fingerprint, *_) = reader.shape(key), marker
    if not math.prod(view):
        raise ValueError(f"'{key}' is empty.")
    chunks = reader.metadata[key].chunks
    ends = zip(*(map(sum, zip(c.offsets, c.sizes, strict=True)) for c in chunks), strict=True)
    cuts = tuple(tuple(sorted({0, *along})) for along in ends)
    guesses = (BlockGrid(view, batch_dims, cuts) for batch_dims in (0, 1))
    for grid in itertools.chain(guesses, _grids(view, cap)):
        if grid.fingerprint == fingerprint:
            return grid
    raise ValueError(f"the blocks of '{key}' are cut in a way that is not known here.")


def _grids(view: tuple[int, ...], cap: int) -> Iterator[BlockGrid]:
    """Those that the settings give; those between heads of any size last, which take longer."""
    choices = typing.get_args(typing.get_type_hints(ShampooConfig)["large_dim"])
    configs = [ShampooConfig(max_preconditioner_dim=cap, large_dim=choice) for choice in choices]
    kinds = list(itertools.product(range(min(2, len(view))), configs))
    for batch_dims, config in kinds:
        yield cut_view(view, batch_dims, config)
    for batch_dims, config in kinds:
        rows = view[batch_dims]
        for head in (n for n in range(1, rows) if rows % n == 0):
            yield cut_view(view, batch_dims, config, head=head)


def _factor(values: Tensor, n: int, kind: str, resolution: float) -> dict[str, Any]:
    """What the eigenvalues of a factor of n rows say; all None if they are zero or not finite.

    "condition_number" see :func:`shampoo_fsdp.rules.matrices.condition_number`; "effective_rank"
    exp of the entropy of the eigenvalues divided by their sum (Roy and Vetterli 2007), n if all are
    equal, 1 if all but one are zero; "vanishing" the share of the eigenvalues that are below the
    rule's resolution of the largest, as which roots count them; "spectrum" the eigenvalues by the
    largest, descending, at evenly spaced places.
    """
    resolution = max(resolution, resolution_of(values.dtype))
    values = values.double()
    finite = bool(values.isfinite().all())
    if finite:
        if kind == "packed":
            values = unpacked(values.unsqueeze(0), n)
        if kind != "diagonal":
            values = torch.linalg.eigvalsh(values.view(n, n))
        values = values.clamp(min=0.0).sort(descending=True).values
    if not finite or values[0] == 0.0:
        names = ("condition_number", "effective_rank", "vanishing", "spectrum")
        return dict.fromkeys(names)
    relative, shares = values / values[0], values / values.sum()
    entropy = -torch.special.xlogy(shares, shares).sum()
    places = torch.linspace(0, n - 1, _CURVE_POINTS).round().long()
    return {
        "condition_number": condition_number(values[0], values[-1], resolution).item(),
        "effective_rank": entropy.exp().item(),
        "vanishing": (relative < resolution).double().mean().item(),
        "spectrum": relative[places].tolist(),
    }


def _elements_of(n: int, kind: str) -> int:
    """How many numbers are kept of a factor."""
    return {"full": n * n, "packed": n * (n + 1) // 2, "diagonal": n}[kind]

"""What `python -m shampoo_fsdp inspect` shows of a checkpoint, or of two."""

import statistics
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from shampoo_fsdp.tools import page
from shampoo_fsdp.tools.tables import (
    Part,
    Table,
    by_size,
    print_parts,
    times,
    without_numbers,
)

_HEADS = (
    "parameter", "shape", "step", "blocks", "condition number", "effective rank", "vanishing",
    "state",
)  # fmt: skip

_MANY = 0.5
"""So much of a factor's eigenvalues may vanish without a remark."""

_Checkpoint = Mapping[str, Any]


def print_report(checkpoints: Sequence[_Checkpoint], console: Console) -> None:
    """Tables for people.

    Args:
        checkpoints: one or two, see :func:`shampoo_fsdp.tools.inspection.inspect_checkpoint`; the
            second one with what "moved" since the first.
    """
    print_parts(_parts(checkpoints, on_page=False), console)


def write_report(path: Path, checkpoints: Sequence[_Checkpoint]) -> None:
    """The same as a page, with pictures.

    Raises:
        ValueError: the file cannot be written.
    """
    pictures = []
    for checkpoint in checkpoints:
        if spectra := _spectra(checkpoint["parameters"]):
            drawn = page.curves(spectra, "place among the eigenvalues", "eigenvalue by the largest")
            pictures.append(f"<h2>Spectra of factors at step {_step(checkpoint)}</h2>{drawn}")
    title = " and ".join(Path(checkpoint["folder"]).name for checkpoint in checkpoints)
    page.write_report(path, f"Checkpoint {title}", _parts(checkpoints, on_page=True), pictures)


def verdict_of(parameter: Mapping[str, Any]) -> str:
    """How a parameter's state looks, in a few words; they begin with "healthy" if it is so."""
    if bad := parameter["nonfinite"].items():
        return "NaN or infinite: " + ", ".join(f"{number:,} in {entry}" for entry, number in bad)
    factors = [factor for block in parameter["blocks"] for factor in block["factors"]]
    if parameter["factor_step"] == 0:
        return "cold: its factors have seen no gradient"
    if empty := sum(factor["spectrum"] is None for factor in factors):
        return f"idle: {empty:,} of {len(factors):,} factors are zero"
    vanishing = max((factor["vanishing"] for factor in factors), default=0.0)
    if vanishing > _MANY:
        return f"low rank: {vanishing:.0%} of the eigenvalues of a factor vanish"
    return "healthy" if factors else "healthy (not preconditioned)"


def _parts(checkpoints: Sequence[_Checkpoint], *, on_page: bool) -> Iterator[Part]:
    """What is said; a page has room for the verdict of each parameter."""
    for checkpoint in checkpoints:
        yield from _head(checkpoint)
    if len(checkpoints) == 2:
        yield from _changes(*checkpoints)
    last = checkpoints[-1]["parameters"]
    verdicts = {p["name"]: verdict_of(p) for p in last}
    ill = {name: said for name, said in verdicts.items() if not said.startswith("healthy")}
    yield f"Health: {len(last) - len(ill):,} of {len(last):,} parameters are healthy."
    yield from (f"{name}: {said}" for name, said in ill.items())
    groups = Counter(", ".join(_settings(p)) for p in last)
    rows = [(of or "(none are saved)", f"{number:,}") for of, number in groups.items()]
    yield Table("Settings of parameter groups", ("settings", "parameters"), rows)
    heads: tuple[str, ...] = _HEADS
    figures = [_figures(p) for p in last]
    if on_page:
        heads = (heads[0], "verdict", *heads[1:])
        figures = [(of[0], verdicts[of[0]], *of[1:]) for of in figures]
        figures.sort(key=lambda of: of[0] not in ill)
    yield Table("Parameters", heads, figures)
    yield (
        "Vanishing: eigenvalues below the floor of the roots, 2^-23 of the largest (1e-5 with "
        "kl_shampoo, 2^-12 for factors in bf16). Condition number: largest eigenvalue by smallest, "
        "which counts as at least the floor. Effective rank: exp of the entropy of the "
        "eigenvalues, by n. Medians over blocks, / between dimensions."
    )


def _head(checkpoint: _Checkpoint) -> Iterator[str]:
    parameters = checkpoint["parameters"]
    preconditioned = [p for p in parameters if p["max_preconditioner_dim"] is not None]
    files = f"{checkpoint['files']:,} files of {by_size(checkpoint['bytes_on_disk'])}"
    yield f"{checkpoint['folder']}: step {_step(checkpoint)}, {files}"
    if preconditioned:
        rules = ", ".join(sorted({p["preconditioner"] for p in preconditioned}))
        yield (
            f"{len(preconditioned):,} of {len(parameters):,} parameters are preconditioned "
            f"({rules}), with max_preconditioner_dim = "
            f"{_range(preconditioned, 'max_preconditioner_dim')}."
        )
    elif checkpoint["optimizer"] == "Shampoo":
        yield "None of these parameters is preconditioned."
    else:
        yield "No parameter is preconditioned: AdamW (or another optimizer) has saved this."
    if counts := ", ".join(f"{name} = {value}" for name, value in checkpoint["training"].items()):
        yield f"The training's own count: {counts}."


def _changes(old: _Checkpoint, new: _Checkpoint) -> Iterator[Part]:
    before, after = ({p["name"]: p for p in of["parameters"]} for of in (old, new))
    for where, only in (("first", before.keys() - after), ("second", after.keys() - before)):
        if only:
            yield f"Only in the {where}: {', '.join(sorted(only))}."
    both = {name: (before[name], p) for name, p in after.items() if name in before}
    settings = {s for one, other in both.values() for s in {*_settings(one)} ^ {*_settings(other)}}
    if settings:
        yield f"Settings that only one has: {', '.join(sorted(settings))}."
    entries = sorted({entry for moved in new["moved"].values() for entry in moved})
    entries.sort(key=lambda entry: entry != "weight")
    rows = []
    for name, (one, other) in both.items():
        moved = new["moved"][name]
        shown = (f"{moved[entry]:.3g}" if entry in moved else "-" for entry in entries)
        rows.append((name, f"{one['step']} to {other['step']}", *shown))
    title = "What has moved: the norm of the difference by the norm before"
    yield Table(title, ("parameter", "step", *entries), rows)


def _spectra(parameters: Sequence[Mapping[str, Any]]) -> dict[str, tuple[list[float], list[float]]]:
    """For each kind of parameter and dimension the median over all blocks, at each place."""
    found: dict[str, list[list[float]]] = defaultdict(list)
    for p in parameters:
        kind = ".".join(without_numbers(p["name"]).removesuffix(".weight").split(".")[-2:])
        for factor in (factor for block in p["blocks"] for factor in block["factors"]):
            if factor["spectrum"]:
                found[f"{kind}, {_SIDES.get(factor['dimension'], '')}"].append(factor["spectrum"])
    medians = {
        name: list(map(statistics.median, zip(*of, strict=True))) for name, of in found.items()
    }
    return {name: ([k / 64 for k in range(65)], values) for name, values in medians.items()}


_SIDES = {0: "rows", 1: "columns"}


def _settings(p: Mapping[str, Any]) -> list[str]:
    return [f"{name} = {value}" for name, value in sorted(p["settings"].items())]


def _figures(p: Mapping[str, Any]) -> tuple[str, ...]:
    """The figures of a parameter, under `_HEADS`."""
    step, blocks = str(p["step"]), f"{p['number_of_blocks']:,}" if p["number_of_blocks"] else "-"
    if p["factor_step"] not in (None, p["step"]):
        step += f" (factors {p['factor_step']})"
    if len(p["blocks"]) < p["number_of_blocks"]:
        blocks = f"{len(p['blocks']):,} of {blocks}"
    by_dimension: dict[int, list[Mapping[str, Any]]] = defaultdict(list)
    for block in p["blocks"]:
        for factor in block["factors"]:
            by_dimension[factor["dimension"]].append(factor)
    return (
        p["name"],
        times(p["shape"]),
        step,
        blocks,
        _medians(by_dimension, "condition_number", "{:.1e}"),
        _medians(by_dimension, "effective_rank", "{:.1%}", by_rows=True),
        _medians(by_dimension, "vanishing", "{:.0%}"),
        by_size(sum(p["bytes"].values())),
    )


def _medians(
    by_dimension: Mapping[int, Sequence[Mapping[str, Any]]],
    name: str,
    form: str,
    by_rows: bool = False,
) -> str:
    """The median of a figure for each dimension, of the factors that have it."""
    shown = []
    for factors in by_dimension.values():
        known = [f[name] / (f["n"] if by_rows else 1) for f in factors if f[name] is not None]
        shown.append(form.format(statistics.median(known)) if known else "nan")
    return " / ".join(shown)


def _step(checkpoint: _Checkpoint) -> str:
    return _range(checkpoint["parameters"], "step")


def _range(parameters: Sequence[Mapping[str, Any]], name: str) -> str:
    values = [p[name] for p in parameters]
    low, high = min(values), max(values)
    return str(low) if low == high else f"{low} to {high}"

"""Checking values that people have written: types, ranges, options of other optimizers."""

import difflib
import math
import re
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from numbers import Real
from typing import Any, Literal, NoReturn

__all__ = [
    "REMOVED",
    "TORCH_OPTIONS",
    "check_patterns",
    "check_positive",
    "check_range",
    "check_torch_options",
    "is_number",
    "misfit",
    "name_some",
    "refuse",
    "refuse_unknown",
    "unmatched",
]

# Options of torch.optim's optimizers: the values that change nothing here, and what to do instead
# of the others.
_TORCH_OPTIONS: dict[str, tuple[tuple[bool | int | None, ...], str]] = {
    # These two choose between implementations of one update.
    "foreach": ((None, False, True), ""),
    "fused": ((None, False, True), ""),
    "maximize": ((False,), "negate the loss instead"),
    "amsgrad": ((False,), "no largest second moment is kept"),
    "capturable": ((False,), "the step cannot be captured in a CUDA graph"),
    "differentiable": ((False,), "no gradient flows through the step"),
    "centered": ((False,), "see 'grafting' for the methods that there are"),
    "decoupled_weight_decay": ((True,), "for another kind set 'weight_decay_type'"),
    "lr_decay": ((0,), "use a learning-rate scheduler"),
    "initial_accumulator_value": ((0,), "for a floor of the denominators set 'grafting_eps'"),
    "beta1": ((), "give both to 'betas'"),
    "beta2": ((), "give both to 'betas'"),
}

TORCH_OPTIONS = frozenset(_TORCH_OPTIONS)
"""Names of the options of torch.optim's optimizers that :func:`check_torch_options` knows."""

_PLAN = "`python -m shampoo_fsdp plan` shows what each rank sends, computes and keeps"
REMOVED: Mapping[str, str] = {
    "memory_cap": _PLAN,
    "intra_node_bandwidth": _PLAN,
    "inter_node_bandwidth": _PLAN,
    "device_tflops": _PLAN,
    "batched_3d": "a parameter of three dimensions is always a batch of matrices",
    "owner_scope = 'auto'": "set 'all' or 'shard'",
    "merge_dims = 'none'": "set 'matrix', or 'small' for factors of more than two dimensions",
}
"""Settings, and choices of settings, that there were once, and what to do instead."""


def refuse(name: str, value: Any, allowed: str) -> NoReturn:
    raise ValueError(f"setting '{name}' is {value!r}; allowed: {allowed}.")


def refuse_unknown(names: Iterable[str], known: Iterable[str]) -> None:
    """Raise a TypeError for the first setting that does not exist (any more)."""
    known = list(known)
    for name in names:
        if name in REMOVED:
            raise TypeError(f"setting '{name}' has been removed: {REMOVED[name]}.")
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f" Did you mean '{close[0]}'?" if close else ""
            raise TypeError(f"unknown setting '{name}'.{hint} Allowed: {', '.join(known)}.")


def check_torch_options(options: Mapping[str, Any]) -> None:
    """Accept options of torch.optim's optimizers where they change nothing.

    Args:
        options: keyword arguments, or a parameter group; other entries may be anything.

    Raises:
        ValueError: names the first option with another value, and what to do.
    """
    for name, (harmless, instead) in _TORCH_OPTIONS.items():
        if name in options:
            value = options[name]
            if not (isinstance(value, Real | None) and value in harmless):
                choices = " or ".join(map(repr, harmless)) or "nothing"
                refuse(name, value, f"{choices} ({instead})" if instead else choices)


def check_range(name: str, value: float | None, least: float, below: float = math.inf) -> None:
    """Raise a ValueError unless least <= value < below, or the setting is not set."""
    if value is not None and not least <= value < below:
        kind = "an integer" if isinstance(least, int) else "a number"
        refuse(name, value, f"{kind} >= {least:g}" if below == math.inf else f"0 <= {name} < 1")


def check_positive(name: str, value: float) -> None:
    if not (math.isfinite(value) and value > 0.0):
        refuse(name, value, "a positive number")


def check_patterns(name: str, patterns: Iterable[str]) -> None:
    """Raise a ValueError for the first that is empty or no regular expression."""
    for pattern in patterns:
        if not pattern:
            refuse(name, "", "no empty pattern, which is in every name ('.' says so)")
        try:
            re.compile(pattern)
        except re.error as error:
            refuse(name, pattern, f"regular expressions ({error})")


def unmatched(patterns: Iterable[str], names: Iterable[str]) -> list[str]:
    """The regular expressions that match none of the names."""
    names = list(names)
    return [p for p in patterns if not any(re.search(p, name) for name in names)]


def name_some(names: Sequence[str]) -> str:
    """The first few, and how many more there are."""
    shown = ", ".join(f"'{name}'" for name in names[:3])
    return shown + (f" and {len(names) - 3:,} more" if len(names) > 3 else "")


def is_number(value: Any) -> bool:
    """Whether it is finite and real; numpy's numbers count as well."""
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def misfit(name: str, value: Any, annotation: Any) -> str:
    """What a setting of the annotated type may be, if it may not have this value; else "".

    Settings also come from TOML files, where nothing else checks their types. Annotations that are
    not known here allow everything.
    """
    if _fits(value, annotation):
        return ""
    gone = f" ({value!r} has been removed)" if f"{name} = {value!r}" in REMOVED else ""
    return _describe(annotation) + gone


def _fits(value: Any, annotation: Any) -> bool:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, argument) for argument in arguments)
    if origin is Literal:
        return value in arguments
    if origin in (list, tuple):
        inner = [argument for argument in arguments if argument is not Ellipsis]
        return isinstance(value, list) and (
            len(inner) != 1 or all(_fits(item, inner[0]) for item in value)
        )
    if annotation in (float, int):
        numbers = int | float if annotation is float else int
        return isinstance(value, numbers) and not isinstance(value, bool)
    if annotation in (bool, str):
        return isinstance(value, annotation)
    return annotation is not types.NoneType or value is None


def _describe(annotation: Any) -> str:
    names = {int: "an integer", float: "a number", bool: "true or false", str: "a string"}
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_describe(a) for a in arguments if a is not types.NoneType)
    if origin is Literal:
        return " or ".join(map(repr, arguments))
    if origin in (list, tuple):
        return "a list" if not arguments else f"a list, each {_describe(arguments[0])}"
    return names.get(annotation, str(annotation))

"""Checking what people have written: names, types, bounds, options of other optimizers."""

import dataclasses
import difflib
import math
import re
import types
import typing
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Annotated, Any, Literal, NoReturn

__all__ = [
    "TORCH_OPTIONS",
    "NonNegativeFloat",
    "NonNegativeInt",
    "PositiveFloat",
    "PositiveInt",
    "Share",
    "check_fields",
    "check_patterns",
    "check_torch_options",
    "field_types",
    "is_number",
    "name_some",
    "refuse",
    "refuse_unknown",
    "unmatched",
]

TORCH_OPTIONS: dict[str, tuple[tuple[bool | int | None, ...], str]] = {
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
"""Options of torch.optim's optimizers: the values that change nothing here, and what to do instead
of the others."""


def refuse(name: str, value: Any, allowed: str) -> NoReturn:
    raise ValueError(f"setting '{name}' is {value!r}; allowed: {allowed}.")


def refuse_unknown(key: str, known: Collection[str], name: str = "") -> None:
    """Raise a TypeError for a setting that does not exist.

    Args:
        known: those that do.
        name: the setting's in the message, where it is not the key alone.
    """
    if key in known:
        return
    name = name or key
    close = difflib.get_close_matches(key, known, n=1)
    hint = f" Did you mean '{close[0]}'?" if close else ""
    raise TypeError(f"unknown setting '{name}'.{hint} Allowed: {', '.join(known)}.")


def check_torch_options(options: Mapping[str, Any]) -> None:
    """Accept options of torch.optim's optimizers where they change nothing.

    Args:
        options: keyword arguments, or a parameter group; other entries may be anything.

    Raises:
        ValueError: names the first option with another value, and what to do.
    """
    for name, (harmless, instead) in TORCH_OPTIONS.items():
        if name in options:
            value = options[name]
            if not (isinstance(value, Real | None) and value in harmless):
                choices = " or ".join(map(repr, harmless)) or "nothing"
                refuse(name, value, f"{choices} ({instead})" if instead else choices)


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
    everything = list(names)
    return [p for p in patterns if not any(re.search(p, name) for name in everything)]


def name_some(names: Sequence[str]) -> str:
    """The first few, and how many more there are."""
    shown = ", ".join(f"'{name}'" for name in names[:3])
    return shown + (f" and {len(names) - 3:,} more" if len(names) > 3 else "")


def is_number(value: Any) -> bool:
    """Whether it is finite and real; numpy's numbers count as well."""
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


@dataclass(frozen=True)
class Bound:
    """What the values of an annotated type must be beside their type."""

    words: str
    """What is allowed, as it stands in a message."""
    holds: Callable[[Any], bool]


PositiveInt = Annotated[int, Bound("an integer >= 1", lambda n: n >= 1)]
NonNegativeInt = Annotated[int, Bound("an integer >= 0", lambda n: n >= 0)]
PositiveFloat = Annotated[float, Bound("a positive number", lambda x: 0.0 < x < math.inf)]
NonNegativeFloat = Annotated[float, Bound("a number >= 0", lambda x: 0.0 <= x < math.inf)]
Share = Annotated[float, Bound("0 <= {name} < 1", lambda x: 0.0 <= x < 1.0)]


def field_types(cls: type) -> dict[str, Any]:
    """The types of a dataclass's public fields, with their bounds."""
    hints = typing.get_type_hints(cls, include_extras=True)
    return {name: hint for name, hint in hints.items() if not name.startswith("_")}


def check_fields(cls: type, values: Mapping[str, Any], table: str = "") -> None:
    """Check the names, types and bounds of what the fields of a dataclass are given.

    Keywords, TOML files and configurations come here. Types that are not known here allow
    everything.

    Args:
        values: by name; fields that are dataclasses have tables.
        table: what they are in, with dots, for messages.

    Raises:
        TypeError: a name that does not exist.
        ValueError: a value that is not allowed.
    """
    known = field_types(cls)
    for key, value in values.items():
        name = f"{table}.{key}" if table else key
        refuse_unknown(key, known, name)
        if not dataclasses.is_dataclass(known[key]):
            if not _fits(value, known[key]):
                refuse(name, value, _describe(known[key], key))
        elif isinstance(value, Mapping):
            check_fields(typing.cast(type, known[key]), value, name)
        else:
            refuse(name, value, f"a table, [{name}]")


def _fits(value: Any, annotation: Any) -> bool:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        bounds = [bound for bound in arguments[1:] if isinstance(bound, Bound)]
        return _fits(value, arguments[0]) and all(bound.holds(value) for bound in bounds)
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


def _describe(annotation: Any, name: str) -> str:
    names = {int: "an integer", float: "a number", bool: "true or false", str: "a string"}
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        bounds = [bound.words for bound in arguments[1:] if isinstance(bound, Bound)]
        return bounds[0].format(name=name) if bounds else _describe(arguments[0], name)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_describe(a, name) for a in arguments if a is not types.NoneType)
    if origin is Literal:
        return " or ".join(map(repr, arguments))
    if origin in (list, tuple):
        return "a list" if not arguments else f"a list, each {_describe(arguments[0], name)}"
    return names.get(annotation, str(annotation))

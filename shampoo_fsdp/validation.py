"""Checking what people have written: names, types, bounds, options of other optimizers."""

import dataclasses
import difflib
import math
import re
import types
import typing
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from numbers import Real
from typing import Annotated, Any, Literal, NoReturn

__all__ = [
    "check_fields",
    "field_types",
    "name_some",
    "refuse",
    "refuse_unknown",
    "setting_names",
    "unmatched",
]

TORCH_OPTIONS: dict[str, tuple[bool | int | None, ...]] = {
    **dict.fromkeys(("foreach", "fused"), (None, False, True)),  # implementations of one update
    **dict.fromkeys(("maximize", "amsgrad", "capturable", "differentiable", "centered"), (False,)),
    "decoupled_weight_decay": (True,),
    **dict.fromkeys(("lr_decay", "initial_accumulator_value"), (0,)),
    **dict.fromkeys(("beta1", "beta2"), ()),
}
"""Options of torch.optim's optimizers, and their values that change nothing here."""

# What others call ours.
_OF_OTHERS = {"epsilon": ("eps", "preconditioner_eps"), "learning_rate": ("lr",)}


def refuse(name: str, value: Any, allowed: str) -> NoReturn:
    raise ValueError(f"setting '{name}' is {value!r}; allowed: {allowed}.")


def refuse_unknown(
    key: str, known: Collection[str], name: str = "", everywhere: Iterable[str] = ()
) -> None:
    """Raise a TypeError for a setting that does not exist: with what may be meant, or all allowed.

    Args:
        known: those that do.
        name: the setting's in the message, where it is not the key alone.
        everywhere: names, with dots, of what there is in this table and in others; or only these.
    """
    if key in known:
        return
    wanted = [word.lower() for word in _OF_OTHERS.get(key, (key,))]
    meant = [path for path in everywhere or known if path.split(".")[-1].lower() in wanted][:3]
    meant = meant or difflib.get_close_matches(key.lower(), known, n=1)
    hint = f"Did you mean {' or '.join(map(repr, meant))}?" if meant else "Allowed: {}."
    raise TypeError(f"unknown setting '{name or key}'. {hint.format(', '.join(known))}")


def check_torch_options(options: Mapping[str, Any]) -> None:
    """Accept options of torch.optim's optimizers where they change nothing.

    Args:
        options: keyword arguments, or a parameter group; other entries may be anything.

    Raises:
        ValueError: names the first option with another value.
    """
    for name, harmless in TORCH_OPTIONS.items():
        value = options.get(name)
        if name in options and not (isinstance(value, Real | None) and value in harmless):
            refuse(name, value, " or ".join(map(repr, harmless)) or "'betas' in its place")


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


# What the values must be beside their type: in words, as they stand in a message, and the check.
PositiveInt = Annotated[int, ("an integer >= 1", lambda n: n >= 1)]
NonNegativeInt = Annotated[int, ("an integer >= 0", lambda n: n >= 0)]
PositiveFloat = Annotated[float, ("a positive number", lambda x: 0.0 < x < math.inf)]
NonNegativeFloat = Annotated[float, ("a number >= 0", lambda x: 0.0 <= x < math.inf)]
Share = Annotated[float, ("0 <= {name} < 1", lambda x: 0.0 <= x < 1.0)]


def field_types(cls: type) -> dict[str, Any]:
    """The types of a dataclass's public fields, with their bounds."""
    hints = typing.get_type_hints(cls, include_extras=True)
    return {name: hint for name, hint in hints.items() if not name.startswith("_")}


def setting_names(cls: type, table: str = "") -> Iterator[str]:
    """With dots, of the fields of a dataclass, and of those in its tables."""
    for key, kind in field_types(cls).items():
        yield (name := f"{table}.{key}" if table else key)
        if dataclasses.is_dataclass(kind):
            yield from setting_names(typing.cast(type, kind), name)


def check_fields(
    cls: type, values: Mapping[str, Any], table: str = "", everywhere: Iterable[str] = ()
) -> None:
    """Check the names, types and bounds of what the fields of a dataclass are given.

    Keywords, TOML files and configurations come here. Types that are not known here allow
    everything.

    Args:
        values: by name; fields that are dataclasses have tables.
        table: what they are in, with dots, for messages.
        everywhere: see :func:`refuse_unknown`; by default what the fields have.

    Raises:
        TypeError: a name that does not exist.
        ValueError: a value that is not allowed.
    """
    known = field_types(cls)
    everywhere = everywhere or setting_names(cls, table)
    for key, value in values.items():
        name = f"{table}.{key}" if table else key
        refuse_unknown(key, known, name, everywhere)
        if not dataclasses.is_dataclass(known[key]):
            words, fits = _meaning(known[key], key)
            if not fits(value):
                refuse(name, value, words)
        elif isinstance(value, Mapping):
            check_fields(typing.cast(type, known[key]), value, name, everywhere)
        else:
            refuse(name, value, f"a table, [{name}]")


def _meaning(annotation: Any, name: str) -> tuple[str, Callable[[Any], bool]]:
    """In words what a type with bounds allows, and the check of it."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        words, fits = _meaning(arguments[0], name)
        if not isinstance(arguments[1], tuple):  # of others
            return words, fits
        words, holds = arguments[1]
        return words.format(name=name), lambda value: fits(value) and holds(value)
    if origin in (typing.Union, types.UnionType):
        choices = [_meaning(argument, name) for argument in arguments]
        words = " or ".join(words for words, _ in choices if words)
        return words, lambda value: any(fits(value) for _, fits in choices)
    if origin is Literal:
        return " or ".join(map(repr, arguments)), arguments.__contains__
    if origin in (list, tuple):
        inner = [argument for argument in arguments if argument is not Ellipsis]
        words, fits = _meaning(inner[0], name) if len(inner) == 1 else ("", lambda value: True)
        words = f"a list, each {words}" if words else "a list"
        return words, lambda value: isinstance(value, list) and all(map(fits, value))
    return _PLAIN.get(annotation, (str(annotation), lambda value: True))


def _is_number(value: Any, kinds: Any) -> bool:
    return isinstance(value, kinds) and not isinstance(value, bool)


_PLAIN: dict[Any, tuple[str, Callable[[Any], bool]]] = {
    int: ("an integer", lambda value: _is_number(value, int)),
    float: ("a number", lambda value: _is_number(value, int | float)),
    bool: ("true or false", lambda value: isinstance(value, bool)),
    str: ("a string", lambda value: isinstance(value, str)),
    types.NoneType: ("", lambda value: value is None),
}

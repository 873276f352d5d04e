"""Settings of TorchTitan 0.3's configurations by their names in a file."""

import dataclasses
import difflib
import typing
from typing import Any

from shampoo_fsdp.validation import misfit

__all__ = ["check_field", "set_field"]


def set_field(config: Any, key: str, value: Any, said: str) -> None:
    """Sets a field of a configuration.

    Args:
        key: Its name, with dots.
        said: What the user called it.

    Raises:
        ValueError, TypeError: Names the setting and what is allowed.
    """
    *tables, last = key.split(".")
    for table in tables:
        _known(type(config), table, said, whole=True)
        config = getattr(config, table)
    check_field(type(config), last, value, said.rpartition(".")[0])
    if dataclasses.is_dataclass(getattr(config, last)) or _has_tables(value):
        raise TypeError(f"{said} = {value!r}: a file cannot say it; start from a function")
    setattr(config, last, value)


def check_field(cls: type, key: str, value: Any, path: str) -> None:
    """Raises a ValueError or TypeError if a configuration cannot have this.

    Args:
        path: Of the table, in messages.
    """
    hint, name = _known(cls, key, path), f"{path}.{key}" if path else key
    if dataclasses.is_dataclass(hint):
        raise TypeError(f"{name} = {value!r}: must be a table, [{name}]")
    if allowed := misfit(key, value, hint):
        raise TypeError(f"{name} = {value!r}: must be {allowed}")


def _has_tables(value: Any) -> bool:
    return isinstance(value, list) and any(isinstance(item, dict) for item in value)


def _known(cls: type, key: str, path: str, *, whole: bool = False) -> Any:
    """The type of a field."""
    hints = {n: h for n, h in typing.get_type_hints(cls).items() if not n.startswith("_")}
    if key not in hints:
        name = path if whole else f"{path}.{key}" if path else key
        known = sorted(hints)
        close = difflib.get_close_matches(key, known, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"unknown setting {name}.{hint} Allowed: {', '.join(known)}")
    return hints[key]

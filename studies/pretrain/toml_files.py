"""TOML with dots in the names instead of tables: {"optimizer.lr": 1e-3, ...}."""

import json
from collections.abc import Iterator
from typing import Any

try:
    import tomllib
except ImportError:  # Python 3.10
    import tomli as tomllib  # type: ignore[import-not-found,no-redef]


def read_toml(text: str) -> dict[str, Any]:
    """A TOML document, flat."""
    return flat(tomllib.loads(text))


def flat(tables: dict[str, Any]) -> dict[str, Any]:
    """Nested tables, flat."""
    return dict(_flat(tables, ""))


def _flat(table: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in table.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def toml_text(settings: dict[str, Any]) -> str:
    """Inverse of `read_toml` for strings, numbers, truth values and lists of them in tables."""
    tables: dict[str, list[str]] = {}
    for name, value in sorted(settings.items()):
        table, key = name.rsplit(".", 1)
        tables.setdefault(table, []).append(f"{key} = {json.dumps(value)}")
    return "\n".join("\n".join([f"[{table}]", *lines, ""]) for table, lines in tables.items())

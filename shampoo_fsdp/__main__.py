"""The plan of a built-in model on any mesh: what each rank computes, keeps and sends.

python -m shampoo_fsdp plan --model llama3-8b --mesh dp_shard=64,tp=8
"""

import argparse
import dataclasses
import json
import sys
import typing
from collections.abc import Sequence
from typing import Any

from rich.console import Console

from shampoo_fsdp.config import ShampooConfig, settings_from_keywords
from shampoo_fsdp.model_shapes import MESH_DIMS, MODELS, model_specs
from shampoo_fsdp.plan_report import plan_report

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 after one line about what is wrong with the arguments."""
    parser = _parser()
    options = vars(parser.parse_args(arguments))
    model, mesh, as_json = options.pop("model"), options.pop("mesh"), options.pop("json")
    options.pop("command")
    try:
        config = settings_from_keywords(options)
        specs = model_specs(model, _mesh(mesh))
        report = plan_report(f"{model} on {mesh}", [specs], config)
    except (ValueError, TypeError) as error:
        print(f"{parser.prog} plan: {error}", file=sys.stderr)
        return 2
    if as_json:
        print(json.dumps(report.as_json(), indent=2))
    else:
        report.print(Console())
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m shampoo_fsdp", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    plan = commands.add_parser("plan", argument_default=argparse.SUPPRESS, help="show a plan")
    plan.add_argument("--model", required=True, help=", ".join(MODELS))
    plan.add_argument(
        "--mesh", required=True, help=f"sizes of {', '.join(MESH_DIMS)}, as in dp_shard=64,tp=8"
    )
    plan.add_argument("--json", action="store_true", default=False, help="figures as JSON")
    settings = plan.add_argument_group("settings of Shampoo")
    hints = typing.get_type_hints(ShampooConfig)
    for field in dataclasses.fields(ShampooConfig):
        reads = {"type": _value} | (
            {"nargs": "+", "type": str} if hints[field.name] == list[str] else {}
        )
        settings.add_argument(f"--{field.name}", **reads)  # type: ignore[arg-type]
    return parser


def _value(text: str) -> Any:
    """Numbers and truth values as in TOML; the settings themselves check what they are given."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def _mesh(text: str) -> dict[str, int]:
    mesh: dict[str, int] = {}
    for part in text.split(","):
        name, _, size = part.partition("=")
        if not (name and size.isdecimal()) or name in mesh:
            raise ValueError(
                f"mesh '{text}' is not understood at '{part}'; write each dimension once, with "
                "its size, as in dp_shard=64,tp=8."
            )
        mesh[name] = int(size)
    return mesh


if __name__ == "__main__":
    sys.exit(main())

"""Before a run and after it: the plan of a model on a mesh, and what is in a checkpoint.

python -m shampoo_fsdp plan --model llama3-8b --mesh dp_shard=64,tp=8
python -m shampoo_fsdp inspect outputs/checkpoint/step-500
"""

import argparse
import json
import os
import sys
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from shampoo_fsdp import __version__
from shampoo_fsdp.config import FIELD_TEXTS, ShampooConfig
from shampoo_fsdp.hyperparameters import settings_from_keywords
from shampoo_fsdp.tools.compare.command import add_options, compare
from shampoo_fsdp.tools.dry_step import model_step
from shampoo_fsdp.tools.inspection import inspect_checkpoint
from shampoo_fsdp.tools.inspection_report import print_report
from shampoo_fsdp.tools.machine import add_rates, machine_of
from shampoo_fsdp.tools.models import MESH_DIMS, MODELS, model_specs
from shampoo_fsdp.tools.parser import Parser
from shampoo_fsdp.tools.plan_figures import plan_figures
from shampoo_fsdp.tools.plan_tables import print_plan
from shampoo_fsdp.validation import refuse_unknown

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 after one line about what is wrong with the arguments."""
    parser = _parser()
    namespace, unknown = parser.parse_known_args(arguments)
    options = vars(namespace)
    command, run = options.pop("command"), options.pop("run")
    try:
        if command == "plan" and unknown and unknown[0].startswith("--"):
            refuse_unknown(unknown[0][2:].partition("=")[0], [*FIELD_TEXTS, *options])
        if unknown:
            parser.error(f"unrecognized arguments: {' '.join(unknown)}")
        run(**options)
    except BrokenPipeError:  # | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, TypeError) as error:
        print(f"{parser.prog} {command}: {error}", file=sys.stderr)
        return 2
    return 0


def _plan(*, model: str, mesh: str, device: str, json: bool, **settings: Any) -> None:
    machine = machine_of(settings)
    config = settings_from_keywords(settings)
    sizes = mesh_of(mesh)
    models = [model_specs(model, sizes)]
    figures = plan_figures(f"{model} on {mesh}", models, config, device)
    if device == "cuda":
        figures["step"] = model_step(figures, models, machine, sizes.get("tp", 1))
    if json:
        _print_json(figures)
    else:
        print_plan(figures, Console())


def _inspect(*, checkpoint: str, json: bool, parameter: str, blocks: int | None) -> None:
    found = inspect_checkpoint(Path(checkpoint), parameter, blocks)
    if json:
        _print_json(found)
    else:
        # Names and figures need room; a file or a pipe has it.
        known = sys.stdout.isatty() or "COLUMNS" in os.environ
        print_report(found, Console(width=None if known else 130))


def _print_json(report: dict[str, Any]) -> None:
    print(json.dumps(report, indent=2), flush=True)


def _parser() -> Parser:
    parser = Parser(
        prog="python -m shampoo_fsdp",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True)
    plan = commands.add_parser("plan", argument_default=argparse.SUPPRESS, help="show a plan")
    plan.set_defaults(run=_plan)
    plan.add_argument("--model", required=True, help=", ".join(MODELS))
    plan.add_argument(
        "--mesh", required=True, help=f"sizes of {', '.join(MESH_DIMS)}, as in dp_shard=64,tp=8"
    )
    plan.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="default: cuda")
    plan.add_argument("--json", action="store_true", default=False, help="figures as JSON")
    add_rates(plan)
    settings = plan.add_argument_group("settings of Shampoo")
    for name, annotation in typing.get_type_hints(ShampooConfig).items():
        text = FIELD_TEXTS.get(name, "").replace("%", "%%")
        if annotation == list[str]:
            settings.add_argument(f"--{name}", nargs="+", metavar="X", help=text)
        else:
            settings.add_argument(f"--{name}", type=value_of, metavar="X", help=text)
    comparison = commands.add_parser("compare", help="train with AdamW, Muon and Shampoo")
    comparison.set_defaults(run=compare)
    add_options(comparison)
    inspect = commands.add_parser("inspect", help="show what is in a checkpoint")
    inspect.set_defaults(run=_inspect)
    inspect.add_argument("checkpoint", help="its folder, such as outputs/checkpoint/step-500")
    inspect.add_argument("--json", action="store_true", help="figures as JSON")
    inspect.add_argument(
        "--parameter", default="", metavar="REGEX", help="only those whose name contains a match"
    )
    inspect.add_argument(
        "--blocks", type=int, metavar="N", help="eigenvalues of N blocks of each parameter (all)"
    )
    return parser


def value_of(text: str) -> Any:
    """Numbers and truth values as in TOML; the settings themselves check what they are given."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def mesh_of(text: str) -> dict[str, int]:
    """Sizes of the dimensions of a mesh, as in dp_shard=64,tp=8."""
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

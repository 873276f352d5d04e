"""Before a run and after it: the plan of a model on a mesh, and what is in a checkpoint.

python -m shampoo_fsdp plan --model llama3-8b --mesh dp_shard=64,tp=8
python -m shampoo_fsdp inspect outputs/checkpoint/step-500
"""

import argparse
import gc
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
from shampoo_fsdp.model_groups import typed_parameters
from shampoo_fsdp.runtime.choice import with_embeddings
from shampoo_fsdp.runtime.groups import FromEmbedding
from shampoo_fsdp.tools.compare.command import add_options, compare
from shampoo_fsdp.tools.inspection import differences, inspect_checkpoint
from shampoo_fsdp.tools.inspection_report import print_report, write_report
from shampoo_fsdp.tools.models import (
    MESH_DIMS,
    MODELS,
    hugging_face_model,
    module_of,
    parameters_of,
    stages_of,
)
from shampoo_fsdp.tools.parser import Parser
from shampoo_fsdp.tools.plan_figures import JobPlan
from shampoo_fsdp.tools.plan_report import add_plan_options, report_plan
from shampoo_fsdp.tools.tables import print_json
from shampoo_fsdp.validation import refuse_unknown

__all__ = ["main"]

_SETTINGS = typing.get_type_hints(ShampooConfig)


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 after one line about what is wrong with the arguments."""
    gc.freeze()  # what is imported stays: looking through it again and again takes a second
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


def _plan(
    *,
    mesh: str,
    model: str | None = None,
    hf: str | None = None,
    module: str | None = None,
    **options: Any,
) -> None:
    settings = {name: options.pop(name) for name in _SETTINGS if name in options}
    config, sizes = settings_from_keywords(settings), mesh_of(mesh)
    name, parameters = model, None
    if name is None:
        built = hugging_face_model(hf) if hf else module_of(module or "")
        name, parameters = type(built).__name__, parameters_of(built)
        pairs = typed_parameters(built)
        embeddings = [pair.name for pair in pairs if isinstance(pair, FromEmbedding)]
        config = with_embeddings(config, embeddings)
    stages = stages_of(name, sizes, parameters)
    job = JobPlan(f"{name} on {mesh}", stages, config, options["device"])
    report_plan(job, options, sizes.get("tp", 1) * sizes.get("pp", 1))


def _inspect(
    *, checkpoint: list[str], json: bool, html: str | None, parameter: str, blocks: int | None
) -> None:
    if len(checkpoint) > 2:
        raise ValueError(
            f"{len(checkpoint)} checkpoints are given; allowed: one, or two to compare."
        )
    folders = list(map(Path, checkpoint))
    found = [inspect_checkpoint(folder, parameter, blocks) for folder in folders]
    if len(found) == 2:
        first, second = ({p["name"]: p for p in of["parameters"]} for of in found)
        both = [name for name in first if name in second]
        found[1]["moved"] = differences(folders[0], folders[1], both)
    if html:
        write_report(Path(html), found)
    if json:
        print_json(found[0] if len(found) == 1 else found)
    else:
        # Names and figures need room; a file or a pipe has it.
        known = sys.stdout.isatty() or "COLUMNS" in os.environ
        print_report(found, Console(width=None if known else 130))


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
    what = plan.add_mutually_exclusive_group(required=True)
    what.add_argument("--model", help=", ".join(MODELS))
    what.add_argument("--hf", metavar="config.json", help="a language model of Hugging Face's")
    built = "returns a module, built without memory"
    what.add_argument("--module", metavar="FILE.py:FUNCTION", help=built)
    sizes = f"sizes of {', '.join(MESH_DIMS)}, as in dp_shard=64,tp=8"
    plan.add_argument("--mesh", required=True, help=sizes)
    add_plan_options(plan)
    settings = plan.add_argument_group("settings of Shampoo")
    for name, annotation in _SETTINGS.items():
        text = FIELD_TEXTS.get(name, "").replace("%", "%%")
        kind: Any = {"nargs": "+"} if annotation == list[str] else {"type": value_of}
        settings.add_argument(f"--{name}", metavar="X", help=text, **kind)
    comparison = commands.add_parser("compare", help="train with AdamW, Muon and Shampoo")
    comparison.set_defaults(run=compare)
    add_options(comparison)
    inspect = commands.add_parser("inspect", help="show what is in a checkpoint")
    inspect.set_defaults(run=_inspect)
    folder = "its folder, such as outputs/checkpoint/step-500; or two"
    inspect.add_argument("checkpoint", nargs="+", help=folder)
    inspect.add_argument("--json", action="store_true", help="figures as JSON")
    inspect.add_argument("--html", metavar="FILE", help="a page with pictures, too")
    chosen = "only those whose name contains a match"
    inspect.add_argument("--parameter", default="", metavar="REGEX", help=chosen)
    few = "eigenvalues of N blocks of each parameter (all)"
    inspect.add_argument("--blocks", type=int, metavar="N", help=few)
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

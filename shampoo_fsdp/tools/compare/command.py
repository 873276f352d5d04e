"""The command `compare`: which optimizer needs the fewest steps, the least time, on your model?"""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from shampoo_fsdp.tools import page
from shampoo_fsdp.tools.compare import small_llama
from shampoo_fsdp.tools.compare.contest import CONTESTANTS, Run, train
from shampoo_fsdp.tools.models import function_of
from shampoo_fsdp.tools.tables import Table, by_size, four_digits, print_parts

_BASELINE = "AdamW"
_HEADS = (
    "optimizer", "lr", "loss", f"steps to {_BASELINE}'s", "seconds to it", "in all", "ms a step",
    "state",
)  # fmt: skip


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command to its parser."""
    parser.add_argument(
        "--model",
        metavar="FILE.py:FUNCTION",
        help="returns a module, whose forward takes a batch and returns the loss; default: a Llama "
        "of 1.1 M parameters",
    )
    parser.add_argument(
        "--data",
        metavar="FILE.py:FUNCTION",
        help="returns an iterable of batches (a tensor, a tuple or a dict), the same on each call, "
        "other ones on each rank; default: bytes of Python's standard library",
    )
    parser.add_argument("--steps", type=_count, default=240, help="of each training (240)")
    parser.add_argument(
        "--lr",
        nargs="+",
        default=[],
        metavar="NAME=LR",
        help="default: "
        + " ".join(f"{name}={of.lr:g}" for name, of in CONTESTANTS.items())
        + "; KL-Shampoo's step has twice its lr (lr_factor = 2)",
    )
    parser.add_argument("--html", default="compare.html", metavar="FILE", help="compare.html")


def compare(
    *, model: str | None, data: str | None, steps: int, lr: Sequence[str], html: str
) -> None:
    """Train with each optimizer, print a table, write the page; under torchrun on all ranks.

    Raises:
        ValueError: names the option, what was found and what is allowed.
    """
    if (model is None) != (data is None):
        raise ValueError("--model and --data: give both, or neither for the small Llama.")
    rates = {name: contestant.lr for name, contestant in CONTESTANTS.items()} | _rates(lr)
    build = function_of("--model", model) if model else small_llama.build
    batches = function_of("--data", data) if data else small_llama.batches
    device = _device()
    first = not dist.is_initialized() or dist.get_rank() == 0
    if first:  # where the bar is not seen, as in a pipe
        print(f"Training with {', '.join(rates)}: {steps:,} steps each", flush=True)
    try:
        with Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            disable=not first,
        ) as progress:
            task = progress.add_task("", total=len(rates) * steps)
            runs: list[Run] = []
            for name, rate in rates.items():
                progress.update(task, description=name)

                def passed(run: Run, name: str = name, done: int = len(runs) * steps) -> None:
                    words = f"{name}: step {run.steps[-1]}, loss {run.losses[-1]:.3f}"
                    progress.update(task, completed=done + run.steps[-1], description=words)

                runs.append(train(name, rate, build, batches, steps, device, passed))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    if first:
        _report(runs, model or "a Llama of 1.1 M parameters on Python source", Path(html))


def _report(runs: Sequence[Run], what: str, path: Path) -> None:
    rows = [_row(run, runs[0]) for run in runs]
    title = f"{what}, {runs[0].steps[-1]:,} steps, the same batches and initial weights for all"
    table, end = Table(title, _HEADS, rows), runs[0].losses[-1]
    print_parts([table], Console())
    text = (
        f"One seed. The dotted line is the loss at which {_BASELINE} ends; 'ms a step' are the "
        "optimizer's part."
    )
    by_step = {run.name: (run.steps, run.losses) for run in runs}
    by_time = {run.name: (run.seconds, run.losses) for run in runs}
    curves = [
        "<h2>Loss against steps</h2>" + page.curves(by_step, "steps", "loss", end),
        "<h2>Loss against time</h2>" + page.curves(by_time, "seconds", "loss", end),
    ]
    page.write_report(path, "AdamW, Muon and Shampoo", [text, table], curves)
    print(f"Curves: {path}")


def _row(run: Run, baseline: Run) -> list[str]:
    end = baseline.losses[-1]
    whole = run.steps[-1], run.seconds[-1]
    steps, seconds = run.reached(end, run.steps), run.reached(end, run.seconds)
    if run is baseline:
        steps, seconds = whole
    return [
        run.name,
        f"{run.lr:g}",
        f"{run.losses[-1]:.3f}",
        _beside(steps, baseline.steps[-1]),
        _beside(seconds, baseline.seconds[-1]),
        f"{whole[1]:,.0f}",
        four_digits(1e3 * run.optimizer_seconds / max(1, whole[0] - 1)),
        by_size(run.state_bytes),
    ]


def _beside(value: float | None, baseline: float) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if value == baseline else f"{value:,.0f} ({value / baseline - 1:+.0%})"


def _rates(given: Sequence[str]) -> dict[str, float]:
    rates = {}
    for text in given:
        name, _, value = text.partition("=")
        try:
            rates[name] = float(value)
        except ValueError:
            rates[name] = 0.0
        if name not in CONTESTANTS or not rates[name] > 0.0:
            names = ", ".join(CONTESTANTS)
            raise ValueError(
                f"--lr '{text}': write NAME=LR, a name of {names} and a number above 0."
            )
    return rates


def _device() -> torch.device:
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    kind = accelerator.type if accelerator else "cpu"
    if not dist.is_torchelastic_launched():
        return torch.device(kind)
    device = torch.device("cpu")
    if accelerator:
        device = torch.device(kind, int(os.environ["LOCAL_RANK"]))
        torch.accelerator.set_device_index(device)
    dist.init_process_group()
    return device


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is not a positive number")
    return int(text)

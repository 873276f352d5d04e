"""Compares optimizers on convolutions: a small ResNet on 5,000 images of digits.

    python -m studies.vision run         # a killed study goes on where it was
    python -m studies.vision report      # table and figure from the results

Each contestant's lr is chosen of the same number of values by the loss on 500 images; then three
more seeds are compared on 1,000 others.
"""

import math
import statistics
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.command import markdown_table, parser_of
from studies.pretrain.results import Results, Run, complete

_RESULTS = Path(__file__).parent / "results" / "runs.jsonl"
_EPOCHS = 12
_SEEDS = (1, 2, 3)
_SGD_LR = [0.0125, 0.025, 0.05, 0.1, 0.2, 0.4]
_ADAM_LR = [1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2]
_SHAMPOO = {"preconditioner": "shampoo", "betas": (0.9, 0.95)}

# What each is called, torch's or our class, its settings, and the values of lr.
CONTESTANTS: dict[str, tuple[str, dict[str, Any], list[float]]] = {
    "SGD, Nesterov": ("SGD", {"weight_decay": 5e-4}, _SGD_LR),
    "AdamW": ("AdamW", {"weight_decay": 0.05}, _ADAM_LR),
    "Shampoo, SGD's size": (
        "Shampoo",
        {**_SHAMPOO, "weight_decay": 5e-4, "weight_decay_type": "l2", "grafting": "sgd"},
        # SGD's momentum sums gradients, ours averages them: ten times the lr for the same step.
        [10 * lr for lr in _SGD_LR],
    ),
    "Shampoo, Adam's size": ("Shampoo", {**_SHAMPOO, "weight_decay": 0.05}, _ADAM_LR),
    "KL-Shampoo, Adam's size": ("Shampoo", {"weight_decay": 0.05}, _ADAM_LR),
}


def run_of(contestant: str, lr: float, seed: int, images: str) -> Run:
    """A training of a contestant."""
    optimizer, options, _ = CONTESTANTS[contestant]
    settings = {
        "optimizer": optimizer,
        "options": {**options, "lr": lr},
        "epochs": _EPOCHS,
        "seed": seed,
        "images": images,
    }
    return Run(size="digits", contestant=contestant, stage=images, settings=settings)


def best_lr(contestant: str, results: Results) -> float | None:
    """By the loss on the tuning images; None until all values have been tried."""
    values = CONTESTANTS[contestant][2]
    losses = [results.loss(run_of(contestant, lr, 0, "tuning")) for lr in values]
    if any(loss is None for loss in losses):
        return None
    return min(zip(losses, values, strict=True))[1]  # type: ignore[type-var]


def run(results: Results) -> None:
    """All that is missing."""
    from studies.vision.training import train

    torch.set_num_threads(1)
    for contestant, (_, _, values) in CONTESTANTS.items():
        complete((run_of(contestant, lr, 0, "tuning") for lr in values), results, train)
        chosen = best_lr(contestant, results)
        assert chosen is not None
        complete((run_of(contestant, chosen, seed, "test") for seed in _SEEDS), results, train)


def finals(results: Results) -> dict[str, tuple[float, list[dict[str, Any]]]]:
    """lr and records of the seeds, of the contestants that have them all."""
    found = {}
    for contestant in CONTESTANTS:
        lr = best_lr(contestant, results)
        if lr is not None:
            runs = [run_of(contestant, lr, seed, "test") for seed in _SEEDS]
            if all(run in results for run in runs):
                found[contestant] = lr, [results[run] for run in runs]
    return found


def markdown(results: Results) -> str:
    """The table."""
    heads = ("optimizer", "lr", "accuracy after 3 epochs", "after all", "loss", "training loss")
    shown = (
        ("accuracy", 2, "{:.1%}"),
        ("accuracy", -1, "{:.1%}"),
        ("loss", -1, "{:.4f}"),
        ("training_loss", -1, "{:.4f}"),
    )
    rows = []
    for contestant, (lr, records) in finals(results).items():
        means = (statistics.fmean(r[name][at] for r in records) for name, at, _ in shown)
        cells = [form.format(mean) for (_, _, form), mean in zip(shown, means, strict=True)]
        rows.append([contestant, f"{lr:g}", *cells])
    return markdown_table(heads, rows)


def draw(results: Results, path: Path) -> None:
    """Accuracy and training loss by epoch, and the final loss by lr."""
    from studies import plots

    figure, (errors, training, tuning) = plots.panels(3, 3, 3.2)
    for contestant, (_, records) in finals(results).items():
        wrong = [[100 * (1 - right) for right in record["accuracy"]] for record in records]
        losses = [record["training_loss"] for record in records]
        for axis, seeds in ((errors, wrong), (training, losses)):
            epochs = range(1, len(seeds[0]) + 1)
            plots.band(axis, epochs, seeds, contestant, **plots.style_of(contestant))
    for contestant, (_, _, values) in CONTESTANTS.items():
        found = [results.loss(run_of(contestant, lr, 0, "tuning")) for lr in values]
        losses = [math.nan if loss is None else loss for loss in found]
        relative = [lr / values[0] for lr in values]
        style = plots.style_of(contestant)
        tuning.plot(relative, losses, marker="o", ms=3, label=contestant, **style)
    errors.set_yscale("log")
    errors.set_yticks([2, 5, 10, 20, 50], ["2", "5", "10", "20", "50"], minor=False)
    errors.set_yticks([], minor=True)
    training.set_yscale("log")
    for axis in (errors, training):
        axis.set_xticks(range(2, 13, 2))
    tuning.set_xscale("log", base=2)
    tuning.xaxis.set_major_formatter("{x:g}")
    plots.finish(errors, "errors on the test images, %", xlabel="epoch")
    plots.finish(training, "training loss", xlabel="epoch")
    plots.finish(tuning, "tuning loss", xlabel="lr over the smallest tried")
    plots.save(figure, path)


def main(arguments: list[str] | None = None) -> None:
    """Reads the command line."""
    parser = parser_of("studies.vision", __doc__)
    parser.add_argument("what", choices=("run", "report"))
    parser.add_argument("--results", type=Path, default=_RESULTS)
    options = parser.parse_args(arguments)
    results = Results(options.results)
    if options.what == "run":
        run(results)
        return
    print(markdown(results))
    draw(results, options.results.parent / "digits.png")


if __name__ == "__main__":
    sys.exit(main())

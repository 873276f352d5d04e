"""What lr does: AdamW and Shampoo on the same short job, at the same lr.

    python -m benchmarks.lr_sweep
    python -m benchmarks.lr_sweep --steps 60 --lr 3e-4 1e-3

TorchTitan's own Trainer in one process, the job of configs/llama3_small_cpu.toml with the smallest
flavor. For each lr the loss, the mean of the last steps, and the alignment: the cosine between
gradient and update of a matrix that Shampoo preconditions, the mean of these over the steps. At
equal size of the step the loss falls by lr times it, as long as lr and not curvature is the limit.
"""

import contextlib
import io
import itertools
import logging
import statistics
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.command import console, need_02, parser_of, table
from benchmarks.ranks import run_on_ranks

__all__ = ["main"]

_JOB = Path(__file__).resolve().parent.parent / "configs" / "llama3_small_cpu.toml"
_LAST = 5


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = parser_of("benchmarks.lr_sweep", __doc__)
    parser.add_argument("--lr", type=float, nargs="+", default=[3e-4, 1e-3, 3e-3, 1e-2, 3e-2])
    parser.add_argument("--steps", type=int, nargs="+", default=[60, 240])
    options = parser.parse_args(arguments)
    need_02("benchmarks.lr_sweep")
    import shampoo_torchtitan.train  # noqa: F401  (once, before ranks are forked, after --help)

    rows = []
    for steps, lr in itertools.product(options.steps, options.lr):
        rows.append({"steps": steps, "lr": lr})
        for name in ("AdamW", "shampoo"):
            loss, alignment = run_on_ranks(1, _train, steps, lr, name, init=False)
            rows[-1] |= {name: loss, f"alignment of {name}": alignment}
    console().print(table("Loss of AdamW and Shampoo, by lr", rows, _COLUMNS))


_COLUMNS = {
    "steps": ("steps", "{}"),
    "lr": ("lr", "{:g}"),
    "AdamW": ("AdamW", "{:.3f}"),
    "Shampoo": ("shampoo", "{:.3f}"),
    "alignment: AdamW": ("alignment of AdamW", "{:.2f}"),
    "alignment: Shampoo": ("alignment of shampoo", "{:.2f}"),
}


def _train(steps: int, lr: float, name: str) -> tuple[float, float]:
    from shampoo_torchtitan.train import JobReader, Trainer

    logging.getLogger().setLevel(logging.ERROR)
    with (
        tempfile.TemporaryDirectory() as folder,
        contextlib.redirect_stdout(io.StringIO()),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        settings = {
            "job.config_file": _JOB,
            "job.dump_folder": folder,
            "model.flavor": "tiny",
            "optimizer.name": name,
            "optimizer.lr": lr,
            "optimizer.shampoo.lr_factor": 1.0,
            "training.steps": steps,
        }
        arguments = [part for key, value in settings.items() for part in (f"--{key}", str(value))]
        arguments += ["--checkpoint.no-enable", "--metrics.no-enable_tensorboard"]
        trainer = Trainer(JobReader().parse_args(arguments))
        losses, alignments = _watch(trainer)
        batches = trainer.batch_generator(trainer.dataloader)
        while trainer.should_continue_training():
            trainer.step += 1
            trainer.train_step(batches)
        trainer.close()
    return statistics.fmean(losses[-_LAST:]), statistics.fmean(alignments)


def _watch(trainer: Any) -> tuple[list[float], list[float]]:
    """Lists that fill with the losses and alignments of the steps to come."""
    losses: list[float] = []
    alignments: list[float] = []
    hidden = [p for n, p in trainer.model_parts[0].named_parameters() if ".w" in n and p.ndim == 2]
    forward_backward, step = trainer.forward_backward_step, trainer.optimizers.step

    def watched(*args: Any, **kwargs: Any) -> Any:
        loss = forward_backward(*args, **kwargs)
        losses.append(float(loss.detach()))
        return loss

    def watched_step(*args: Any, **kwargs: Any) -> Any:
        before = [p.detach().clone() for p in hidden]
        result = step(*args, **kwargs)
        for old, p in zip(before, hidden, strict=True):
            update, gradient = (old - p.detach()).flatten(), p.grad.flatten()
            alignments.append(float(torch.cosine_similarity(update, gradient, dim=0)))
        return result

    trainer.forward_backward_step = watched
    trainer.optimizers.step = watched_step
    return losses, alignments


if __name__ == "__main__":
    main()

"""A whole training step of TorchTitan with Shampoo, over the same step with AdamW.

    python -m benchmarks.train_overhead
    python -m benchmarks.train_overhead --dim 512 --tokens 8192 --json

TorchTitan's own Trainer and train_step (forward, backward, clipping, optimizer) on a Llama 3 under
FSDP2, on forked CPU ranks. Each optimizer has a copy of the model in the same processes; they take
steps in turns on the same batches, for whole periods of refreshes.

Two figures: the whole step's, as measured, and one in which forward, backward and clipping, which
all optimizers do alike, are their mean over all of them; it is the less noisy one.
"""

import argparse
import copy
import dataclasses
import itertools
import json
import statistics
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.command import console, parser_of, table
from benchmarks.llama import block_flops
from benchmarks.ranks import run_on_ranks
from shampoo_torchtitan.generation import need_02

__all__ = ["main"]

SEQUENCE = 256
_FLAVOR = "benchmark"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = parser_of("benchmarks.train_overhead", __doc__)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocab", type=int, default=2048)
    parser.add_argument(
        "--tokens", type=int, nargs="+", default=[2048, 4096, 8192], help="per rank and step"
    )
    parser.add_argument(
        "--cap", type=int, nargs="+", default=[256, 1024], help="max_preconditioner_dim"
    )
    parser.add_argument(
        "--preconditioner", nargs="+", default=["kl_shampoo", "shampoo"], help="one or several"
    )
    parser.add_argument("--frequency", type=int, default=10, help="precondition_frequency")
    parser.add_argument("--periods", type=int, default=1, help="of refreshes, to measure")
    parser.add_argument("--json", action="store_true", help="figures as JSON instead of a table")
    options = parser.parse_args(arguments)
    if any(tokens % SEQUENCE for tokens in options.tokens):
        parser.error(f"--tokens must be multiples of {SEQUENCE}")
    need_02("benchmarks.train_overhead")
    # Here, so that ranks do not each import it, and after --help.
    import shampoo_torchtitan.train  # noqa: F401

    figures = run_on_ranks(options.ranks, _measure, options, init=False)
    if options.json:
        print(json.dumps({"settings": vars(options), "rows": figures}, indent=2))
        return
    console().print(table("A training step, over AdamW's", figures, _COLUMNS))


_COLUMNS = {
    "optimizer": ("optimizer", "{}"),
    "tokens per rank": ("tokens", "{:,}"),
    "step, ms": ("step_ms", "{:,.0f}"),
    "of it optimizer, ms": ("optimizer_ms", "{:.0f}"),
    "over AdamW": ("over_adamw", "{:.3f}"),
    "with shared forward and backward": ("over_adamw_pooled", "{:.3f}"),
    "1 + extra FLOPs, without roots": ("predicted", "{:.3f}"),
    "metrics of an interval, ms": ("metrics_ms", "{:.0f}"),
}


# ------------------------------------------------------------------------------- on the ranks


class _Contestant:
    """A model with an optimizer, which a Trainer can be made to train for a step."""

    def __init__(self, name: str, trainer: Any, optimizer_config: Any) -> None:
        self.name = name
        self._trainer = trainer
        self.model_parts = [_model(trainer)]
        config, spec = trainer.job_config, trainer.train_spec
        self.optimizers = spec.build_optimizers_fn(
            self.model_parts, optimizer_config, trainer.parallel_dims
        )
        self.lr_schedulers = spec.build_lr_schedulers_fn(
            self.optimizers, config.lr_scheduler, config.training.steps
        )
        self._optimizer_seconds = 0.0
        self._step = self.optimizers.step
        self.optimizers.step = self._timed_step

    def _timed_step(self) -> None:
        dist.barrier()  # a rank that came late is late in forward and backward
        start = time.perf_counter()
        self._step()
        self._optimizer_seconds = time.perf_counter() - start

    def train(self, batch: tuple[dict[str, Tensor], Tensor]) -> tuple[float, float]:
        """Seconds of one step, and of the optimizer in it, on the slowest rank."""
        trainer = self._trainer
        trainer.model_parts = self.model_parts
        trainer.optimizers = self.optimizers
        trainer.lr_schedulers = self.lr_schedulers
        dist.barrier()
        start = time.perf_counter()
        trainer.train_step(iter([batch]))
        seconds = torch.tensor([time.perf_counter() - start, self._optimizer_seconds])
        dist.all_reduce(seconds, dist.ReduceOp.MAX)
        return seconds[0].item(), seconds[1].item()

    def log_metrics(self) -> float:
        """Seconds that the figures of one log interval take, on the slowest rank."""
        processor = self._trainer.metrics_processor
        processor.optimizers, processor.lr_schedulers = self.optimizers, self.lr_schedulers
        processor.data_loading_times.append(0.0)
        dist.barrier()
        start = time.perf_counter()
        processor.log(1, 0.0, 0.0, 0.0)
        seconds = torch.tensor(time.perf_counter() - start)
        dist.all_reduce(seconds, dist.ReduceOp.MAX)
        return seconds.item()

    def warm_up(self, batch: tuple[dict[str, Tensor], Tensor], steps: int) -> None:
        """Bring the optimizer to where each period costs the same."""
        self.train(batch)
        for _ in range(steps - 1):
            self._step()  # with the same gradients


def _measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        trainer = _trainer(options, folder)
        try:
            return _measured(options, trainer)
        finally:
            trainer.close()


def _measured(options: argparse.Namespace, trainer: Any) -> list[dict[str, Any]]:
    adamw = trainer.job_config.optimizer
    contestants = [_Contestant("AdamW", trainer, adamw)]
    ours = list(itertools.product(options.preconditioner, options.cap))
    for preconditioner, cap in ours:
        config = copy.copy(adamw)
        config.name = "shampoo"
        config.shampoo = dataclasses.replace(
            adamw.shampoo,
            preconditioner=preconditioner,
            max_preconditioner_dim=cap,
            precondition_frequency=options.frequency,
            refresh_warmup_steps=0,  # what is measured is the cost in the long run
        )
        contestants.append(_Contestant(f"{preconditioner}, {cap}", trainer, config))
    for contestant in contestants:
        contestant.warm_up(next(_batches(options, SEQUENCE)), 2 * options.frequency)
    shapes = _preconditioned(contestants)
    parameters = sum(p.numel() for p in contestants[0].model_parts[0].parameters())
    figures = []
    for tokens in options.tokens:
        times: dict[str, list[tuple[float, float]]] = {c.name: [] for c in contestants}
        batches = _batches(options, tokens)
        for c in contestants:
            c.train(next(batches))  # its first batch of a size takes longer
        for _ in range(options.periods * options.frequency):
            batch = next(batches)
            for c in contestants:
                times[c.name].append(c.train(batch))
        predicted = [1.0] + [
            1.0
            + block_flops(shapes, cap, preconditioner) / (6.0 * parameters * options.ranks * tokens)
            for preconditioner, cap in ours
        ]
        logging = {
            c.name: statistics.median(c.log_metrics() for _ in range(5)) for c in contestants
        }
        figures += _figures(tokens, times, logging, predicted)
    return figures


def _figures(
    tokens: int,
    times: dict[str, list[tuple[float, float]]],
    logging: dict[str, float],
    predicted: Sequence[float],
) -> list[dict[str, Any]]:
    steps = {name: statistics.fmean(step for step, _ in own) for name, own in times.items()}
    optimizers = {name: statistics.fmean(opt for _, opt in own) for name, own in times.items()}
    shared = statistics.fmean(steps[name] - optimizers[name] for name in times)
    return [
        {
            "optimizer": name,
            "tokens": tokens,
            "step_ms": 1e3 * steps[name],
            "optimizer_ms": 1e3 * optimizers[name],
            "over_adamw": steps[name] / steps["AdamW"],
            "over_adamw_pooled": (shared + optimizers[name]) / (shared + optimizers["AdamW"]),
            "predicted": expected,
            "metrics_ms": 1e3 * logging[name],
        }
        for name, expected in zip(times, predicted, strict=True)
    ]


def _trainer(options: argparse.Namespace, folder: str) -> Any:
    """TorchTitan's, for a job with AdamW."""
    from torchtitan.models.llama3 import TransformerModelArgs, llama3_args
    from torchtitan.tools.logging import logger

    from shampoo_torchtitan.train import JobReader, Trainer

    logger.disabled = True
    warnings.filterwarnings("ignore", message="'set_vital' is deprecated")
    # Hidden layers of 8/3 dim, rounded up to multiples of 64, as Llama's.
    llama3_args[_FLAVOR] = TransformerModelArgs(
        dim=options.dim,
        n_layers=options.layers,
        n_heads=max(1, options.dim // 64),
        vocab_size=options.vocab,
        multiple_of=64,
        rope_theta=10000,
    )
    job = {
        "job.dump_folder": folder,
        "model.name": "llama3",
        "model.flavor": _FLAVOR,
        "model.hf_assets_path": f"{folder}/tokenizer",
        "optimizer.name": "AdamW",
        "training.dataset": "python_source",
        "training.local_batch_size": 1,
        "training.seq_len": SEQUENCE,
        "metrics.log_freq": 10**9,
    }
    from shampoo_torchtitan.demo.byte_tokenizer import write_byte_tokenizer

    write_byte_tokenizer(f"{folder}/tokenizer")
    arguments = [text for key, value in job.items() for text in (f"--{key}", str(value))]
    trainer = Trainer(JobReader().parse_args([*arguments, "--checkpoint.no-enable"]))
    trainer.step = 2  # the first is always logged
    return trainer


def _model(trainer: Any) -> Any:
    """As the Trainer makes its own, with the same parameters."""
    from torchtitan.tools import utils

    config = trainer.job_config
    with torch.device("meta"), utils.set_default_dtype(torch.float32):
        model = trainer.train_spec.model_cls(trainer.model_args)
    model = trainer.train_spec.parallelize_fn(model, trainer.parallel_dims, config)
    model.to_empty(device="cpu")
    with torch.no_grad():
        model.init_weights(buffer_device=None)
    model.train()
    own = trainer.model_parts[0].state_dict()
    model.load_state_dict(own)
    return model


def _preconditioned(contestants: Sequence[_Contestant]) -> list[tuple[int, int]]:
    """Shapes of the matrices that Shampoo does not leave to AdamW."""
    model, container = contestants[-1].model_parts[0], contestants[-1].optimizers
    left = {name for o in container.optimizers for name in o.matrices_left_to_grafting()}
    return [
        (p.shape[0], p.shape[1])
        for name, p in model.named_parameters()
        if p.ndim == 2 and name not in left
    ]


def _batches(
    options: argparse.Namespace, tokens: int
) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
    generator = torch.Generator().manual_seed(dist.get_rank())
    shape = (tokens // SEQUENCE, SEQUENCE + 1)
    while True:
        ids = torch.randint(options.vocab, shape, generator=generator)
        yield {"input": ids[:, :-1]}, ids[:, 1:]


if __name__ == "__main__":
    main()

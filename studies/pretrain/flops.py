"""What a run costs in FLOPs of matrix products, which is most of what it costs on a GPU."""

import statistics
from collections.abc import Iterator
from typing import Any
from unittest import mock

from torch.utils.flop_counter import FlopCounterMode

from shampoo_fsdp import ShampooConfig
from studies.pretrain.job import trainer_of
from studies.pretrain.plan import Study
from studies.pretrain.results import Results
from studies.pretrain.summary import BASELINE, at, seconds, summaries, target

__all__ = ["flops_of_a_step", "table"]

_PERIOD = "optimizer.shampoo.precondition_frequency"  # in steps, after which the cost repeats
_AS_ON_GPUS = {
    "optimizer.shampoo.refresh_warmup_steps": 0,  # as in the long run
    "optimizer.shampoo.root_method": "polynomial",  # `eigh` does not consist of products
}


def flops_of_a_step(settings: dict[str, Any]) -> tuple[float, float]:
    """FLOPs of forward and backward, without attention's own, which PyTorch does not count on CPUs,
    and of the optimizer, mean of a period of refreshes.

    Args:
        settings: A job's, see :func:`studies.pretrain.job.run`; what depends on the device is
            counted as on a GPU.
    """
    if settings["optimizer.name"] == "shampoo":
        settings = settings | _AS_ON_GPUS
    period = settings.get(_PERIOD, ShampooConfig.precondition_frequency)
    with trainer_of(settings) as trainer:
        counted = {"forward_backward_step": 0, "step": 0}

        def watched(owner: Any, name: str) -> Any:
            original = getattr(owner, name)

            def call(*args: Any, **kwargs: Any) -> Any:
                with FlopCounterMode(display=False) as counter:
                    result = original(*args, **kwargs)
                if trainer.step > period:  # the first refresh is of all matrices at once
                    counted[name] += counter.get_total_flops()
                return result

            return mock.patch.object(owner, name, call)

        with watched(trainer, "forward_backward_step"), watched(trainer.optimizers, "step"):
            for trainer.step in range(1, 2 * period + 1):
                trainer.train_step(trainer.batches)
    return counted["forward_backward_step"] / period, counted["step"] / period


def table(study: Study, size: str, contestants: list[str], results: Results) -> Iterator[str]:
    """Lines in Markdown: the FLOPs of a step and to the target, and the losses of all where the
    baseline's run has ended, at the same FLOPs and at the same time."""
    found = summaries(study, size, contestants, results)
    aim = target(found)
    if aim is None:
        return
    each = {s.contestant: flops_of_a_step(s.settings) for s in found}
    steps, time = next(s.whole() for s in found if s.contestant == BASELINE)
    whole = steps * sum(each[BASELINE])
    yield (
        f"{size}: {BASELINE}'s whole run takes {whole / 1e15:.3f} PFLOP of matrix products "
        f"(attention's own left out) and {time:.0f} s"
    )
    yield ""
    yield (
        "| optimizer | forward and backward, GFLOP per step | optimizer | PFLOP to target "
        "| loss after as many FLOPs | loss after as many seconds |"
    )
    yield "|---|---|---|---|---|---|"
    for summary in found:
        passes, optimizer = each[summary.contestant]
        reached = [r and r[0] for r in summary.to_target(aim)]
        if summary.contestant == BASELINE:  # its full run, which the others are compared with
            reached = [steps]
        to_target = "never"
        if None not in reached:
            flops = statistics.fmean(reached) * (passes + optimizer)
            to_target = f"{flops / 1e15:.3f}"
            if summary.contestant != BASELINE:
                to_target += f" ({flops / whole - 1:+.0%})"
        by_flops = [at(r, r["step"], whole / (passes + optimizer)) for r in summary.final]
        by_time = [at(r, seconds(r), time) for r in summary.final]
        cells = [
            summary.contestant,
            f"{passes / 1e9:.1f}",
            f"{optimizer / 1e9:.2f}",
            to_target,
            f"{statistics.fmean(by_flops):.4f}",
            f"{statistics.fmean(by_time):.4f}",
        ]
        yield f"| {' | '.join(cells)} |"

"""What a run costs in FLOPs of matrix products. Memory traffic, which takes most of an optimizer's
step on a GPU, is not in it."""

import statistics
from collections.abc import Mapping
from typing import Any

from torch.utils.flop_counter import FlopCounterMode

from benchmarks.command import markdown_table
from shampoo_fsdp import ShampooConfig
from shampoo_fsdp.plan.shards import ParameterSpec
from shampoo_fsdp.tools.dry_step import dry_optimizer, dry_step
from shampoo_fsdp.tools.machine import Machine
from studies.pretrain.job import trainer_of
from studies.pretrain.plan import Study
from studies.pretrain.results import Results
from studies.pretrain.summary import BASELINE, at, seconds, summaries, target

_SHAMPOO = "optimizer.shampoo."


def flops_of_a_step(settings: Mapping[str, Any]) -> tuple[float, float]:
    """FLOPs of forward and backward, without attention's own, which PyTorch does not count on CPUs,
    and of the optimizer.

    Of Shampoo they are those of a GPU, mean of a period of refreshes in the long run: a product in
    16 bits is three of bf16 there. Decompositions are not counted.

    Args:
        settings: A job's, see :func:`studies.pretrain.job.run`.
    """
    with trainer_of(dict(settings)) as trainer:
        passes = _count(trainer, "forward_backward_step")
        optimizer = _count(trainer.optimizers, "step")
        trainer.step = 1
        trainer.train_step(trainer.batches)
        (model,) = trainer.model_parts
        shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    if settings["optimizer.name"] == "shampoo":
        return sum(passes), _of_shampoo(shapes, settings)
    return sum(passes), sum(optimizer)


def _count(owner: Any, name: str) -> list[int]:
    """A list of what each call of a method from now on takes."""
    found, call = list[int](), getattr(owner, name)

    def counted(*args: Any, **kwargs: Any) -> Any:
        with FlopCounterMode(display=False) as counter:
            result = call(*args, **kwargs)
        found.append(counter.get_total_flops())
        return result

    setattr(owner, name, counted)
    return found


def _of_shampoo(shapes: Mapping[str, tuple[int, ...]], settings: Mapping[str, Any]) -> float:
    config = ShampooConfig(
        **{name[len(_SHAMPOO) :]: x for name, x in settings.items() if name.startswith(_SHAMPOO)}
    )
    specs = [ParameterSpec(name, shape, (0,), (), ()) for name, shape in shapes.items()]
    with dry_optimizer(specs, config, 0) as optimizer:
        period = range(config.precondition_frequency)
        steps = [dry_step(optimizer, Machine()).total for _ in period]
    return statistics.fmean(step["bf16"] + step["tf32"] + step["fp32"] for step in steps)


def table(study: Study, size: str, contestants: list[str], results: Results) -> str:
    """In Markdown: the FLOPs of a step and to the target, and the losses of all where the
    baseline's run has ended, at the same FLOPs and at the same time."""
    found = summaries(study, size, contestants, results)
    aim = target(found)
    if aim is None:
        return ""
    each = {s.contestant: flops_of_a_step(s.settings) for s in found}
    steps, time = next(s.whole() for s in found if s.contestant == BASELINE)
    whole = steps * sum(each[BASELINE])
    title = (
        f"{size}: {BASELINE}'s whole run takes {whole / 1e15:.3f} PFLOP of matrix products "
        f"(without attention's own and decompositions) and {time:.0f} s"
    )
    heads = [
        *("optimizer", "forward and backward, GFLOP per step", "optimizer", "PFLOP to target"),
        *("loss after as many FLOPs", "loss after as many seconds"),
    ]
    rows = []
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
        rows.append(cells)
    return f"{title}\n\n{markdown_table(heads, rows)}"

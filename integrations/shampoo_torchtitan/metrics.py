"""Adds Shampoo's counters and diagnostics to TorchTitan's metrics: log, TensorBoard and W&B."""

import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torchtitan.components.metrics import MetricsProcessor
from torchtitan.tools.logging import logger

from shampoo_fsdp import Shampoo
from shampoo_fsdp.runtime.diagnostics import merged
from shampoo_torchtitan.container import shampoos_of

_NAMES = ("root_refreshes", "failed_roots", "skipped_blocks", "skipped_entries")
_titan_log = MetricsProcessor.log


@functools.wraps(_titan_log)
def _log(
    self: Any,
    step: int,
    global_avg_loss: float,
    global_max_loss: float,
    grad_norm: float,
    extra_metrics: dict[str, Any] | None = None,
) -> None:
    """Every rank calls this at the same step, as TorchTitan does: ranks add their counters."""
    if not (shampoos := shampoos_of(self.optimizers)):
        _titan_log(self, step, global_avg_loss, global_max_loss, grad_norm, extra_metrics)
        return
    counts, figures = _of_all_ranks(shampoos)
    ours = {f"shampoo/{name}": value for name, value in (counts | figures).items()}
    extra_metrics = (extra_metrics or {}) | ours
    _titan_log(self, step, global_avg_loss, global_max_loss, grad_norm, extra_metrics)
    said = ", ".join(f"{count:,} {name.replace('_', ' ')}" for name, count in counts.items())
    logger.info(f"shampoo so far: {said}")
    parts = [f"{n[3:]} {ms:.1f}" for n, ms in figures.items() if n.startswith("ms/")]
    logger.info(f"shampoo's last step, ms on the slowest rank: {', '.join(parts)}")


def _of_all_ranks(shampoos: Sequence[Shampoo]) -> tuple[dict[str, int], dict[str, float]]:
    """Counters, summed, and figures of the last step; no rank may be left out."""
    counters = torch.stack([optimizer.counters() for optimizer in shampoos]).sum(0)
    mine = [optimizer.diagnostics() for optimizer in shampoos]
    everyone = [mine]
    if dist.is_initialized():
        dist.all_reduce(counters)
        everyone = [mine] * dist.get_world_size()
        dist.all_gather_object(everyone, mine)
    figures = dict(merged(figures for rank in everyone for figures in rank))
    figures["mib_sent_per_step"] = sum(o.summary()["mib_sent_per_step_max"] for o in shampoos)
    return dict(zip(_NAMES, map(int, counters.tolist()), strict=True)), figures


def extend_metrics() -> None:
    """Lets TorchTitan's metrics have Shampoo's, where there are some; calling it again changes
    nothing. (There is no hook: how a step is logged is no choice of the job.)"""
    MetricsProcessor.log = _log  # type: ignore[method-assign]

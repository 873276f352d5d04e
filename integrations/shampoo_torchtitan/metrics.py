"""Adds Shampoo's counters and diagnostics to TorchTitan's metrics: log, TensorBoard and W&B."""

import functools
from typing import Any

import torch.distributed as dist
from torchtitan.components.metrics import MetricsProcessor
from torchtitan.tools.logging import logger

from shampoo_fsdp.runtime.diagnostics import merged
from shampoo_torchtitan.container import ShampooContainer

__all__ = ["extend_metrics"]

_NAMES = ("root_refreshes", "failed_roots", "skipped_blocks", "skipped_entries")


_titan_log = MetricsProcessor.log


@functools.wraps(_titan_log)
def _log(
    self: MetricsProcessor,
    step: int,
    global_avg_loss: float,
    global_max_loss: float,
    grad_norm: float,
    extra_metrics: dict[str, Any] | None = None,
) -> None:
    """Every rank calls this at the same step, as TorchTitan does: ranks add their counters."""
    container: Any = self.optimizers
    if not (isinstance(container, ShampooContainer) and container.shampoos):
        _titan_log(self, step, global_avg_loss, global_max_loss, grad_norm, extra_metrics)
        return
    counts, figures = _counters(container), _figures(container)
    ours = {f"shampoo/{name}": n for name, n in zip(_NAMES, counts, strict=True)}
    ours |= {f"shampoo/{name}": value for name, value in figures.items()}
    extra_metrics = (extra_metrics or {}) | ours
    _titan_log(self, step, global_avg_loss, global_max_loss, grad_norm, extra_metrics)
    refreshes, failed, blocks, entries = counts
    logger.info(
        f"shampoo so far: {refreshes:,} root refreshes, {failed:,} failed, "
        f"{blocks:,} blocks and {entries:,} entries of other parameters skipped for a "
        "non-finite gradient"
    )
    parts = [f"{n[3:]} {ms:.1f}" for n, ms in figures.items() if n.startswith("ms/")]
    logger.info(f"shampoo's last step, ms on the slowest rank: {', '.join(parts)}")


def _counters(container: ShampooContainer) -> list[int]:
    counters = container.counters()
    if dist.is_initialized():
        dist.all_reduce(counters)
    return [int(n) for n in counters.tolist()]


def _figures(container: ShampooContainer) -> dict[str, float]:
    """Of all ranks; none may be left out."""
    mine = container.diagnostics()
    everyone = [mine]
    if dist.is_initialized():
        everyone = [mine] * dist.get_world_size()
        dist.all_gather_object(everyone, mine)
    return {
        **merged(figures for rank in everyone for figures in rank),
        "mib_sent_per_step": container.mib_sent_per_step(),
    }


def extend_metrics() -> None:
    """Lets TorchTitan's metrics have Shampoo's, where there are some; calling it again changes
    nothing. (There is no hook: how a step is logged is no choice of the job.)"""
    MetricsProcessor.log = _log  # type: ignore[method-assign]

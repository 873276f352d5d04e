"""Adds Shampoo's counters and diagnostics to TorchTitan's metrics: log, TensorBoard and W&B."""

from typing import Any

import torch.distributed as dist
import torchtitan.components.metrics as titan
from torchtitan.tools.logging import logger

from shampoo_fsdp.runtime.diagnostics import merged
from shampoo_torchtitan.optimizer import ShampooContainer

__all__ = ["ShampooMetricsProcessor", "register"]

_NAMES = ("root_refreshes", "failed_roots", "skipped_blocks", "skipped_entries")


class ShampooMetricsProcessor(titan.MetricsProcessor):
    """TorchTitan's metrics, and for Shampoo how often roots were refreshed and trouble avoided."""

    def log(
        self,
        step: int,
        global_avg_loss: float,
        global_max_loss: float,
        grad_norm: float,
        extra_metrics: dict[str, Any] | None = None,
    ) -> None:
        """Every rank calls this at the same step, as TorchTitan does: ranks add their counters."""
        counts = self._counters()
        if counts:
            ours = {f"shampoo/{name}": n for name, n in zip(_NAMES, counts, strict=True)}
            extra_metrics = {**(extra_metrics or {}), **ours}
            figures = self._figures()
            extra_metrics |= {f"shampoo/{name}": value for name, value in figures.items()}
        super().log(step, global_avg_loss, global_max_loss, grad_norm, extra_metrics)
        if counts:
            refreshes, failed, blocks, entries = counts
            logger.info(
                f"shampoo so far: {refreshes:,} root refreshes, {failed:,} failed, "
                f"{blocks:,} blocks and {entries:,} entries of other parameters skipped for a "
                "non-finite gradient"
            )
            parts = [f"{n[3:]} {ms:.1f}" for n, ms in figures.items() if n.startswith("ms/")]
            logger.info(f"shampoo's last step, ms on the slowest rank: {', '.join(parts)}")

    def _counters(self) -> list[int] | None:
        if not isinstance(self.optimizers, ShampooContainer):
            return None
        counters = self.optimizers.counters()
        if dist.is_initialized():
            dist.all_reduce(counters)
        return [int(n) for n in counters.tolist()]

    def _figures(self) -> dict[str, float]:
        """Of all ranks; none may be left out."""
        mine = self.optimizers.diagnostics()
        everyone = [mine]
        if dist.is_initialized():
            everyone = [mine] * dist.get_world_size()
            dist.all_gather_object(everyone, mine)
        return {
            **merged(figures for rank in everyone for figures in rank),
            "mib_sent_per_step": self.optimizers.mib_sent_per_step(),
        }


def register() -> None:
    """Puts our class in the place of TorchTitan's, which its builder looks up when called."""
    titan.MetricsProcessor = ShampooMetricsProcessor  # type: ignore[misc]

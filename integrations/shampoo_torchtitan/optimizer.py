"""Builds Shampoo where a job of TorchTitan 0.2 says `[optimizer] name = "shampoo"`."""

import sys
from typing import Any

import torch
import torchtitan.components.optimizer as titan
from torch.distributed.device_mesh import DeviceMesh
from torchtitan.components.optimizer import OptimizersContainer
from torchtitan.distributed import ParallelDims

from shampoo_fsdp import Shampoo, ShampooConfig
from shampoo_fsdp.model_groups import typed_parameters
from shampoo_torchtitan import checkpoint, container, metrics

NAME = "shampoo"

_titan_build_optimizers = titan.build_optimizers


class _Container(OptimizersContainer):
    """TorchTitan's container of optimizers, with one Shampoo per model part.

    Its siblings make the optimizer from parameters alone; Shampoo is given their names too, and
    which of them are embeddings.

    Args:
        model_parts: The parts of the model on this rank; several under pipeline parallelism.
        settings: Keyword arguments of Shampoo.
        replicas: The ranks that hold the same plain tensors (DDP); None if parameters are DTensors.
    """

    def __init__(
        self,
        model_parts: list[torch.nn.Module],
        settings: dict[str, Any],
        replicas: DeviceMesh | None = None,
    ) -> None:
        self.model_parts = model_parts
        self.optimizers = []
        parameters = []
        for model in model_parts:
            named = typed_parameters(model)
            self.optimizers.append(Shampoo(named, replicas=replicas, **settings))
            parameters.extend(p for _, p in named)
        self._validate_length(len(model_parts))
        self._post_init(parameters, {})


def build_optimizers(
    model_parts: list[torch.nn.Module],
    optimizer_config: Any,
    parallel_dims: ParallelDims,
    ft_manager: Any = None,
) -> OptimizersContainer:
    """In the place of TorchTitan's function of this name, which all its models call.

    Args:
        model_parts: The parts of the model on this rank, already parallelized.
        optimizer_config: The job's `[optimizer]` table.
        parallel_dims: The job's meshes.
        ft_manager: TorchFT's manager; Shampoo does not support it.

    Returns:
        Shampoo if the name is "shampoo" in any case, else what TorchTitan returns.

    Raises:
        JobError: Shampoo's settings do not fit the model.
        ValueError: Shampoo together with early_step_in_backward or TorchFT.
    """
    if optimizer_config.name.lower() != NAME:
        return _titan_build_optimizers(model_parts, optimizer_config, parallel_dims, ft_manager)
    refuse_unsupported(optimizer_config, ft_manager is not None and ft_manager.enabled)
    # DDP keeps plain tensors, which do not say with whom they are replicated.
    ddp = parallel_dims.dp_replicate_enabled and not parallel_dims.fsdp_enabled
    replicas = parallel_dims.get_mesh("dp_replicate") if ddp else None
    with container.alike_on_all_ranks():
        settings = container.hyperparameters(optimizer_config)
        settings["config"] = container.with_heads(settings_of(optimizer_config), model_parts)
        ours = _Container(model_parts, settings, replicas)
        container.log_summary(ours.optimizers)  # with it all are planned: what may be refused
    chosen = optimizer_config.implementation
    for optimizer in ours.optimizers:
        container.complete_groups(optimizer, fused=chosen == "fused", foreach=chosen == "foreach")
    checkpoint.extend_checkpoints()
    metrics.extend_metrics()
    return ours


def settings_of(optimizer_config: Any) -> ShampooConfig:
    """The table [optimizer.shampoo]; all defaults without the custom config module."""
    return getattr(optimizer_config, "shampoo", None) or ShampooConfig()


def refuse_unsupported(optimizer_config: Any, with_torchft: bool) -> None:
    """Raise a ValueError for what TorchTitan offers and Shampoo cannot do."""
    both = {
        "optimizer.early_step_in_backward": optimizer_config.early_step_in_backward,
        "fault_tolerance.enable": with_torchft,
    }
    for name, given in both.items():
        if given:
            raise ValueError(f'{name} = true: must be false with optimizer.name = "shampoo"')


def register() -> None:
    """Puts our `build_optimizers` in the place of TorchTitan's.

    MoE models reach it through TorchTitan's global; others have copied that global at import.
    """
    for name, module in list(sys.modules.items()):
        found = vars(module).get("build_optimizers") if name.startswith("torchtitan.") else None
        if found is _titan_build_optimizers:
            module.build_optimizers = build_optimizers  # type: ignore[attr-defined]

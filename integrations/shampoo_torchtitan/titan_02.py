"""TorchTitan 0.2, whose jobs are TOML files."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torchtitan.config import TORCH_DTYPE_MAP, ConfigManager
from torchtitan.distributed import ParallelDims
from torchtitan.protocols.train_spec import get_train_spec
from torchtitan.tools import utils

from shampoo_fsdp import ShampooConfig
from shampoo_fsdp.hyperparameters import validate_hyperparameters
from shampoo_fsdp.validation import check_fields, field_types, refuse
from shampoo_torchtitan import cpu, job_config
from shampoo_torchtitan.container import hyperparameters
from shampoo_torchtitan.generation import register_demo
from shampoo_torchtitan.optimizer import refuse_unsupported, settings_of
from shampoo_torchtitan.optimizer import register as register_optimizer

loads_remote_folders = False
"""Whether a job goes on from checkpoints in `s3://...` and the like."""


class Reader(ConfigManager):
    """Reads a job as TorchTitan does, with our settings in it even if it does not ask for them."""

    def _maybe_add_custom_config(self, args: list[str], toml_values: Any) -> Any:
        cls = super()._maybe_add_custom_config(args, toml_values)
        if "shampoo" not in field_types(field_types(cls)["optimizer"]):
            cls = self._merge_configs(cls, job_config.JobConfig)
        check_fields(cls, toml_values or {})
        return cls

    def _validate_config(self) -> None:
        super()._validate_config()
        if self.config.experimental.custom_import in ("", "shampoo_torchtitan"):
            _model_args(self.config)  # (what others import may add models)
        optimizer = self.config.optimizer
        if optimizer.name.lower() != "shampoo":
            if optimizer.name.lower().startswith("sham"):
                refuse("optimizer.name", optimizer.name, "'shampoo', 'Adam' or 'AdamW'")
        else:
            refuse_unsupported(optimizer, self.config.fault_tolerance.enable)
            validate_hyperparameters(settings_of(optimizer), **hyperparameters(optimizer))


def register() -> None:
    """Make Shampoo, and what the demo trains, known to TorchTitan."""
    register_optimizer()
    register_demo()


def parallel_dims(config: Any, world_size: int) -> ParallelDims:
    """A job's ParallelDims; an AssertionError if its degrees do not fit."""
    degrees = config.parallelism
    return ParallelDims(
        dp_replicate=degrees.data_parallel_replicate_degree,
        dp_shard=degrees.data_parallel_shard_degree,
        cp=degrees.context_parallel_degree,
        tp=degrees.tensor_parallel_degree,
        pp=degrees.pipeline_parallel_degree,
        ep=degrees.expert_parallel_degree,
        etp=degrees.expert_tensor_parallel_degree,
        world_size=world_size,
    )


def fit_to_cpu(config: Any) -> list[str]:
    """Change what cannot work without a GPU; one `table.key = value` for each change."""
    wanted = {
        ("activation_checkpoint", "mode"): "none",  # it saves GPU memory and costs time
        ("profiling", "enable_memory_snapshot"): False,  # of the GPU's allocator
    }
    return cpu.fit(config, wanted)


def with_trainer(config: Any, trainer: type[Any]) -> Any:
    """The job, for this trainer in the place of TorchTitan's own."""
    return config


def main(trainer: type[Any]) -> None:
    """Run TorchTitan's launcher."""
    from torchtitan.train import main  # here: it may be `__main__`

    main(trainer)


def model_of(config: Any) -> str:
    """The name and flavor of the model."""
    return f"{config.model.name} {config.model.flavor}"


def shampoo_of(config: Any, names: Sequence[str]) -> ShampooConfig:
    """The settings that parameters of these names get."""
    return settings_of(config.optimizer)


def keep_parameters_alone(config: Any) -> None:
    """Do what the trainer does first, and switch off what changes no parameter."""
    config.compile.enable = False
    config.activation_checkpoint.mode = "none"
    config.model.converters = []


def _model_args(config: Any) -> Any:
    flavors = get_train_spec(config.model.name).model_args
    if config.model.flavor not in flavors:
        refuse("model.flavor", config.model.flavor, " or ".join(map(repr, flavors)))
    return flavors[config.model.flavor]


def model_parts(config: Any, dims: ParallelDims) -> list[nn.Module]:
    """The parts of the model on this rank, parallelized, without memory."""
    train_spec: Any = get_train_spec(config.model.name)
    model_args = _model_args(config)
    model_args.update_from_config(config)
    dtype = TORCH_DTYPE_MAP[config.training.dtype]
    with torch.device("meta"), utils.set_default_dtype(dtype):
        model: Any = train_spec.model_cls(model_args)
    if not dims.pp_enabled:
        return [train_spec.parallelize_fn(model, dims, config)]
    _, parts, _, _ = train_spec.pipelining_fn(
        model,
        dims,
        config,
        torch.device("cpu"),
        model_args,
        train_spec.parallelize_fn,
        train_spec.build_loss_fn(config, parallel_dims=dims),
    )
    return parts  # type: ignore[no-any-return]

"""TorchTitan from 0.3 on, whose jobs are functions, and TOML files as in 0.2 here."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torchtitan.config import TORCH_DTYPE_MAP, ConfigManager
from torchtitan.config.override import apply_overrides, derive
from torchtitan.distributed import ParallelDims
from torchtitan.models.common.attention import FlexAttention, VarlenAttention
from torchtitan.tools import utils
from torchtitan.trainer import Trainer

from shampoo_fsdp import ShampooConfig
from shampoo_torchtitan import cpu, toml
from shampoo_torchtitan.generation import groups, register_demo, text

loads_remote_folders = True
"""Whether a job goes on from checkpoints in `s3://...` and the like."""


class Reader(ConfigManager):
    """Reads a job as TorchTitan does, and TOML files under the name that they have in 0.2."""

    def _load_config(self, args: list[str]) -> tuple[Any, list[str]]:
        overrides, others, left = dict[str, Any](), list[str](), list(args)
        while left:
            option, equals, value = left.pop(0).partition("=")
            name = option.removeprefix("--").replace("-", "_")
            if not (option.startswith("--") and toml.is_of_files(name)):
                others.append(option + equals + value)
                continue
            if not equals and left and not left[0].startswith("--"):
                equals, value = "=", left.pop(0)
            overrides[name] = toml.value_of(value) if equals else True
        if "job.config_file" not in overrides and any(a.startswith("--module") for a in args):
            return super()._load_config(args)  # type: ignore[no-any-return]
        if cpu.needed():  # known already when settings of the command line are checked
            overrides["training.disable_cuda_graphs"] = True
        return toml.read(f"{overrides.pop('job.config_file', '')}", overrides), others


def register() -> None:
    """Make Shampoo, and what the demo trains, known to TorchTitan."""
    register_demo()


def parallel_dims(config: Any, world_size: int) -> ParallelDims:
    """A job's ParallelDims; an AssertionError if its degrees do not fit."""
    return ParallelDims.from_config(config.parallelism, world_size)


def fit_to_cpu(config: Any) -> list[str]:
    """Change what cannot work without a GPU; one `table.key = value` for each change."""
    wanted = {
        ("training", "disable_cuda_graphs"): True,
        ("profiler", "enable_memory_snapshot"): False,
        ("debug", "enable_structured_logging"): False,
    }
    if not cpu.AT_LEAST_2_14:
        wanted["parallelism", "spmd_backend"] = "partial_dtensor"  # the others need 2.14
    changes = cpu.fit(config, wanted)
    if config.activation_checkpoint is not None:
        config.activation_checkpoint = None
        changes.append("activation_checkpoint.mode = none")
    for kind in (FlexAttention.Config, VarlenAttention.Config):
        for _, _, parent, name in list(config.model_spec.model.traverse(kind)):
            setattr(parent, name, text().attention(config))
    return changes


def with_trainer(config: Any, trainer: type[Any]) -> Any:
    """The job, for this trainer in the place of TorchTitan's own."""
    if type(config) is not Trainer.Config:
        return config  # a user's own trainer

    @dataclass(kw_only=True, slots=True)
    class Config(Trainer.Config):
        """A configuration builds the class that it is a part of."""

    Config._owner = trainer
    return derive(config, Config)


def main(trainer: type[Any]) -> None:
    """Run TorchTitan's launcher."""
    from torchtitan.train import main  # here: it may be `__main__`

    main()


def model_of(config: Any) -> str:
    """The name and flavor of the model."""
    return f"{config.model_spec.name} {config.model_spec.flavor}"


def shampoo_of(config: Any, names: Sequence[str]) -> ShampooConfig:
    """The settings that parameters of these names get."""
    return groups().settings(config.optimizer, names)  # type: ignore[no-any-return]


def keep_parameters_alone(config: Any) -> None:
    """Do what the trainer does first, and switch off what changes no parameter."""
    if config.override.imports:
        apply_overrides(config.override, config)
        config.override.imports = []
    config.compile.enable = False
    config.activation_checkpoint = None
    # The same placements as with others, which need 2.14, and there refuse some pipelines.
    config.parallelism.spmd_backend = "partial_dtensor"


def model_parts(config: Any, dims: ParallelDims) -> list[nn.Module]:
    """The parts of the model on this rank, parallelized, without memory."""
    spec = config.model_spec
    spec.model.update_from_config(config=config)
    dtype = TORCH_DTYPE_MAP[config.training.dtype]
    with torch.device("meta"), utils.set_default_dtype(dtype):
        model: Any = spec.model.build()
    common = {
        "parallel_dims": dims,
        "training": config.training,
        "parallelism": config.parallelism,
        "compile_config": config.compile,
        "ac_config": config.activation_checkpoint,
        "dump_folder": config.dump_folder,
    }
    if not dims.pp_enabled:
        return [spec.parallelize_fn(model, **common)]
    _, parts, _, _ = spec.pipelining_fn(
        model,
        **common,
        device=torch.device("cpu"),
        model_config=spec.model,
        parallelize_fn=spec.parallelize_fn,
        loss_fn=config.loss.build(compile_config=config.compile),
    )
    return parts  # type: ignore[no-any-return]

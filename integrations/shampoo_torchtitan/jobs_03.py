"""Jobs of TorchTitan 0.3: functions, and TOML files as in 0.2; its trainer, and what the plan asks
for."""

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torchtitan.config import TORCH_DTYPE_MAP, ConfigManager
from torchtitan.config.override import apply_overrides
from torchtitan.distributed import ParallelDims
from torchtitan.tools import utils
from torchtitan.trainer import Trainer as TitanTrainer

from shampoo_fsdp import ShampooConfig
from shampoo_fsdp.runtime.choice import exactly
from shampoo_torchtitan import configs, toml
from shampoo_torchtitan.demo import byte_tokenizer, cpu
from shampoo_torchtitan.demo.cpu import fit_trainer_config as fit_to_cpu
from shampoo_torchtitan.param_groups import NAME

__all__ = [
    "Reader",
    "TitanTrainer",
    "check",
    "complete",
    "fit_to_cpu",
    "leave_out_what_changes_no_parameter",
    "model_of",
    "model_parts",
    "of_dims",
    "shampoo_of",
]

_FILE = "--job.config_file"


class Reader(ConfigManager):
    """Reads a job as TorchTitan does, and TOML files under the name that they have in 0.2."""

    def _load_config(self, args: list[str]) -> tuple[Any, list[str]]:
        pairs = _pairs(args)
        keys = [key for key, _ in pairs]
        if _FILE not in keys and ("--module" in keys or not any(map(_is_of_files, keys))):
            return super()._load_config(args)  # type: ignore[no-any-return]
        file, overrides, others = "", {}, list[str]()
        for key, value in pairs:
            if key == _FILE:
                if not value:
                    raise ValueError("job.config_file: the name of a file is missing")
                file = value
            elif _is_of_files(key) and value is not None:
                overrides[_name(key)] = toml.value_of(value)
            else:
                others += [key] if value is None else [key, value]
        if cpu.needed():  # known already when settings of the command line are checked
            overrides["training.disable_cuda_graphs"] = True
        return toml.read(file, overrides), others

    def _validate_config(self) -> None:
        byte_tokenizer.write_default(self.config.hf_assets_path)
        super()._validate_config()


def _name(option: str) -> str:
    return option.removeprefix("--").replace("-", "_")


def _is_of_files(option: str) -> bool:
    return toml.is_of_files(_name(option))


def _pairs(args: list[str]) -> list[tuple[str, str | None]]:
    """Options with their values, which follow them or an equals sign; a further value of one has
    none itself."""
    pairs: list[tuple[str, str | None]] = []
    for arg in args:
        key, equals, value = arg.partition("=")
        if key == "--job.config-file":
            key = _FILE
        if arg.startswith("--"):
            pairs.append((key, value if equals else None))
        elif pairs and pairs[-1][0].startswith("--") and pairs[-1][1] is None:
            pairs[-1] = pairs[-1][0], arg
        else:
            pairs.append((arg, None))
    return pairs


def check(config: Any) -> None:
    """What a job would be refused for has been refused when it was read."""


def model_of(config: Any) -> str:
    """Its name and flavor."""
    return f"{config.model_spec.name} {config.model_spec.flavor}"


def shampoo_of(config: Any, names: Sequence[str]) -> ShampooConfig:
    """The settings that parameters of these names get; those of other optimizers are excluded."""
    optimizer = config.optimizer
    if not isinstance(optimizer, configs.ShampooOptimizers.Config):
        return ShampooConfig()
    others = [name for name in names if not _is_shampoos(name, optimizer.param_groups)]
    exclude = [*optimizer.shampoo.exclude, *map(exactly, others)]
    return optimizer.shampoo.completed(exclude=exclude)


def _is_shampoos(name: str, groups: Sequence[Any]) -> bool:
    """The first group that matches has it."""
    found = (g.optimizer_name for g in groups if re.search(g.pattern, name))
    return next(found, NAME) == NAME


def complete(config: Any) -> None:
    """Does what the trainer does first."""
    if config.override.imports:
        apply_overrides(config.override, config)
        config.override.imports = []


def leave_out_what_changes_no_parameter(config: Any) -> None:
    config.compile.enable = False
    config.activation_checkpoint = None


def of_dims(config: Any) -> dict[str, Any]:
    """What ParallelDims is told beside degrees."""
    if not cpu.AT_LEAST_2_14:
        config.parallelism.spmd_backend = "partial_dtensor"  # others need newer ones
    return {"spmd_backend": config.parallelism.spmd_backend}


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
    if spec.pipelining_fn is None:
        raise ValueError(
            f"parallelism.pipeline_parallel_degree = {dims.pp}: TorchTitan has no pipeline for "
            f"{spec.name}."
        )
    _, parts, _, _ = spec.pipelining_fn(
        model,
        **common,
        device=torch.device("cpu"),
        model_config=spec.model,
        parallelize_fn=spec.parallelize_fn,
        loss_fn=config.loss.build(compile_config=config.compile),
    )
    return parts  # type: ignore[no-any-return]

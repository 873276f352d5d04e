"""Jobs of TorchTitan 0.2: TOML files, its trainer, and what the plan asks for."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torchtitan.config import TORCH_DTYPE_MAP, ConfigManager
from torchtitan.distributed import ParallelDims
from torchtitan.protocols.train_spec import get_train_spec
from torchtitan.tools import utils
from torchtitan.tools.logging import logger
from torchtitan.train import Trainer as TitanTrainer

from shampoo_fsdp import ShampooConfig
from shampoo_fsdp.validation import check_fields, field_types
from shampoo_torchtitan import job_config
from shampoo_torchtitan.demo import byte_tokenizer
from shampoo_torchtitan.demo.cpu import fit_job_config as fit_to_cpu

__all__ = [
    "Reader",
    "TitanTrainer",
    "check",
    "fit_to_cpu",
    "leave_out_what_changes_no_parameter",
    "model_of",
    "model_parts",
    "of_dims",
    "shampoo_of",
]

check = job_config.check_job


class Reader(ConfigManager):
    """Reads a job as TorchTitan does, with our settings in it even if it does not ask for them."""

    def _maybe_load_toml(self, args: list[str]) -> Any:
        logger.disabled = True  # it logs the traceback of what `parse_args` says in one line
        try:
            return super()._maybe_load_toml(args)
        except ValueError as error:
            raise ValueError(f"job.config_file is not TOML: {error}") from None
        finally:
            logger.disabled = False

    def _maybe_add_custom_config(self, args: list[str], toml_values: Any) -> Any:
        cls = super()._maybe_add_custom_config(args, toml_values)
        if "shampoo" not in field_types(field_types(cls)["optimizer"]):
            cls = self._merge_configs(cls, job_config.JobConfig)
        check_fields(cls, toml_values or {})
        return cls

    def _validate_config(self) -> None:
        byte_tokenizer.write_default(self.config.model.hf_assets_path)
        super()._validate_config()
        job_config.check_job(self.config)


def model_of(config: Any) -> str:
    """Its name and flavor."""
    return f"{config.model.name} {config.model.flavor}"


def shampoo_of(config: Any, names: Sequence[str]) -> ShampooConfig:
    """The settings that parameters of these names get."""
    return getattr(config.optimizer, "shampoo", None) or ShampooConfig()


def complete(config: Any) -> None:
    """Does what the trainer does first."""


def leave_out_what_changes_no_parameter(config: Any) -> None:
    config.compile.enable = False
    config.activation_checkpoint.mode = "none"
    config.model.converters = []


def of_dims(config: Any) -> dict[str, Any]:
    """What ParallelDims is told beside degrees."""
    return {}


def model_parts(config: Any, dims: ParallelDims) -> list[nn.Module]:
    """The parts of the model on this rank, parallelized, without memory."""
    train_spec = get_train_spec(config.model.name)
    if config.model.flavor not in train_spec.model_args:
        raise ValueError(
            f"model.flavor = {config.model.flavor!r}: {config.model.name} has "
            f"{', '.join(train_spec.model_args)}."
        )
    model_args: Any = train_spec.model_args[config.model.flavor]
    model_args.update_from_config(config)
    dtype = TORCH_DTYPE_MAP[config.training.dtype]
    with torch.device("meta"), utils.set_default_dtype(dtype):
        model: Any = train_spec.model_cls(model_args)
    if not dims.pp_enabled:
        return [train_spec.parallelize_fn(model, dims, config)]
    if train_spec.pipelining_fn is None:
        raise ValueError(
            f"parallelism.pipeline_parallel_degree = {dims.pp}: TorchTitan has no pipeline for "
            f"{config.model.name}."
        )
    _, parts, _, _ = train_spec.pipelining_fn(
        model,
        dims,
        config,
        torch.device("cpu"),
        model_args,
        train_spec.parallelize_fn,
        train_spec.build_loss_fn(config, parallel_dims=dims),
    )
    return parts

"""Job files in TOML for TorchTitan from 0.3 on, whose own jobs are Python functions.

    torchrun -m torchtitan.train --module shampoo_torchtitan.toml --config my_job.toml

TorchTitan asks this module for a function of that name. Tables and keys are those of job files of
0.2, or the fields of 0.3's Trainer.Config.
"""

import dataclasses
import functools
import importlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import tomllib
from torchtitan.components.loss import ChunkedLossWrapper, CrossEntropyLoss
from torchtitan.components.optimizer import OptimizersContainer
from torchtitan.distributed.activation_checkpoint import FullAC, MemoryBudgetAC, SelectiveAC
from torchtitan.models import _supported_models
from torchtitan.models.common.config_utils import decoder_vocab_size
from torchtitan.tools.logging import logger
from torchtitan.trainer import Trainer

from shampoo_fsdp import ShampooConfig
from shampoo_fsdp.validation import check_fields, field_types, refuse, refuse_unknown, setting_names
from shampoo_torchtitan.configs import ShampooOptimizers
from shampoo_torchtitan.container import ADAM
from shampoo_torchtitan.generation import groups, register_demo, text

register_demo()  # files may name what is in it

# What 0.2 calls so has another name in 0.3; keys, and tables with all that is in them.
_MOVED = {
    "job.dump_folder": "dump_folder",
    "job.print_config": "debug.print_config",
    "job.save_config_file": "debug.save_config_file",
    "model.hf_assets_path": "hf_assets_path",
    "model.tokenizer_path": "hf_assets_path",
    "training.dataset": "dataloader.dataset",
    "training.dataset_path": "dataloader.dataset_path",
    "training.dataloader": "dataloader",
    "profiling": "profiler",
    "validation.dataset": "validator.dataloader.dataset",
    "validation.dataset_path": "validator.dataloader.dataset_path",
    "validation": "validator",
    "parallelism.enable_async_tensor_parallel": "compile.enable_async_tensor_parallel",
}
# What 0.3 has no place for: the value that changes nothing. Others are refused.
_GONE = {
    "job.custom_config_module": "shampoo_torchtitan.job_config",
    "experimental.custom_args_module": "",
    "activation_checkpoint": None,
    "parallelism.disable_loss_parallel": False,
    "parallelism.expert_tensor_parallel_degree": 1,
    "parallelism.expert_parallel_comm_backend": "standard",
    "parallelism.context_parallel_rotate_method": "allgather",
    "fault_tolerance": False,
    "memory_estimation": False,
    "optimizer.early_step_in_backward": False,
    "validation.local_batch_size": None,
    "validation.seq_len": None,
}
# The same, where the job can do without: others are left out, with a line that says so.
_LEFT_OUT = {
    "model.converters": [],  # quantization
    "quantize": False,
    "activation_checkpoint.selective_ac_option": "op",
    "activation_checkpoint.per_op_sac_force_recompute_mm_shapes_by_fqns": "",
}
if "implementation" not in field_types(OptimizersContainer.Config):  # since 0.4
    _LEFT_OUT["optimizer.implementation"] = "fused"
_SHAMPOO = "optimizer.shampoo."
# What 0.3's own jobs turn CUDA graphs off for, which 0.2 did not have.
_NO_GRAPHS_WITH = ("parallelism.expert_parallel_degree", "parallelism.pipeline_parallel_degree")
_OF_FILES = (
    *_NO_GRAPHS_WITH,  # other settings follow from these
    *("job.config_file", "job.description", "experimental.custom_import"),
    *("model.name", "model.flavor"),
    *(f"optimizer.{key}" for key in ("name", "lr", "beta1", "beta2", "eps", "weight_decay")),
    *(*_MOVED, *_GONE, *_LEFT_OUT, *text().KEYS),
)
# All that a file may say, for whoever looks for it elsewhere.
_EVERYWHERE = dict.fromkeys([*_OF_FILES, *setting_names(ShampooOptimizers.Config, "optimizer")])
_EVERYWHERE |= dict.fromkeys(setting_names(Trainer.Config))
_MODES = {"selective": SelectiveAC, "full": FullAC, "memory_budget": MemoryBudgetAC, "none": None}


def __getattr__(name: str) -> Any:
    if not name.endswith(".toml"):
        raise AttributeError(name)
    return functools.partial(read, name)


def is_of_files(name: str) -> bool:
    """Whether a setting has a place in files alone, or another name there than in 0.3."""
    return any(_is_in(name, prefix) for prefix in _OF_FILES)


def value_of(text: str) -> Any:
    """What a setting of the command line would be in a file."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def read(path: str, overrides: Mapping[str, Any] | None = None) -> Trainer.Config:
    """The job that a file describes.

    Args:
        path: Of the file; "" for an empty one.
        overrides: What settings are instead, by name with dots.

    Raises:
        ImportError, OSError, ValueError, TypeError: Names the file, or the setting and what is
            allowed.
    """
    try:
        tables = tomllib.loads(Path(path).read_text() if path else "")
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"job.config_file {path} is not TOML: {error}") from None
    settings = dict(_leaves(tables)) | dict(overrides or {})
    settings.pop("job.description", None)
    module = settings.pop("experimental.custom_import", "")
    if module not in ("", "shampoo_torchtitan.optimizer"):  # which needs TorchTitan 0.2
        importlib.import_module(f"{module}")
    name, flavor = settings.pop("model.name", "llama3"), settings.pop("model.flavor", "debugmodel")
    config = _model(name, flavor)
    text().take(config, settings)
    of_shampoo = [key for key in settings if key.startswith(_SHAMPOO)]
    own = {key.removeprefix(_SHAMPOO): settings.pop(key) for key in of_shampoo}
    check_fields(ShampooConfig, own, "optimizer.shampoo", _EVERYWHERE)
    config.optimizer = ShampooOptimizers.Config(shampoo=ShampooConfig(**own))
    optimizer = settings.pop("optimizer.name", "AdamW")
    if (mode := settings.pop("activation_checkpoint.mode", None)) is not None:
        if f"{mode}" not in _MODES:
            refuse("activation_checkpoint.mode", mode, " or ".join(map(repr, _MODES)))
        kind = _MODES[mode]
        config.activation_checkpoint = kind and kind.Config()
    if any(settings.get(degree, 1) != 1 for degree in _NO_GRAPHS_WITH):
        settings.setdefault("training.disable_cuda_graphs", True)
    for prefix, nothing in _LEFT_OUT.items():
        found = [settings.pop(key) for key in list(settings) if _is_in(key, prefix)]
        if any(value not in (nothing, False, "", []) for value in found):
            logger.warning(f"TorchTitan has no {prefix}, which is left out")
    for key, value in settings.items():
        gone = [nothing for prefix, nothing in _GONE.items() if _is_in(key, prefix)]
        if not gone:
            _set(config, key, value)
        elif value != gone[0]:
            raise ValueError(
                f"{key} = {value!r}: this TorchTitan has no such setting; what needs it starts "
                "from a Python function"
            )
    if optimizer in ADAM:
        config.optimizer = groups().adam(optimizer, config.optimizer)
    elif f"{optimizer}".lower() != "shampoo":
        refuse("optimizer.name", optimizer, "'shampoo', 'Adam' or 'AdamW'")
    for field in dataclasses.fields(config):
        if check := getattr(getattr(config, field.name), "__post_init__", None):
            check()
    config.__post_init__()
    return config


def _model(name: Any, flavor: Any) -> Trainer.Config:
    """A job of this model, whose other settings are defaults."""
    if f"{name}" not in _supported_models:
        refuse("model.name", name, " or ".join(map(repr, sorted(_supported_models))))
    registry = importlib.import_module(f"torchtitan.models.{name}")
    flavors = next((there for key, there in vars(registry).items() if key.endswith("_configs")), ())
    if flavors and f"{flavor}" not in flavors:
        refuse("model.flavor", flavor, f"{' or '.join(map(repr, flavors))} of {name}")
    try:
        spec = registry.model_registry(flavor)
        loss = CrossEntropyLoss.Config(global_vocab_size=decoder_vocab_size(spec))
    except (AssertionError, AttributeError, KeyError, TypeError) as error:
        raise ValueError(
            f"model.name = {name!r}, model.flavor = {flavor!r}: this TorchTitan has no such "
            "language model"
        ) from error
    return Trainer.Config(model_spec=spec, loss=ChunkedLossWrapper.Config(loss_fn=loss))


def _set(config: Any, key: str, value: Any) -> None:
    """Sets a field of a configuration by its name in files."""
    prefix = next((prefix for prefix in _MOVED if _is_in(key, prefix)), "")
    *tables, last = (_MOVED.get(prefix, "") + key.removeprefix(prefix)).split(".")
    for table in tables:
        refuse_unknown(table, field_types(type(config)), key, _EVERYWHERE)
        config = getattr(config, table)
    check_fields(type(config), {last: value}, key.rpartition(".")[0], _EVERYWHERE)
    of_tables = isinstance(value, list) and any(isinstance(item, dict) for item in value)
    if dataclasses.is_dataclass(getattr(config, last)) or of_tables:
        raise TypeError(f"{key} = {value!r}: a file cannot say it; start from a Python function")
    setattr(config, last, value)


def _leaves(tables: dict[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tables.items():
        name = f"{path}.{key}" if path else key
        yield from _leaves(value, name) if isinstance(value, dict) else [(name, value)]


def _is_in(key: str, prefix: str) -> bool:
    return key == prefix or key.startswith(f"{prefix}.")

"""Job files in TOML for TorchTitan 0.3, whose own jobs are Python functions.

    torchrun -m torchtitan.train --module shampoo_torchtitan.toml --config my_job.toml

TorchTitan asks this module for a function of that name. Tables and keys are those of job files of
0.2, or the fields of 0.3's Trainer.Config. `[job] module` and `config` name a function of a
registry to start from, else `[model] name` and `flavor` the model, the rest being defaults.
"""

import dataclasses
import functools
import importlib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import tomllib
from torchtitan.components.loss import ChunkedLossWrapper, CrossEntropyLoss
from torchtitan.components.optimizer import default_adamw
from torchtitan.distributed.activation_checkpoint import FullAC, MemoryBudgetAC, SelectiveAC
from torchtitan.hf_datasets.text_datasets import HuggingFaceTextDataLoader
from torchtitan.models.common.config_utils import decoder_vocab_size
from torchtitan.tools.logging import logger
from torchtitan.trainer import Trainer

from shampoo_fsdp.validation import check_fields, field_types, refuse_unknown
from shampoo_torchtitan import demo
from shampoo_torchtitan.demo import models_03
from shampoo_torchtitan.param_groups import HYPERPARAMETERS
from shampoo_torchtitan.toml_optimizer import choose_optimizer

__all__ = ["is_of_files", "read", "value_of"]

demo.register(models_03)  # files may name what is in it

# What 0.2 calls so has another name in 0.3.
_MOVED = {
    "job.dump_folder": "dump_folder",
    "job.print_config": "debug.print_config",
    "job.save_config_file": "debug.save_config_file",
    "model.hf_assets_path": "hf_assets_path",
    "training.dataset": "dataloader.dataset",
    "training.dataset_path": "dataloader.dataset_path",
    "training.dataloader": "dataloader",
    "profiling": "profiler",
    "validation.dataset": "validator.dataloader.dataset",
    "validation.dataset_path": "validator.dataloader.dataset_path",
    "validation": "validator",
    "parallelism.enable_async_tensor_parallel": "compile.enable_async_tensor_parallel",
}
_ANY = object()
_OWN_FUNCTION = "start from a function of your own registry, [job] module and config"
# What 0.3 has no place for: the value that changes nothing there, and what to do about others.
_GONE: dict[str, tuple[Any, str]] = {
    "job.custom_config_module": (
        "shampoo_torchtitan.job_config",
        "subclass Trainer.Config in a registry of your own",
    ),
    "job.description": (_ANY, ""),
    "experimental.custom_args_module": ("", "subclass Trainer.Config in a registry of your own"),
    "model.converters": ([], f"they are part of the model: {_OWN_FUNCTION}"),
    "model.tokenizer_path": (None, "set hf_assets_path"),
    "activation_checkpoint": (
        None,
        f"set activation_checkpoint.mode alone, or {_OWN_FUNCTION}",
    ),
    "parallelism.disable_loss_parallel": (False, "the loss is always parallel"),
    "parallelism.expert_tensor_parallel_degree": (1, "set expert_parallel_degree alone"),
    "parallelism.expert_parallel_comm_backend": (
        "standard",
        f"it is part of the model: {_OWN_FUNCTION}",
    ),
    "parallelism.context_parallel_rotate_method": ("allgather", "it is part of the model"),
    "fault_tolerance.enable": (False, "TorchFT is an experiment of its own there"),
    "fault_tolerance": (None, "TorchFT is an experiment of its own there"),
    "memory_estimation.enabled": (False, "see `python -m shampoo_torchtitan.plan`"),
    "memory_estimation": (None, "see `python -m shampoo_torchtitan.plan`"),
    "optimizer.early_step_in_backward": (
        False,
        "no optimizer steps in the backward pass, and shampoo needs all gradients at once",
    ),
    "validation.local_batch_size": (None, "validation takes that of the training"),
    "validation.seq_len": (None, "validation takes that of the training"),
}
# The same, where the job can do without: what is said then.
_CONVERTERS = "model.converters"
_NOT_QUANTIZED = f"nothing is quantized; to do so, {_OWN_FUNCTION}"
_LEFT_OUT = {
    _CONVERTERS: _NOT_QUANTIZED,
    "quantize": _NOT_QUANTIZED,
    "activation_checkpoint.selective_ac_option": "the mode alone decides",
    "activation_checkpoint.per_op_sac_force_recompute_mm_shapes_by_fqns": "the mode alone decides",
}
_SAYS_NOTHING = (False, "", [], "op")
_IMPORT = "experimental.custom_import"
_OURS = ("", "shampoo_torchtitan", "shampoo_torchtitan.optimizer")  # is there without an import
# What 0.3's own jobs turn CUDA graphs off for, which 0.2 did not have.
_NO_GRAPHS_WITH = ("parallelism.expert_parallel_degree", "parallelism.pipeline_parallel_degree")
_RECOMPUTE: dict[str, Any] = {
    "selective": SelectiveAC.Config,
    "full": FullAC.Config,
    "memory_budget": MemoryBudgetAC.Config,
    "none": lambda: None,
}


def __getattr__(name: str) -> Any:
    if not name.endswith(".toml"):
        raise AttributeError(name)
    return functools.partial(read, name)


def is_of_files(name: str) -> bool:
    """Whether a setting has a place in files alone, or another name there than in 0.3."""
    chosen: tuple[str, ...] = (
        "optimizer.name",
        "model.name",
        "model.flavor",
        "activation_checkpoint.mode",
    )
    chosen = (*chosen, *(f"optimizer.{key}" for key in HYPERPARAMETERS), _IMPORT)
    left_out = any(name == key or name.startswith(f"{key}.") for key in _LEFT_OUT)
    return name in chosen or left_out or _moved(name) != name or _gone(name) is not None


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
        OSError, ValueError, TypeError: Names the file, or the setting and what is allowed.
    """
    try:
        tables = tomllib.loads(Path(path).read_text() if path else "")
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"job.config_file {path} is not TOML: {error}") from None
    for name, value in (overrides or {}).items():
        *parents, last = name.split(".")
        functools.reduce(lambda table, key: table.setdefault(key, {}), parents, tables)[last] = (
            value
        )
    _import(_table(tables, "experimental").pop("custom_import", ""))
    of_function = not {"module", "config"}.isdisjoint(_table(tables, "job"))
    config = _base(tables)
    optimizer = _table(tables, "optimizer")
    config.optimizer = choose_optimizer(config.optimizer, optimizer, of_user=of_function)
    settings = dict(_leaves(tables))
    if (mode := settings.pop("activation_checkpoint.mode", None)) is not None:
        if not isinstance(mode, str) or mode not in _RECOMPUTE:
            allowed = ", ".join(_RECOMPUTE)
            raise ValueError(f"activation_checkpoint.mode = {mode!r}: must be one of {allowed}")
        config.activation_checkpoint = _RECOMPUTE[mode]()
    if not of_function and any(settings.get(degree, 1) != 1 for degree in _NO_GRAPHS_WITH):
        settings.setdefault("training.disable_cuda_graphs", True)
    _leave_out(settings)
    for key, value in settings.items():
        if (gone := _gone(key)) is None:
            _set(config, _moved(key), value, key)
        elif gone[0] is not _ANY and value != gone[0]:
            raise ValueError(f"{key} = {value!r} is not known to TorchTitan 0.3: {gone[1]}")
    for name in (field.name for field in dataclasses.fields(config)):
        check = getattr(getattr(config, name), "__post_init__", None)
        if check is not None:
            check()
    config.__post_init__()
    return config


def _set(config: Any, key: str, value: Any, said: str) -> None:
    """Sets a field of a configuration by its name with dots, which the user may call otherwise."""
    *tables, last = key.split(".")
    for table in tables:
        refuse_unknown(table, field_types(type(config)), said)
        config = getattr(config, table)
    check_fields(type(config), {last: value}, said.rpartition(".")[0])
    of_tables = isinstance(value, list) and any(isinstance(item, dict) for item in value)
    if dataclasses.is_dataclass(getattr(config, last)) or of_tables:
        raise TypeError(f"{said} = {value!r}: a file cannot say it; start from a function")
    setattr(config, last, value)


def _leave_out(settings: dict[str, Any]) -> None:
    """Takes out what the job can do without, with a line for each where the file asks for it."""
    for prefix, instead in _LEFT_OUT.items():
        found = [key for key in settings if key == prefix or key.startswith(f"{prefix}.")]
        if _CONVERTERS in found and not _quantize(settings[_CONVERTERS]):
            continue
        if any([settings.pop(key) not in _SAYS_NOTHING for key in found]):
            logger.warning(f"TorchTitan 0.3 has no {prefix}, which is left out: {instead}")


def _quantize(converters: Any) -> bool:
    names = converters if isinstance(converters, list) else [converters]
    return all(re.match(r"(float8|mx|quantize)\b", str(name)) for name in names)


def _base(tables: dict[str, Any]) -> Trainer.Config:
    """What the file's settings change."""
    job, model = _table(tables, "job"), _table(tables, "model")
    if "config" in job or "module" in job:
        module, function = job.pop("module", None), job.pop("config", None)
        if module is None or function is None:
            raise ValueError("[job] module and config name a function of a registry: give both")
        registry = _module(f"torchtitan.models.{module}.config_registry", f"{module}")
        if not callable(getattr(registry, f"{function}", None)):
            raise ValueError(
                f"[job] config = {function!r}: {registry.__name__} has no such function"
            )
        return getattr(registry, function)()  # type: ignore[no-any-return]
    name, flavor = model.pop("name", "llama3"), model.pop("flavor", "debugmodel")
    registry = _module(f"torchtitan.models.{name}", f"{name}")
    if not hasattr(registry, "model_registry"):
        raise ValueError(f"model.name = {name!r}: {registry.__name__} has no model")
    try:
        spec = registry.model_registry(flavor)
    except (KeyError, TypeError):
        raise ValueError(f"model.flavor = {flavor!r}: {name} has no such flavor") from None
    try:
        loss = CrossEntropyLoss.Config(global_vocab_size=decoder_vocab_size(spec))
    except AssertionError:  # of TorchTitan's
        raise ValueError(f"model.name = {name!r}: no language model; {_OWN_FUNCTION}") from None
    return Trainer.Config(
        model_spec=spec,
        optimizer=default_adamw(),
        loss=ChunkedLossWrapper.Config(loss_fn=loss),
        dataloader=HuggingFaceTextDataLoader.Config(),
    )


def _table(tables: dict[str, Any], name: str) -> dict[str, Any]:
    table = tables.get(name, {})
    if not isinstance(table, dict):
        raise TypeError(f"{name} = {table!r}: must be a table, [{name}]")
    return table


def _module(*names: str) -> Any:
    """The first that there is."""
    for name in names:
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name is None or not name.startswith(error.name):
                raise  # it is there, and lacks something
    raise ValueError(f"there is no module {' or '.join(map(repr, names))}")


def _leaves(tables: dict[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tables.items():
        name = f"{path}.{key}" if path else key
        yield from _leaves(value, name) if isinstance(value, dict) else [(name, value)]


def _gone(key: str) -> tuple[Any, str] | None:
    """What changes nothing and what to do about a setting that is no more; None if it still is."""
    parts = key.split(".")
    prefixes = (".".join(parts[:n]) for n in range(len(parts), 0, -1))
    return next((_GONE[prefix] for prefix in prefixes if prefix in _GONE), None)


def _import(module: Any) -> None:
    if module not in _OURS:
        _module(f"{module}")


def _moved(key: str) -> str:
    for old, new in _MOVED.items():
        if key == old or key.startswith(f"{old}."):
            return new + key[len(old) :]
    return key

"""Job files in TOML for TorchTitan 0.3, whose own jobs are Python functions.

    torchrun -m torchtitan.train --module shampoo_torchtitan.toml --config my_job.toml

TorchTitan asks this module for a function of that name. Tables and keys are those of job files of
0.2, or the fields of 0.3's Trainer.Config. `[job] module` and `config` name a function of a
registry to start from, else `[model] name` and `flavor` the model, the rest being defaults.
"""

import dataclasses
import difflib
import functools
import importlib
import sys
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torchtitan.components.loss import ChunkedLossWrapper, CrossEntropyLoss
from torchtitan.components.optimizer import default_adamw
from torchtitan.distributed.activation_checkpoint import FullAC, MemoryBudgetAC, SelectiveAC
from torchtitan.hf_datasets.text_datasets import HuggingFaceTextDataLoader
from torchtitan.models.common.config_utils import decoder_vocab_size
from torchtitan.trainer import Trainer

from shampoo_fsdp import ShampooConfig
from shampoo_fsdp.validation import REMOVED, misfit
from shampoo_torchtitan import demo
from shampoo_torchtitan.configs import ShampooOptimizers

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = ["is_of_files", "read", "value_of"]

demo.register()  # files may name what is in it

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
# What 0.3 has no place for, and what to do instead; "" changes nothing.
_GONE = {
    "job.custom_config_module": "",
    "job.description": "",
    "experimental.custom_import": "",
    "experimental.custom_args_module": "subclass Trainer.Config in a registry of your own",
    "model.converters": "quantization is part of the model: start from a function of your own "
    "registry, [job] module and config",
    "model.tokenizer_path": "set hf_assets_path",
    "quantize": "start from a function of your own registry, [job] module and config",
    "activation_checkpoint": "set activation_checkpoint.mode alone, or start from a function of "
    "your own registry, [job] module and config",
    "parallelism.disable_loss_parallel": "the loss is always parallel",
    "parallelism.expert_tensor_parallel_degree": "set expert_parallel_degree alone",
    "parallelism.expert_parallel_comm_backend": "it is part of the model: start from a function of "
    "your own registry, [job] module and config",
    "fault_tolerance": "TorchFT is an experiment of its own there",
    "memory_estimation": "see `python -m shampoo_torchtitan.plan`",
    "optimizer.early_step_in_backward": 'optimizer.name = "shampoo" needs all gradients at once',
    "validation.local_batch_size": "validation takes that of the training",
    "validation.seq_len": "validation takes that of the training",
}
# What 0.3 always does.
_ALWAYS = {"activation_checkpoint.selective_ac_option": "op"}
_RECOMPUTE: dict[str, Any] = {
    "selective": SelectiveAC.Config,
    "full": FullAC.Config,
    "memory_budget": MemoryBudgetAC.Config,
    "none": lambda: None,
}
_OF_ADAM = ("lr", "eps", "weight_decay", "beta1", "beta2")


def __getattr__(name: str) -> Any:
    if not name.endswith(".toml"):
        raise AttributeError(name)
    return functools.partial(read, name)


def is_of_files(name: str) -> bool:
    """Whether a setting has a place in files alone, or another name there than in 0.3."""
    chosen = ("optimizer.name", "model.name", "model.flavor", "activation_checkpoint.mode")
    adam = (f"optimizer.{key}" for key in _OF_ADAM)
    return name in (*chosen, *adam) or _moved(name) != name or _instead(name) is not None


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
    config = _base(tables)
    settings = dict(_leaves(tables))
    if (mode := settings.pop("activation_checkpoint.mode", None)) is not None:
        if mode not in _RECOMPUTE:
            allowed = ", ".join(_RECOMPUTE)
            raise ValueError(f"activation_checkpoint.mode = {mode!r}: must be one of {allowed}")
        config.activation_checkpoint = _RECOMPUTE[mode]()
    _choose_optimizer(config, settings)
    for key, value in settings.items():
        if key in _ALWAYS and _ALWAYS[key] == value:
            continue
        if (instead := _instead(key)) is None:
            _set(config, _moved(key), value, key)
        elif instead:
            raise ValueError(f"{key} is not known to TorchTitan 0.3: {instead}")
    for name in (field.name for field in dataclasses.fields(config)):
        check = getattr(getattr(config, name), "__post_init__", None)
        if check is not None:
            check()
    config.__post_init__()
    return config


def _base(tables: dict[str, Any]) -> Trainer.Config:
    """What the file's settings change."""
    job, model = tables.get("job", {}), tables.get("model", {})
    if "config" in job or "module" in job:
        module, function = job.pop("module", None), job.pop("config", None)
        if module is None or function is None:
            raise ValueError("[job] module and config name a function of a registry: give both")
        registry = _module(f"torchtitan.models.{module}.config_registry", module)
        if not callable(getattr(registry, function, None)):
            raise ValueError(
                f"[job] config = {function!r}: {registry.__name__} has no such function"
            )
        return getattr(registry, function)()
    name, flavor = model.pop("name", "llama3"), model.pop("flavor", "debugmodel")
    try:
        spec = _module(f"torchtitan.models.{name}", name).model_registry(flavor)
    except KeyError:
        raise ValueError(f"model.flavor = {flavor!r}: {name} has no such flavor") from None
    loss = CrossEntropyLoss.Config(global_vocab_size=decoder_vocab_size(spec))
    return Trainer.Config(
        model_spec=spec,
        optimizer=default_adamw(),
        loss=ChunkedLossWrapper.Config(loss_fn=loss),
        dataloader=HuggingFaceTextDataLoader.Config(),
    )


def _module(*names: str) -> Any:
    """The first that there is."""
    for name in names:
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name is None or not name.startswith(error.name):
                raise  # it is there, and lacks something
    raise ValueError(f"there is no module {' or '.join(names)}")


def _choose_optimizer(config: Trainer.Config, settings: dict[str, Any]) -> None:
    name = settings.pop("optimizer.name", None)
    of_shampoo = {
        key.removeprefix("optimizer.shampoo."): settings.pop(key)
        for key in list(settings)
        if key.startswith("optimizer.shampoo.")
    }
    if "optimizer.shampoo" in settings:
        value = settings["optimizer.shampoo"]
        raise TypeError(f"optimizer.shampoo = {value!r}: must be a table, [optimizer.shampoo]")
    shampoo = _shampoo_settings(of_shampoo)  # also if the job has AdamW just now
    if name is not None and name.lower() == "shampoo":
        config.optimizer = ShampooOptimizers.Config(shampoo=shampoo)
    elif name not in (None, "Adam", "AdamW"):
        raise ValueError(f"optimizer.name = {name!r}: must be one of shampoo, Adam, AdamW")
    else:
        own = [key for key in _OF_ADAM if f"optimizer.{key}" in settings]
        given = {key: _checked(key, settings.pop(f"optimizer.{key}")) for key in own}
        _change_adam(config.optimizer.param_groups, name, given)


def _shampoo_settings(own: dict[str, Any]) -> ShampooConfig:
    for key, value in own.items():
        if key in REMOVED:
            raise ValueError(f"setting optimizer.shampoo.{key} has been removed: {REMOVED[key]}")
        _check(ShampooConfig, key, value, "optimizer.shampoo")
    try:
        return ShampooConfig(**own)
    except (TypeError, ValueError) as error:
        raise type(error)(f"[optimizer.shampoo] {error}") from None


def _checked(key: str, value: Any) -> Any:
    _check(ShampooOptimizers.Config, key, value, "optimizer")
    return value


def _change_adam(groups: list[Any], name: str | None, given: dict[str, Any]) -> None:
    for group in groups:
        group.optimizer_name = name or group.optimizer_name
        kept = group.optimizer_kwargs
        kept |= {key: value for key, value in given.items() if key not in ("beta1", "beta2")}
        beta1, beta2 = kept.get("betas", (0.9, 0.95))
        kept["betas"] = given.get("beta1", beta1), given.get("beta2", beta2)


def _leaves(tables: dict[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tables.items():
        name = f"{path}.{key}" if path else key
        yield from _leaves(value, name) if isinstance(value, dict) else [(name, value)]


def _instead(key: str) -> str | None:
    """What to do about a setting that is no more; None if it still is, "" for nothing."""
    parts = key.split(".")
    prefixes = (".".join(parts[:n]) for n in range(len(parts), 0, -1))
    return next((_GONE[prefix] for prefix in prefixes if prefix in _GONE), None)


def _moved(key: str) -> str:
    for old, new in _MOVED.items():
        if key == old or key.startswith(f"{old}."):
            return new + key[len(old) :]
    return key


def _set(config: Any, key: str, value: Any, said: str) -> None:
    *tables, last = key.split(".")
    for table in tables:
        _known(type(config), table, said, whole=True)
        config = getattr(config, table)
    _check(type(config), last, value, said.rpartition(".")[0])
    setattr(config, last, value)


def _check(cls: type, key: str, value: Any, path: str) -> None:
    hint, name = _known(cls, key, path), f"{path}.{key}" if path else key
    if dataclasses.is_dataclass(hint):
        raise TypeError(f"{name} = {value!r}: must be a table, [{name}]")
    if allowed := misfit(key, value, hint):
        raise TypeError(f"{name} = {value!r}: must be {allowed}")


def _known(cls: type, key: str, path: str, *, whole: bool = False) -> Any:
    """The type of a field."""
    hints = typing.get_type_hints(cls)
    if key not in hints:
        name = path if whole else f"{path}.{key}" if path else key
        close = difflib.get_close_matches(key, hints, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"unknown setting {name}.{hint} Allowed: {', '.join(sorted(hints))}")
    return hints[key]

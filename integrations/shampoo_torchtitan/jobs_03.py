"""Jobs of TorchTitan 0.3: functions, and TOML files as in 0.2; and its trainer."""

from typing import Any

from torchtitan.config import ConfigManager
from torchtitan.trainer import Trainer as TitanTrainer

from shampoo_torchtitan import toml
from shampoo_torchtitan.demo import byte_tokenizer, cpu
from shampoo_torchtitan.demo.cpu import fit_trainer_config as fit_to_cpu

__all__ = ["Reader", "TitanTrainer", "fit_to_cpu"]

_FILE = "--job.config_file"


class Reader(ConfigManager):
    """Reads a job as TorchTitan does, and TOML files under the name that they have in 0.2."""

    def _load_config(self, args: list[str]) -> tuple[Any, list[str]]:
        pairs = _pairs(args)
        if not any(key == _FILE for key, _ in pairs):
            return super()._load_config(args)  # type: ignore[no-any-return]
        file, overrides, others = "", {}, list[str]()
        for key, value in pairs:
            name = key.removeprefix("--").replace("-", "_")
            if key == _FILE:
                file = value or ""
            elif toml.is_of_files(name) and value is not None:
                overrides[name] = toml.value_of(value)
            else:
                others += [key] if value is None else [key, value]
        if cpu.needed():  # known already when settings of the command line are checked
            overrides["training.disable_cuda_graphs"] = True
        return toml.read(file, overrides), others

    def _validate_config(self) -> None:
        byte_tokenizer.write_default(self.config.hf_assets_path)
        super()._validate_config()


def _pairs(args: list[str]) -> list[tuple[str, str | None]]:
    """Options with their values, which follow them or an equals sign; a further value of one has
    none itself."""
    pairs: list[tuple[str, str | None]] = []
    for arg in args:
        key, equals, value = arg.partition("=")
        if arg.startswith("--"):
            pairs.append((key, value if equals else None))
        elif pairs and pairs[-1][0].startswith("--") and pairs[-1][1] is None:
            pairs[-1] = pairs[-1][0], arg
        else:
            pairs.append((arg, None))
    return pairs

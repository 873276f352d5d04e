"""Jobs of TorchTitan 0.2: TOML files, and its trainer."""

import dataclasses
from typing import Any, cast

from torchtitan.config import ConfigManager
from torchtitan.tools.logging import logger
from torchtitan.train import Trainer as TitanTrainer

from shampoo_fsdp import ShampooConfig
from shampoo_torchtitan import job_config
from shampoo_torchtitan.demo import byte_tokenizer
from shampoo_torchtitan.demo.cpu import fit_job_config as fit_to_cpu

__all__ = ["Reader", "TitanTrainer", "fit_to_cpu"]


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
        if hasattr(cls().optimizer, "shampoo"):
            return cls
        return self._merge_configs(cls, job_config.JobConfig)

    def _dict_to_dataclass(self, cls: Any, data: dict[str, Any]) -> Any:
        # It calls itself for the tables inside: their names are complete only the first time,
        # when all of them are checked.
        if dataclasses.is_dataclass(cls):
            job_config.check_table(cast(type, cls), data)
        try:
            return super()._dict_to_dataclass(cls, data)
        except (TypeError, ValueError) as error:
            if cls is ShampooConfig:
                raise type(error)(f"[optimizer.shampoo] {error}") from None
            raise

    def _validate_config(self) -> None:
        byte_tokenizer.write_default(self.config.model.hf_assets_path)
        super()._validate_config()
        job_config.check_job(self.config)

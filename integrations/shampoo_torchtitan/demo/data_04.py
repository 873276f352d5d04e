"""The data sets of `data`, as TorchTitan reads text since August 2026."""

import sysconfig
from dataclasses import dataclass

from torchtitan.components.data import HuggingFaceRandomAccessSource, SingleDatasetConfig
from torchtitan.components.data.types import DatasetIterationPolicy
from torchtitan.hf_datasets.text_datasets import DATASETS, TextProcessor

from shampoo_torchtitan.demo.data import python_source


class PythonSource(HuggingFaceRandomAccessSource):  # type: ignore[misc]
    """The Python files under a folder."""

    @dataclass(kw_only=True, slots=True)
    class Config(HuggingFaceRandomAccessSource.Config):  # type: ignore[misc]
        pass

    def __init__(self, config: Config, *, dataset_iteration_policy: DatasetIterationPolicy) -> None:
        self._dataset = python_source(config.path, validation=config.split == "validation")


def register() -> None:
    """Adds the two data sets to those of TorchTitan."""
    library = sysconfig.get_paths()["stdlib"]
    for name, split in (("python_source", "train"), ("python_source_validation", "validation")):
        source = PythonSource.Config(path=library, split=split)
        of_text = SingleDatasetConfig(
            source=source, processor=TextProcessor.Config(), post_filters=(_has_tokens,)
        )
        DATASETS.setdefault(name, of_text)


def _has_tokens(sample: object) -> bool:
    return sample is not None

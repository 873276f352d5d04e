"""The data sets of `data`, as TorchTitan 0.2 and 0.3 read text."""

import sysconfig
from functools import partial
from operator import itemgetter

from torchtitan.hf_datasets import DatasetConfig
from torchtitan.hf_datasets.text_datasets import DATASETS

from shampoo_torchtitan.demo.data import python_source


def register() -> None:
    """Adds the two data sets to those of TorchTitan."""
    library = sysconfig.get_paths()["stdlib"]
    for name, validation in (("python_source", False), ("python_source_validation", True)):
        load = partial(python_source, validation=validation)
        DATASETS.setdefault(name, DatasetConfig(library, load, itemgetter("text")))

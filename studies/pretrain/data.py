"""Batches of text that depend on the seed and the step alone, and text that is not trained on.

A data set of TorchTitan (`training.dataset`) is read once per process and becomes one long row of
tokens. Its windows of seq_len + 1 tokens are shuffled by the seed: one epoch is a permutation of
them, and step s takes the next batch, whatever the optimizer.
"""

import shampoo_torchtitan.train  # noqa: F401  first: it makes TorchTitan run without a GPU

# isort: split

import functools
import itertools
import sysconfig
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from datasets import Dataset
from torchtitan.components.tokenizer import HuggingFaceTokenizer
from torchtitan.hf_datasets import DatasetConfig
from torchtitan.hf_datasets.text_datasets import DATASETS

from shampoo_torchtitan.demo.data import python_source

Batch = tuple[dict[str, torch.Tensor], torch.Tensor]

_TUNING_EVERY = 20
_PACKAGES = {"site-packages", "dist-packages"}


def register() -> None:
    """Splits the training files of `python_source` into two data sets.

    `python_source_tuning` (every 20th file) is what settings are chosen by, so that the files of
    `python_source_validation` stay unseen until the end; `python_source_study` is the rest, and
    `python_source_long` this rest and the library's tests, for one pass of a full length.
    """
    library = sysconfig.get_paths()["stdlib"]
    for name, load in (
        ("python_source_study", partial(_part_of_python_source, tuning=False)),
        ("python_source_tuning", partial(_part_of_python_source, tuning=True)),
        ("python_source_long", _python_source_and_tests),
    ):
        DATASETS.setdefault(name, DatasetConfig(library, load, lambda document: document["text"]))


def _part_of_python_source(folder: str, tuning: bool) -> Dataset:
    files = python_source(folder)
    return files.select([i for i in range(len(files)) if (i % _TUNING_EVERY == 0) == tuning])


def _python_source_and_tests(folder: str) -> Dataset:
    known = python_source(folder), python_source(folder, validation=True)
    library = {text for part in known for text in part["text"]}
    texts = list(_part_of_python_source(folder, tuning=False)["text"])
    for path in sorted(Path(folder).rglob("*.py")):
        if not _PACKAGES & set(path.parts):
            text = path.read_text("utf-8", errors="replace")
            # What is not a file of the library itself, or a copy of one, is a test.
            if text and text not in library:
                texts.append(text)
    return Dataset.from_dict({"text": texts})


@functools.lru_cache(maxsize=8)
def tokens(dataset: str, path: str | None, tokenizer_folder: str, at_most: int) -> torch.Tensor:
    """The first tokens of a data set, int64 [n], n <= at_most.

    Args:
        dataset: A name in TorchTitan's DATASETS.
        path: Where it is, if not in its usual place.
        tokenizer_folder: Of TorchTitan's tokenizer; documents begin and end with special tokens.
        at_most: Large data sets are not read further.
    """
    tokenizer = HuggingFaceTokenizer(tokenizer_folder)
    entry = DATASETS[dataset]
    pieces: list[torch.Tensor] = []
    n = 0
    for document in entry.loader(path or entry.path):
        text = entry.sample_processor(document)
        pieces.append(torch.tensor(tokenizer.encode(text, add_bos=True, add_eos=True)))
        n += len(pieces[-1])
        if n >= at_most:
            break
    return torch.cat(pieces)[:at_most]


def batches(text: torch.Tensor, batch: int, length: int, seed: int) -> Iterator[Batch]:
    """Endless batches of next-token prediction: inputs and labels, int64 [batch, length]."""
    windows = text.unfold(0, length + 1, length)
    generator = torch.Generator().manual_seed(seed)
    order = (
        index
        for _ in itertools.count()
        for index in torch.randperm(len(windows), generator=generator).tolist()
    )
    while True:
        yield _split(windows[list(itertools.islice(order, batch))])


def held_out(text: torch.Tensor, batch: int, length: int, n: int) -> list[Batch]:
    """n batches from all over the text, always the same."""
    windows = text.unfold(0, length + 1, length)
    chosen = torch.linspace(0, len(windows) - 1, n * batch).long()
    return [_split(windows[part]) for part in chosen.split(batch)]


def _split(windows: torch.Tensor) -> Batch:
    return {"input": windows[:, :-1].contiguous()}, windows[:, 1:].contiguous()

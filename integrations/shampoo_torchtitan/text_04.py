"""Text, batches and attention as TorchTitan has them since August 2026: a batch is one row of
tokens, and data sets are Grain's. Files say them as in 0.2."""

import dataclasses
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torchtitan.components.data import (
    ConcatThenSplitPackingConfig,
    GrainDataLoader,
    HuggingFaceRandomAccessSource,
    HuggingFaceStreamingSource,
)
from torchtitan.hf_datasets.text_datasets import DATASETS
from torchtitan.models.common.attention import ScaledDotProductAttention

from shampoo_fsdp.validation import refuse

KEYS = {
    "training.seq_len": 2048,
    "training.local_batch_size": 8,
    "training.global_batch_size": -1,
    "parallelism.pipeline_parallel_microbatch_size": 1,
}
"""Settings of files that :func:`take` alone knows, and their defaults."""


def take(config: Any, settings: dict[str, Any]) -> None:
    """Sets what the settings of a file say of text and batches; what is used is taken out.

    Raises:
        ValueError: Names the setting, and what is allowed.
    """
    for key, default in KEYS.items():
        value = settings.get(key, default)
        if type(value) is not int or (value < 1 and value != default):
            refuse(key, value, "an integer >= 1")
    length, sequences, whole, part = (settings.pop(key, KEYS[key]) for key in KEYS)
    if settings.get("parallelism.pipeline_parallel_degree", 1) != 1:
        if sequences % part:
            divisors = f"a divisor of training.local_batch_size = {sequences}"
            refuse("parallelism.pipeline_parallel_microbatch_size", part, divisors)
        config.parallelism.num_pp_microbatches, sequences = sequences // part, part
    config.training.max_context_length = length
    config.training.num_tokens_per_microbatch_per_dp_rank = sequences * length
    if whole != -1:
        config.training.num_tokens_per_train_step = whole * length
    config.dataloader = GrainDataLoader.Config(dataset=_dataset(settings, "training", "c4_test"))
    config.validator.dataloader = dataclasses.replace(
        config.validator.dataloader, dataset=_dataset(settings, "validation", "c4_validation")
    )


def _dataset(settings: dict[str, Any], table: str, default: str) -> ConcatThenSplitPackingConfig:
    name = settings.pop(f"{table}.dataset", default)
    path = settings.pop(f"{table}.dataset_path", None)
    dataset: Any = DATASETS.get(f"{name}".lower())
    if dataset is None:
        refuse(f"{table}.dataset", name, " or ".join(map(repr, DATASETS)))
    if path is not None:
        kinds = HuggingFaceRandomAccessSource.Config | HuggingFaceStreamingSource.Config
        source = getattr(dataset, "source", None)
        if not (isinstance(path, str) and isinstance(source, kinds)):
            refuse(f"{table}.dataset_path", path, "the path of a data set of Hugging Face")
        source = dataclasses.replace(source, path=path, load_dataset_kwargs={})
        dataset = dataclasses.replace(dataset, source=source)
    return ConcatThenSplitPackingConfig(dataset=dataset)


class _Attention(ScaledDotProductAttention):  # type: ignore[misc]
    """Of [tokens, heads, head size], within each sequence of `length` tokens."""

    @dataclass(kw_only=True, slots=True)
    class Config(ScaledDotProductAttention.Config):  # type: ignore[misc]
        length: int

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.length = config.length

    # TorchTitan cuts arguments of these names over ranks.
    def forward(self, q_TNH: Tensor, k_TNH: Tensor, v_TNH: Tensor, **options: Any) -> Tensor:
        rows = (x.unflatten(0, (-1, self.length)) for x in (q_TNH, k_TNH, v_TNH))
        return super().forward(*rows, **options).flatten(0, 1)  # type: ignore[no-any-return]


def attention(config: Any) -> Any:
    """The configuration of attention that needs no GPU."""
    tokens = config.training.num_tokens_per_microbatch_per_dp_rank
    length = config.training.max_context_length
    return _Attention.Config(length=tokens if tokens % length else length)

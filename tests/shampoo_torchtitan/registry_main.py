"""Jobs of TorchTitan's main of August 2026, as a user's own registry has them."""

import json
import os
from pathlib import Path
from typing import Any

from torchtitan.components.data import (
    ConcatThenSplitPackingConfig,
    GrainDataLoader,
    SingleDatasetConfig,
)
from torchtitan.components.data.sources import IndexedJsonlSource
from torchtitan.components.optimizer import default_adamw
from torchtitan.hf_datasets.text_datasets import TextProcessor
from torchtitan.models.llama3.config_registry import llama3_debugmodel

from shampoo_torchtitan.configs import shampoo
from shampoo_torchtitan.demo import BYTE_TOKENIZER


def adamw() -> Any:
    """A small Llama on the source of this folder's files."""
    text = Path(os.environ["TEXT_OF_THE_TEST"])
    documents = [{"text": file.read_text()} for file in Path(__file__).parent.glob("*.py")]
    text.write_text("".join(json.dumps(document) + "\n" for document in documents))
    config = llama3_debugmodel()
    source = IndexedJsonlSource.Config(patterns=(str(text),))
    dataset = SingleDatasetConfig(source=source, processor=TextProcessor.Config())
    packed = ConcatThenSplitPackingConfig(dataset=dataset)
    config.dataloader = GrainDataLoader.Config(dataset=packed, shuffle=False)
    config.hf_assets_path = str(BYTE_TOKENIZER)
    config.parallelism.spmd_backend = "partial_dtensor"
    config.training.max_context_length = 32
    config.training.num_tokens_per_microbatch_per_dp_rank = 64
    config.lr_scheduler.warmup_steps = 2
    config.checkpoint.enable, config.checkpoint.interval = True, 2
    config.checkpoint.last_save_model_only = False
    config.optimizer = default_adamw(lr=1e-3)
    return config


def kl_shampoo() -> Any:
    """The same with Shampoo."""
    config = adamw()
    config.optimizer = shampoo(lr=3e-3, precondition_frequency=2, start_preconditioning_step=2)
    return config

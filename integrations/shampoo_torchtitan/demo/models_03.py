"""Small flavors of TorchTitan 0.3's Llama 3, for the byte tokenizer and machines without a GPU."""

import dataclasses
from functools import partial
from typing import Any

from torchtitan.models import llama3
from torchtitan.models.common import Embedding, Linear, RMSNorm, compute_ffn_hidden_dim

from shampoo_torchtitan.demo import VOCABULARY

__all__ = ["llama", "register"]


def llama(dim: int, n_layers: int, n_heads: int, multiple_of: int, **layers: Any) -> Any:
    """A config of TorchTitan's Llama 3; `layers` go to what makes its layers."""
    rope = llama3._debugmodel("flex").layers[0].attention.rope
    return llama3.Llama3Model.Config(
        dim=dim,
        vocab_size=VOCABULARY,
        tok_embeddings=Embedding.Config(
            num_embeddings=VOCABULARY, embedding_dim=dim, param_init=llama3._EMBEDDING_INIT
        ),
        norm=RMSNorm.Config(normalized_shape=dim, param_init=llama3._NORM_INIT),
        lm_head=Linear.Config(
            in_features=dim, out_features=VOCABULARY, param_init=llama3._output_linear_init(dim)
        ),
        layers=llama3._build_llama3_layers(
            n_layers=n_layers,
            dim=dim,
            n_heads=n_heads,
            hidden_dim=compute_ffn_hidden_dim(dim, multiple_of=multiple_of),
            rope=dataclasses.replace(rope, dim=dim // n_heads, theta=10000, scaling="none"),
            **layers,
        ),
    )


def register() -> None:
    """Adds `tiny` (for tests) and `small` (a first run in about two minutes) to `llama3`."""
    tiny = partial(llama, dim=64, n_layers=2, n_heads=4, multiple_of=32)
    small = partial(llama, dim=192, n_layers=4, n_heads=6, multiple_of=64)
    llama3.llama3_configs.setdefault("tiny", tiny)
    llama3.llama3_configs.setdefault("small", small)

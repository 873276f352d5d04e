"""Small flavors of TorchTitan 0.3's Llama 3, for the byte tokenizer and machines without a GPU."""

from dataclasses import replace
from functools import partial
from typing import Any

from torchtitan.models import llama3
from torchtitan.models.common import compute_ffn_hidden_dim

from shampoo_torchtitan.demo import VOCABULARY


def llama(dim: int, n_layers: int, n_heads: int, multiple_of: int, **layers: Any) -> Any:
    """A config of TorchTitan's Llama 3; `layers` go to what makes its layers."""
    base = llama3._debugmodel("flex")
    rope = base.layers[0].attention.rope
    return replace(
        base,
        dim=dim,
        vocab_size=VOCABULARY,
        tok_embeddings=replace(base.tok_embeddings, num_embeddings=VOCABULARY, embedding_dim=dim),
        norm=replace(base.norm, normalized_shape=dim),
        lm_head=replace(
            base.lm_head,
            in_features=dim,
            out_features=VOCABULARY,
            param_init=llama3._output_linear_init(dim),
        ),
        layers=llama3._build_llama3_layers(
            n_layers=n_layers,
            dim=dim,
            n_heads=n_heads,
            hidden_dim=compute_ffn_hidden_dim(dim, multiple_of=multiple_of),
            rope=replace(rope, dim=dim // n_heads, theta=10000, scaling="none"),
            **layers,
        ),
    )


def register() -> None:
    """Adds `tiny` (for tests) and `small` (a first run in about two minutes) to `llama3`."""
    tiny = partial(llama, dim=64, n_layers=2, n_heads=4, multiple_of=32)
    small = partial(llama, dim=192, n_layers=4, n_heads=6, multiple_of=64)
    llama3.llama3_configs.setdefault("tiny", tiny)
    llama3.llama3_configs.setdefault("small", small)

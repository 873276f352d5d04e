"""Small flavors of TorchTitan 0.2's Llama 3, for the byte tokenizer and machines without a GPU."""

from torchtitan.models.llama3 import TransformerModelArgs, llama3_args

from shampoo_torchtitan.demo import VOCABULARY


def register() -> None:
    """Adds `tiny` (for tests) and `small` (a first run in about two minutes) to `llama3`."""
    llama3_args.setdefault(
        "tiny",
        TransformerModelArgs(
            dim=64, n_layers=2, n_heads=4, vocab_size=VOCABULARY, multiple_of=32, rope_theta=10000
        ),
    )
    llama3_args.setdefault(
        "small",
        TransformerModelArgs(
            dim=192, n_layers=4, n_heads=6, vocab_size=VOCABULARY, multiple_of=64, rope_theta=10000
        ),
    )

"""What an optimizer is usually given of a model."""

from typing import Any

from torch import nn

from shampoo_fsdp.rules.matrices import is_matrix
from shampoo_fsdp.runtime.groups import FromEmbedding, FromModel
from shampoo_fsdp.validation import refuse_unknown

__all__ = ["head_settings", "param_groups", "typed_parameters"]

# Projections to queries, keys and values, by their names in Hugging Face models.
_TO_HEADS = ("q_proj", "k_proj", "v_proj", "qkv_proj", "query_key_value")


def param_groups(
    model: nn.Module, weight_decay: float = 0.1, **settings: Any
) -> list[dict[str, Any]]:
    """The parameters of a model that require a gradient, with their names, in the usual groups:
    matrices and convolutions lose weight, vectors (biases, norms) and embeddings do not. Shampoo
    leaves these embeddings to the grafted method, whatever their names (see `exclude`).

        Shampoo(param_groups(model, weight_decay=0.1), lr=1e-3)

    Args:
        model: sharded or not; tied weights are in it once.
        weight_decay: of the first group.
        settings: lr, betas or eps of both.

    Returns:
        one or two groups, without those that would be empty.

    Raises:
        TypeError: a setting that groups do not have.
        ValueError: no parameter requires a gradient.
    """
    for name in settings:
        refuse_unknown(name, ("lr", "betas", "eps"))
    decayed: list[FromModel] = []
    others: list[FromModel] = []
    for pair in typed_parameters(model):
        loses_weight = is_matrix(pair.parameter.shape) and not isinstance(pair, FromEmbedding)
        (decayed if loses_weight else others).append(pair)
    if not decayed and not others:
        raise ValueError(f"no parameter of {type(model).__name__} requires a gradient.")
    groups = [
        {"params": decayed, "weight_decay": weight_decay, **settings},
        {"params": others, "weight_decay": 0.0, **settings},
    ]
    return [group for group in groups if group["params"]]


def typed_parameters(model: nn.Module) -> list[FromModel]:
    """The named parameters of a model that require a gradient; Shampoo knows those of embeddings,
    and what is tied to them, as such."""
    embeddings = {
        parameter
        for module in model.modules()
        if isinstance(module, nn.Embedding | nn.EmbeddingBag)
        for parameter in module.parameters(recurse=False)
    }
    return [
        FromEmbedding(name, parameter) if parameter in embeddings else FromModel(name, parameter)
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    ]


def head_settings(model: nn.Module) -> dict[str, Any]:
    """`split_heads` and `head_dim` for a Hugging Face model, so that no block of a projection to
    queries, keys or values has rows of two heads.

        Shampoo(param_groups(model), **head_settings(model))

    Raises:
        ValueError: the model has no such projections, or its config does not tell their heads.
    """
    linear = (name for name, module in model.named_modules() if isinstance(module, nn.Linear))
    found = sorted({name.rpartition(".")[2] for name in linear}.intersection(_TO_HEADS))
    config = getattr(model, "config", None)
    config = getattr(config, "text_config", config)
    head_dim = getattr(config, "head_dim", None)
    heads, width = (getattr(config, n, None) for n in ("num_attention_heads", "hidden_size"))
    if head_dim is None and heads and width:
        head_dim = width // heads
    if not found or head_dim is None:
        raise ValueError(
            f"{type(model).__name__} has no linear layer named {', '.join(_TO_HEADS)}, or its "
            "config neither head_dim nor num_attention_heads and hidden_size: set 'split_heads' "
            "and 'head_dim'."
        )
    return {"split_heads": [rf"(^|\.){part}\." for part in found], "head_dim": head_dim}

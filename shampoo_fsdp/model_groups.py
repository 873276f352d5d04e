"""What an optimizer is usually given of a model."""

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from shampoo_fsdp.rules.factors import is_matrix

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from shampoo_fsdp.keywords import GroupKeywords

__all__ = ["head_settings", "param_groups"]

# Projections to queries, keys and values, by their names in Hugging Face models.
_TO_HEADS = ("q_proj", "k_proj", "v_proj", "qkv_proj", "query_key_value")


def param_groups(
    model: nn.Module, weight_decay: float = 0.1, **settings: "Unpack[GroupKeywords]"
) -> list[dict[str, Any]]:
    """The parameters of a model that require a gradient, with their names, in the usual groups:
    matrices and convolutions lose weight, vectors (biases, norms) and embeddings do not.

        Shampoo(param_groups(model, weight_decay=0.1), lr=1e-3)

    Args:
        model: sharded or not; tied weights are in it once.
        weight_decay: of the first group.
        settings: lr, betas or eps of both.

    Returns:
        one or two groups, without those that would be empty.

    Raises:
        ValueError: no parameter requires a gradient.
    """
    embeddings = {
        parameter
        for module in model.modules()
        if isinstance(module, nn.Embedding | nn.EmbeddingBag)
        for parameter in module.parameters(recurse=False)
    }
    decayed: list[tuple[str, Tensor]] = []
    others: list[tuple[str, Tensor]] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            loses_weight = is_matrix(parameter.shape) and parameter not in embeddings
            (decayed if loses_weight else others).append((name, parameter))
    if not decayed and not others:
        raise ValueError(f"no parameter of {type(model).__name__} requires a gradient.")
    groups = [
        {"params": decayed, "weight_decay": weight_decay, **settings},
        {"params": others, "weight_decay": 0.0, **settings},
    ]
    return [group for group in groups if group["params"]]


def head_settings(model: nn.Module) -> dict[str, Any]:
    """`split_heads` and `head_dim` for a Hugging Face model, so that no block of a projection to
    queries, keys or values has rows of two heads.

        Shampoo(param_groups(model), **head_settings(model))

    Raises:
        ValueError: the model has no such projections, or its config does not tell their heads.
    """
    found = sorted(
        {
            part
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear) and (part := name.rpartition(".")[2]) in _TO_HEADS
        }
    )
    config = getattr(model, "config", None)
    config = getattr(config, "text_config", config)
    head_dim = getattr(config, "head_dim", None)
    heads, width = (getattr(config, n, None) for n in ("num_attention_heads", "hidden_size"))
    if head_dim is None and heads and width:
        head_dim = width // heads
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no linear layer named {', '.join(_TO_HEADS)}: set "
            "'split_heads' and 'head_dim'."
        )
    if head_dim is None:
        raise ValueError(
            f"the config of {type(model).__name__} has neither head_dim nor num_attention_heads "
            "and hidden_size: set 'split_heads' and 'head_dim'."
        )
    return {"split_heads": [rf"(^|\.){part}\." for part in found], "head_dim": head_dim}

"""Which parameters are preconditioned: by shape, by name and, where a model has told it, by the
type of their module."""

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

from shampoo_fsdp.config import DEFAULT_EXCLUDE, ShampooConfig
from shampoo_fsdp.plan.grid import view_dims
from shampoo_fsdp.rules.matrices import is_matrix
from shampoo_fsdp.validation import name_some, unmatched

__all__ = ["exactly", "excluded_names", "is_preconditioned", "with_embeddings"]

# So many more rows than columns are those of a vocabulary more often than not.
_TALL = 8


# Embeddings see few rows per step and the output layer has one row per token of the vocabulary:
# their factors would be large, nearly diagonal and slow to fill, so Adam treats them better.
_EMBEDDINGS_AND_OUTPUT = (
    r"(^|[._])emb",
    r"(^|\.)(wte|wpe|lm_head)\.",
    r"^(model\.)?(output|head|score)\.",
)


def excluded_names(config: ShampooConfig) -> list[str]:
    """The expressions of `exclude`, with those that "default" stands for."""
    named = [pattern for pattern in config.exclude if pattern != DEFAULT_EXCLUDE]
    return named if len(named) == len(config.exclude) else [*_EMBEDDINGS_AND_OUTPUT, *named]


def is_preconditioned(name: str, shape: Sequence[int], config: ShampooConfig) -> bool:
    """Whether Shampoo preconditions a parameter; the grafted method alone updates it otherwise."""
    if not shape or math.prod(shape) == 0:
        return False
    if any(re.search(pattern, name) for pattern in excluded_names(config)):
        return False
    if config.precondition_1d:
        return True
    dims, batch_dims = view_dims(shape, config)
    view = [math.prod(shape[d] for d in group) for group in dims[batch_dims:]]
    # A small matrix that is merged has one factor for all, and is still no vector.
    return is_matrix(shape if config.merge_dims == "small" and not batch_dims else view)


def exactly(name: str) -> str:
    """The expression that matches this name alone."""
    return f"^{re.escape(name)}$"


def with_embeddings(config: ShampooConfig, names: Iterable[str]) -> ShampooConfig:
    """The settings, with embeddings of these names in `exclude` if it has the default ones."""
    if DEFAULT_EXCLUDE not in config.exclude:
        return config
    others = [n for n in names if not any(re.search(p, n) for p in excluded_names(config))]
    return config.completed(exclude=[*config.exclude, *map(exactly, others)])


def refuse_nameless(shapes: Mapping[str, tuple[int, ...]], config: ShampooConfig) -> None:
    """Raise a ValueError where embeddings cannot be told, because no parameter has a name."""
    matrices = [s for n, s in shapes.items() if len(s) > 1 and is_preconditioned(n, s, config)]
    if matrices:
        raise ValueError(
            f"{len(shapes)} parameters have no names, which tell what of {len(matrices)} matrices "
            "are embeddings and the output layer. Give Shampoo shampoo_fsdp.param_groups(model), "
            "model.named_parameters() or groups with 'param_names'; or set exclude = [] to "
            "precondition all matrices."
        )


def what_names_miss(
    shapes: Mapping[str, tuple[int, ...]],
    frozen: Sequence[str],
    embeddings: Mapping[str, bool],
    config: ShampooConfig,
) -> Iterator[str]:
    """Sentences about expressions for names that do nothing, or leave embeddings in.

    No errors: a stage of a pipeline may have no attention, and no embeddings.

    Args:
        shapes: of the parameters that are trained, by name, in the order of the model.
        frozen: names of the others, which may be trained in another run.
        embeddings: whether a parameter is that of an embedding, where a model has told it.
    """
    chosen = [name for name, shape in shapes.items() if is_preconditioned(name, shape, config)]
    own = [pattern for pattern in config.exclude if pattern != DEFAULT_EXCLUDE]
    for setting, patterns, kind, names in (
        ("split_heads", config.split_heads, "preconditioned parameter", chosen),
        ("exclude", own, "parameter", [*shapes, *frozen]),
    ):
        if found := unmatched(patterns, names):
            yield (
                f"setting '{setting}' has {name_some(found)}, which the name of no {kind} matches "
                "(or of none in this part of the model)."
            )
    if shapes and not chosen:
        everything = config.completed(exclude=[])
        matrices = sum(is_preconditioned(name, shape, everything) for name, shape in shapes.items())
        why = f"setting 'exclude' matches every matrix ({matrices})"
        if not matrices:
            why = f"none of {len(shapes)} parameters is a matrix ({name_some(list(shapes))})"
        yield f"{why}: none is preconditioned, and Shampoo is {config.elementwise_method} here."
    if config.exclude and (found := _doubtful(shapes, embeddings, chosen)):
        yield (
            f"{name_some(found)}: preconditioned, but by type, shape or place embeddings or the "
            f"output layer. To leave them to '{config.elementwise_method}' name them in 'exclude', "
            "or use shampoo_fsdp.param_groups(model). (exclude = [] preconditions all matrices.)"
        )


def _doubtful(
    shapes: Mapping[str, tuple[int, ...]], embeddings: Mapping[str, bool], chosen: Sequence[str]
) -> list[str]:
    """Preconditioned matrices that may be embeddings or the output layer, by name.

    Where types are known these are embeddings, and a last matrix that has the rows of one. Else
    they are matrices outside of layers with numbers, if they are tall, or the first or the last.
    """
    matrices = [name for name, shape in shapes.items() if len(shape) == 2 and min(shape) > 1]
    outside = [name for name in matrices if not _numbered(name)]
    if embeddings:
        suspects = [name for name in shapes if embeddings.get(name)]
        rows = {shapes[name][0] for name in suspects}
        suspects += [name for name in outside[-1:] if shapes[name][0] in rows]
    else:
        layers = any(map(_numbered, shapes))
        ends = matrices[:1] + matrices[-1:] if layers else []
        tall = [name for name in outside if shapes[name][0] > _TALL * shapes[name][1]]
        suspects = [name for name in outside if name in ends or name in tall]
    return [name for name in chosen if name in suspects]


def _numbered(name: str) -> bool:
    return any(part.isdigit() for part in name.split("."))

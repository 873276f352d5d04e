"""Keyword arguments, as type checkers know them; nothing reads this when a program runs.

A dataclass cannot say what keywords it takes: the fields of `ShampooConfig` are here once more, and
a test compares the two.
"""

from typing import Literal, TypedDict

from torch import Tensor

__all__ = ["GroupKeywords", "Keywords"]


class GroupKeywords(TypedDict, total=False):
    """Of a parameter group."""

    lr: float | Tensor
    betas: tuple[float, float]
    eps: float


class Keywords(TypedDict, total=False):
    """The fields of :class:`shampoo_fsdp.ShampooConfig`, and the options of torch.optim that are
    accepted where they change nothing."""

    max_preconditioner_dim: int
    large_dim: Literal["block", "one_sided", "diagonal"]
    max_factor_ratio: float
    merge_dims: Literal["matrix", "small"]
    split_heads: list[str]
    head_dim: int | None
    preconditioner: str
    precondition_frequency: int
    start_preconditioning_step: int
    refresh_warmup_steps: int | None
    refresh_schedule: Literal["staggered", "together"]
    root_method: str | None
    matmul_precision: Literal["highest", "high", "medium"] | None
    root_exponents: list[float]
    grafting: Literal["adam", "rmsprop", "adagrad", "sgd", "none"]
    grafting_beta2: float | None
    grafting_eps: float | None
    beta3: float | None
    preconditioner_eps: float
    use_bias_correction: bool
    momentum: float
    nesterov: bool
    dampening: float
    weight_decay_type: Literal["decoupled", "l2", "independent"]
    factor_dtype: Literal["float32", "bfloat16"]
    root_dtype: Literal["float32", "bfloat16"] | None
    momentum_dtype: Literal["float32", "bfloat16"]
    symmetric_packing: bool
    on_nonfinite: Literal["skip", "raise"]
    on_mismatch: Literal["refuse", "rebuild"]
    exclude: list[str]
    excluded_lr_factor: float
    base_width: int | None
    precondition_1d: bool
    block_alignment: Literal["logical", "shard"]
    communication_dtype: Literal["float32", "bfloat16"]
    buckets: int | None
    compile: bool
    owner_scope: Literal["all", "shard"]
    ranks_per_node: int

    foreach: bool | None
    fused: bool | None
    maximize: bool
    amsgrad: bool
    capturable: bool
    differentiable: bool
    centered: bool
    decoupled_weight_decay: bool
    lr_decay: float
    initial_accumulator_value: float

"""Every setting of Shampoo: its name, default, meaning, the values it allows and what follows.

:class:`ShampooConfig` is at once the keyword arguments of :class:`shampoo_fsdp.Shampoo` and the
``[optimizer.shampoo]`` table of a TorchTitan job file.
"""

import ast
import inspect
import itertools
import math
import textwrap
from dataclasses import dataclass, field
from typing import Any, Literal

from shampoo_fsdp.validation import (
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Share,
    check_fields,
    check_patterns,
    refuse,
)

__all__ = ["FIELD_TEXTS", "RULES", "ShampooConfig"]

DEFAULT_EXCLUDE = "default"
"""In `exclude`, what stands for embeddings and the output layer."""

_DTYPES = ("factor_dtype", "root_dtype", "momentum_dtype", "second_moment_dtype")

RULES: dict[str, Any] = {}
"""The rules, by the name that the setting `preconditioner` gives them: each class registers
itself (see :class:`shampoo_fsdp.rules.Rule`)."""


@dataclass(frozen=True, kw_only=True)
class ShampooConfig:
    """Settings of Shampoo that stay fixed for a run."""

    max_preconditioner_dim: PositiveInt = 1024
    """Largest side of a block. A longer dimension is cut into tiles of nearly equal size; larger
    blocks precondition better, cost more per step and more memory."""

    large_dim: Literal["block", "one_sided", "diagonal"] = "block"
    """What becomes of a dimension longer than max_preconditioner_dim. 'block': it is cut;
    'one_sided': it is left whole and has no factor (unless all dimensions of the parameter are
    longer: then they are cut); 'diagonal': it is left whole and its factor is a diagonal."""

    max_factor_ratio: PositiveFloat = 4.0
    """Largest ratio of a factor's elements to those of its block: an m x n block has no factor for
    n where n > max_factor_ratio * m, as in adapters of a low rank and routers of few experts. The
    shortest side has one in any case."""

    merge_dims: Literal["matrix", "small"] = "matrix"
    """Which dimensions are seen as one. 'matrix': a tensor of four or more (a convolution) is the
    matrix [out, rest]; 'small': neighbours whose product is at most max_preconditioner_dim, as in
    the paper, in matrices too. One of three is a batch of matrices in any case, as experts are."""

    split_heads: list[str] = field(default_factory=list)
    """Regular expressions; a matrix [rows, in], or each of a batch of them, whose name contains a
    match is cut along its rows at every multiple of head_dim, so that no block has rows of two
    heads: projections to queries, keys and values, also where they are fused."""

    head_dim: PositiveInt | None = None
    """Rows of a head in what split_heads matches, or of several heads that share their blocks; it
    must divide the rows. In TorchTitan jobs the model says, if it is not given. Where it is
    below 1 / max_factor_ratio of a block's other side, that side has no factor."""

    preconditioner: str = "kl_shampoo"
    """The rule. 'shampoo': inverse roots of the gradient's second moment on each side; 'soap': Adam
    in the eigenbasis of these moments; 'kl_shampoo': inverse roots of moments that are whitened by
    the other side first; or the name of a rule of your own (see shampoo_fsdp.rules)."""

    precondition_frequency: PositiveInt = 10
    """Steps between two refreshes of a block's inverse roots (or eigenbases)."""

    start_preconditioning_step: PositiveInt = 2
    """First step that is preconditioned; before it the grafted method runs alone, while the
    factors fill."""

    refresh_warmup_steps: NonNegativeInt | None = None
    """Steps over which the time between two refreshes grows from 1 to precondition_frequency, as
    factors change fastest at the start. (More, if a length would be in use for fewer steps than it
    has.) Default: 10 * precondition_frequency."""

    refresh_schedule: Literal["staggered", "together"] = "staggered"
    """'staggered' spreads the refreshes of blocks evenly over the steps of a period; 'together'
    refreshes every block on the same step, as the papers do."""

    root_method: str | None = None
    """How inverse roots are taken. 'eigh': by eigendecomposition; 'eigh_pseudo_inverse': the same
    with a zero in place of the inverse of a vanishing eigenvalue; 'polynomial': by few matrix
    products, to an error that trainings do not notice; 'coupled_newton': by more, to rounding;
    'qr': by one QR step from the last eigenbasis. Default: 'polynomial' on accelerators, 'eigh' on
    CPUs and where products cannot take the root; for soap, which knows 'eigh' and 'qr', 'qr'."""

    matmul_precision: Literal["highest", "high", "medium"] | None = None
    """Of the matrix products of every step, but not of roots: 'highest': fp32; 'high': TF32, where
    the device has it; 'medium': inputs in bf16, sums in fp32, by which directions that gradients
    lack, as with few rows in a batch, come to count, unless, for kl_shampoo, preconditioner_eps is
    0.004. Default: 'medium' (for soap 'high') where the device is faster in it, also CPUs with bf16
    arithmetic; else 'highest'."""

    root_exponents: list[NonNegativeFloat] = field(default_factory=list)
    """Entry k - 1 is the p of factor^(-p) for blocks with k factors; where it is missing or zero, p
    is 1 / (2 k). For shampoo: kl_shampoo's p is 1 / 2, and soap has none."""

    grafting: Literal["adam", "rmsprop", "adagrad", "sgd", "none"] = "adam"
    """The method whose step size each block takes, and that updates the excluded parameters (Adam
    does for 'none')."""

    grafting_beta2: Share | None = None
    """Decay of the grafted method's second moment. Default: the optimizer's beta2."""

    grafting_eps: NonNegativeFloat | None = None
    """Epsilon of the grafted method. Default: the optimizer's eps."""

    beta3: Share | None = None
    """Weight of the last momentum M in what is preconditioned and grafted, beta3 M +
    (1 - beta3) G, the M that is kept being averaged with beta1: beta1 is the usual momentum.
    Default: beta1 * beta1, Nesterov's (Dozat 2016)."""

    preconditioner_eps: PositiveFloat = 1e-12
    """Ridge that is added to the factors before their inverse roots are taken; for kl_shampoo
    relative to the mean of the factor's eigenvalues. Before that 'eigh' and 'qr' raise eigenvalues
    to 1.2e-7 times the largest (1e-5 for kl_shampoo, 2.4e-4 with factors in bf16), 'polynomial' to
    1e-5 times it. (`eps` is that of the grafted method, and of soap.)"""

    use_bias_correction: bool = True
    """Whether averages are divided by 1 - beta^t, as they start at zero."""

    momentum: Share = 0.0
    """Heavy-ball momentum of the updates, after preconditioning (beta1 averages gradients)."""

    nesterov: bool = False
    """Whether that momentum is Nesterov's."""

    dampening: Share = 0.0
    """Dampening of that momentum, as in torch.optim.SGD."""

    weight_decay_type: Literal["decoupled", "l2", "independent"] = "decoupled"
    """'decoupled': weights shrink by lr_factor * lr * weight_decay (AdamW); 'l2': weight_decay *
    weight is added to the gradient; 'independent': weights shrink by weight_decay * lr / initial
    lr, so that the schedule counts and the size of lr does not."""

    factor_dtype: Literal["float32", "bfloat16"] = "float32"
    """Type in which factors are kept; they are computed with in fp32."""

    root_dtype: Literal["float32", "bfloat16"] | None = None
    """Type in which inverse roots and eigenvectors are kept. Default: 'bfloat16' for inverse roots
    if matmul_precision is 'medium', which rounds them anyway; else 'float32'."""

    momentum_dtype: Literal["float32", "bfloat16"] = "float32"
    """Type in which the momenta of blocks are kept."""

    second_moment_dtype: Literal["float32", "bfloat16"] = "float32"
    """Type in which the second moments of blocks are kept, those of the grafted method."""

    symmetric_packing: bool = False
    """Whether factors and inverse roots are kept as their upper triangles: half of the memory for
    a copy on every step."""

    memory: Literal["normal", "low"] = "normal"
    """'low': all of the above in bfloat16 and packed: square blocks have 8 bytes of state per
    parameter, as with AdamW."""

    on_nonfinite: Literal["skip", "raise"] = "skip"
    """What a step does about a gradient with a NaN or infinity: leave such blocks out and count
    them, or raise on all ranks before anything has changed, for which every step then makes the
    host wait for the device."""

    on_mismatch: Literal["refuse", "rebuild"] = "refuse"
    """What loading does about a checkpoint of other settings: refuse it, or take what
    fits (the moments at least) and start the rest anew."""

    exclude: list[str] = field(default_factory=lambda: [DEFAULT_EXCLUDE])
    r"""Regular expressions; a parameter whose name contains a match is left to the grafted method.
    'default' stands for embeddings and the output layer: for `(^|[._])emb`,
    `(^|\.)(wte|wpe|lm_head)\.` and `^(model\.)?(output|head|score)\.`, and, where there is a model
    (`param_groups(model)`, TorchTitan), for every `nn.Embedding` and what is tied to it, whatever
    its name. ["default", "router"] adds to it, ["router"] takes its place, [] excludes nothing."""

    lr_factor: PositiveFloat = 3.0
    """The step's lr as a multiple of lr, so that lr is the one that AdamW wants; 1 takes lr as it
    is, as for convolutions. Each parameter group has its own, and so do checkpoints: that of before
    this setting is 1."""

    excluded_lr_factor: PositiveFloat = 1.0
    """The same for the parameters that are not preconditioned (excluded ones, and vectors), on top
    of lr_factor; 1 / lr_factor gives them AdamW's very step."""

    base_width: PositiveInt | None = None
    """Width for which lr is meant: a preconditioned weight [out, in] moves by sqrt(base_width / in)
    times what lr says, so that lr of a narrow model is that of a wide one. Default: by lr."""

    precondition_1d: bool = False
    """Whether parameters of one dimension (biases, norms; matrices of one row or column) are
    preconditioned, by one full matrix per block; otherwise the grafted method updates them."""

    block_alignment: Literal["logical", "shard"] = "logical"
    """'logical' cuts blocks on the whole parameter, so that the update does not depend on the
    mesh; 'shard' cuts at the borders of the shards as well, so that nothing has to be sent."""

    communication_dtype: Literal["float32", "bfloat16"] = "float32"
    """Type in which gradients travel to a block's owner and updates travel back."""

    buckets: PositiveInt | None = None
    """In how many parts the gradients of parameters on the same ranks travel, so that one part is
    on its way while another is computed, and only a part is in memory. Default: as many as make
    84 * 2^20 numbers per rank each, 336 MiB in fp32; on one rank alone 2^28."""

    kernels: Literal["auto", "off"] = "auto"
    """'auto': kernels of our own, in Triton, on the NVIDIA GPUs that have what they need; 'off':
    PyTorch's operators alone."""

    owner_scope: Literal["all", "near", "shard"] = "all"
    """Where the owners of a block may be. 'all': on all ranks of the parameter, so that replicas
    share the work; 'near': on those that hold a part of the block, chosen so that a rank has few
    others to exchange anything with, for less even work; 'shard': within each replica, so that
    every replica repeats the work of all blocks and nothing is sent between replicas."""

    ranks_per_node: PositiveInt = 8
    """Ranks with a fast connection: r and s are on one node if r // ranks_per_node is equal."""

    stall_warning_seconds: PositiveFloat = 120.0
    """After how long a rank that waits for gradients or updates of others logs a warning with the
    step, the bucket and the ranks, and goes on waiting; at most half of the process group's own
    timeout."""

    def __post_init__(self) -> None:
        check_fields(type(self), vars(self))
        if self.memory == "low":
            vars(self).update({name: "bfloat16" for name in _DTYPES}, symmetric_packing=True)
        if self.nesterov and not (self.momentum > 0.0 and self.dampening == 0.0):
            refuse("nesterov", True, "false without a momentum > 0 or with dampening")
        if self.preconditioner not in RULES:
            refuse("preconditioner", self.preconditioner, " or ".join(map(repr, RULES)))
        if self.root_method not in (None, *self.rule.root_methods):
            methods = " or ".join(map(repr, self.rule.root_methods))
            refuse("root_method", self.root_method, f"{methods} for {self.preconditioner}")
        self.rule.check(self)
        check_patterns("exclude", self.exclude)
        check_patterns("split_heads", self.split_heads)

    def completed(self, **values: Any) -> "ShampooConfig":
        """A copy with values that follow from the device or the model, and need no check."""
        copy = object.__new__(type(self))
        vars(copy).update(vars(self) | values)
        return copy

    @property
    def rule(self) -> Any:
        """What `preconditioner` names."""
        return RULES[self.preconditioner]

    @property
    def basis_method(self) -> str:
        """`root_method`, or its default where it is not set."""
        return self.root_method or str(self.rule.root_methods[0])

    @property
    def elementwise_method(self) -> str:
        """The method of excluded parameters."""
        return "adam" if self.grafting == "none" else self.grafting

    def refresh_period(self, step: int) -> int:
        """Steps between two refreshes of blocks whose factors have seen so many gradients."""
        frequency, warmup = self.precondition_frequency, self.refresh_warmup_steps
        warmup = 10 * frequency if warmup is None else warmup
        if warmup == 0:
            return frequency
        # Length p is in use for max(least, p) steps: if it were for less, staggered blocks whose
        # turn comes late would miss it, at each length anew.
        least = max(1, warmup // frequency)
        period = step // least if step <= least**2 else math.isqrt(2 * step - least**2)
        return min(max(1, period), frequency)


def _texts() -> dict[str, str]:
    """What stands below each field; {} where there is no source, as in a frozen program."""
    try:
        of_class: Any = ast.parse(inspect.getsource(ShampooConfig)).body[0]
    except OSError:
        return {}
    fields = (of for of in itertools.pairwise(of_class.body) if type(of[0]) is ast.AnnAssign)
    return {field.target.id: " ".join(text.value.value.split()) for field, text in fields}


FIELD_TEXTS = _texts()
"""What each setting means, by its name: for `help(ShampooConfig)`, commands and docs."""

ShampooConfig.__doc__ = "\n\n".join(
    [ShampooConfig.__doc__ or "", "Fields:"]
    + [
        textwrap.fill(f"{name}: {text}", 96, initial_indent="    ", subsequent_indent=" " * 8)
        for name, text in FIELD_TEXTS.items()
    ]
)

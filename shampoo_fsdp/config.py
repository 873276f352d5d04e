"""Every setting of Shampoo: its name, default, meaning and the values it allows.

:class:`ShampooConfig` is at once the keyword arguments of :class:`shampoo_fsdp.Shampoo` and the
``[optimizer.shampoo]`` table of a TorchTitan job file.
"""

import dataclasses
import difflib
import math
import re
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from numbers import Real
from typing import Any, Literal, NoReturn

from torch import Tensor

__all__ = [
    "TORCH_OPTIONS",
    "ShampooConfig",
    "check_torch_options",
    "settings_from_keywords",
    "validate_hyperparameters",
]

# Embeddings see few rows per step and the output layer has one row per token of the vocabulary:
# their factors would be large, nearly diagonal and slow to fill, so Adam treats them better.
_EMBEDDINGS_AND_OUTPUT = (
    r"(^|[._])emb",
    r"(^|\.)(wte|wpe|lm_head)\.",
    r"^(model\.)?(output|head|score)\.",
)

# Options of torch.optim's optimizers: the values that change nothing here, and what to do instead
# of the others.
_TORCH_OPTIONS: dict[str, tuple[tuple[bool | int | None, ...], str]] = {
    # These two choose between implementations of one update.
    "foreach": ((None, False, True), ""),
    "fused": ((None, False, True), ""),
    "maximize": ((False,), "negate the loss instead"),
    "amsgrad": ((False,), "no largest second moment is kept"),
    "capturable": ((False,), "the step cannot be captured in a CUDA graph"),
    "differentiable": ((False,), "no gradient flows through the step"),
    "centered": ((False,), "see 'grafting' for the methods that there are"),
    "decoupled_weight_decay": ((True,), "for another kind set 'weight_decay_type'"),
    "lr_decay": ((0,), "use a learning-rate scheduler"),
    "initial_accumulator_value": ((0,), "for a floor of the denominators set 'grafting_eps'"),
    "beta1": ((), "give both to 'betas'"),
    "beta2": ((), "give both to 'betas'"),
}

TORCH_OPTIONS = frozenset(_TORCH_OPTIONS)
"""Names of the options of torch.optim's optimizers that :func:`check_torch_options` knows."""


@dataclass(frozen=True, kw_only=True)
class ShampooConfig:
    """Settings of Shampoo that stay fixed for a run."""

    max_preconditioner_dim: int = 1024
    """Largest side of a block. A longer dimension is cut into tiles of nearly equal size; larger
    blocks precondition better, cost more per step and more memory."""

    large_dim: Literal["block", "one_sided", "diagonal"] = "block"
    """What becomes of a dimension longer than max_preconditioner_dim. 'block': it is cut;
    'one_sided': it is left whole and has no factor (unless all dimensions of the parameter are
    longer: then they are cut); 'diagonal': it is left whole and its factor is a diagonal."""

    max_factor_ratio: float = 4.0
    """Largest ratio of a factor's elements to those of its block: an m x n block has no factor for
    n where n > max_factor_ratio * m, as in adapters of a low rank and routers of few experts. The
    shortest side has one in any case."""

    merge_dims: Literal["matrix", "small", "none"] = "matrix"
    """Which dimensions are seen as one. 'matrix': a tensor of four or more dimensions (a
    convolution) is the matrix [out, rest]; 'small': neighbours whose product is at most
    max_preconditioner_dim, as in the paper, in matrices too; 'none': a factor for each."""

    preconditioner: Literal["shampoo", "soap", "kl_shampoo"] = "kl_shampoo"
    """'shampoo': inverse roots of the gradient's second moment on each side; 'soap': Adam in the
    eigenbasis of these moments; 'kl_shampoo': inverse roots of moments that are whitened by the
    other side first."""

    precondition_frequency: int = 10
    """Steps between two refreshes of a block's inverse roots (or eigenbases)."""

    start_preconditioning_step: int = 2
    """First step that is preconditioned; before it the grafted method runs alone, while the
    factors fill."""

    refresh_warmup_steps: int | None = None
    """Steps over which the time between two refreshes grows from 1 to precondition_frequency, as
    factors change fastest at the start; more, if each length could not be in use for as many steps
    as it has. Default: 10 * precondition_frequency."""

    refresh_schedule: Literal["staggered", "together"] = "staggered"
    """'staggered' spreads the refreshes of the blocks evenly over the steps of a period, so that
    no step is slow; 'together' refreshes every block on the same step, as the papers do."""

    root_method: (
        Literal["eigh", "eigh_pseudo_inverse", "coupled_newton", "newton_db", "qr"] | None
    ) = None
    """How inverse roots are taken: by eigendecomposition, the same with a zero in place of the
    inverse of a vanishing eigenvalue, by two iterations of matrix products alone, or by one QR
    step from the last eigenbasis. Default: 'eigh'; for soap, which knows 'eigh' and 'qr', 'qr'."""

    root_exponents: list[float] = field(default_factory=list)
    """Entry k - 1 is the p of factor^(-p) for blocks with k factors; where it is missing or zero, p
    is 1 / (2 k). For shampoo: kl_shampoo's p is 1 / 2, and soap has none."""

    grafting: Literal["adam", "rmsprop", "adagrad", "sgd", "none"] = "adam"
    """The method whose step size each block takes, and that updates the excluded parameters (Adam
    does for 'none')."""

    grafting_beta2: float | None = None
    """Decay of the grafted method's second moment. Default: the optimizer's beta2."""

    grafting_eps: float | None = None
    """Epsilon of the grafted method. Default: the optimizer's eps."""

    beta3: float | None = None
    """Weight of the last momentum M in what is preconditioned and grafted, beta3 M +
    (1 - beta3) G, the M that is kept being averaged with beta1: beta1 is the usual momentum.
    Default: beta1 * beta1, Nesterov's (Dozat 2016)."""

    preconditioner_eps: float = 1e-12
    """Ridge that is added to the factors before their inverse roots are taken; for kl_shampoo
    relative to the mean of the factor's eigenvalues. Eigenvalues are raised to 1.2e-7 times the
    largest (1e-5 for kl_shampoo) in any case. (The optimizer's `eps` is the epsilon of the grafted
    method, and of soap.)"""

    use_bias_correction: bool = True
    """Whether averages are divided by 1 - beta^t, as they start at zero."""

    momentum: float = 0.0
    """Heavy-ball momentum of the updates, after preconditioning (beta1 averages gradients)."""

    nesterov: bool = False
    """Whether that momentum is Nesterov's."""

    dampening: float = 0.0
    """Dampening of that momentum, as in torch.optim.SGD."""

    weight_decay_type: Literal["decoupled", "l2", "independent"] = "decoupled"
    """'decoupled': weights shrink by lr * weight_decay (AdamW); 'l2': weight_decay * weight is
    added to the gradient; 'independent': weights shrink by weight_decay * lr / initial lr, so that
    the schedule counts and the size of lr does not."""

    factor_dtype: Literal["float32", "bfloat16"] = "float32"
    """Type in which factors are kept; they are computed with in fp32."""

    root_dtype: Literal["float32", "bfloat16"] = "float32"
    """Type in which inverse roots and eigenvectors are kept."""

    momentum_dtype: Literal["float32", "bfloat16"] = "float32"
    """Type in which the momenta of blocks are kept."""

    symmetric_packing: bool = False
    """Whether factors and inverse roots are kept as their upper triangles: half of the memory for
    a copy on every step."""

    on_nonfinite: Literal["skip", "raise"] = "skip"
    """What a step does about a gradient with a NaN or infinity: leave such blocks out and count
    them, or raise on all ranks before anything has changed, for which every step then makes the
    host wait for the device."""

    on_mismatch: Literal["refuse", "rebuild"] = "refuse"
    """What loading does about a checkpoint of other settings: refuse it, or take what
    fits (the moments at least) and start the rest anew."""

    exclude: list[str] = field(default_factory=lambda: list(_EMBEDDINGS_AND_OUTPUT))
    """Regular expressions; a parameter whose name contains a match is left to the grafted method.
    Default: embeddings and the output layer."""

    excluded_lr_factor: float = 1.0
    """lr of the parameters that are not preconditioned (excluded ones, and vectors), as a multiple
    of lr; below 1 if lr is above what AdamW bears."""

    precondition_1d: bool = False
    """Whether parameters of one dimension (biases, norms; matrices of one row or column) are
    preconditioned, by one full matrix per block; otherwise the grafted method updates them."""

    batched_3d: bool = True
    """Whether a parameter of three dimensions is a batch of matrices, as the experts of a MoE
    layer are, or else a tensor of order three with a factor for each dimension."""

    block_alignment: Literal["logical", "shard"] = "logical"
    """'logical' cuts blocks on the whole parameter, so that the update does not depend on the
    mesh; 'shard' cuts at the borders of the shards as well, so that nothing has to be sent."""

    communication_dtype: Literal["float32", "bfloat16"] = "float32"
    """Type in which gradients travel to a block's owner and updates travel back."""

    buckets: int | None = None
    """In how many parts the gradients travel, so that one part is on its way while another is
    computed, and only a part is in memory. Default: as many as make 128 MiB per rank each."""

    compile: bool = False
    """Whether torch.compile fuses the step's elementwise work, once for each shape of block."""

    memory_cap: float | None = None
    """GiB of state of blocks that a rank may own, for each set of parameters that share their
    ranks. Default: no cap."""

    owner_scope: Literal["all", "shard", "auto"] = "all"
    """Where the owners of a block may be. 'all': on all ranks of the parameter, so that replicas
    share the work; 'shard': within each replica, so that every replica repeats the work of all
    blocks and nothing is sent between replicas; 'auto': whichever takes less time by the model
    that the next settings describe."""

    ranks_per_node: int = 8
    """Ranks with a fast connection: r and s are on one node if r // ranks_per_node is equal."""

    intra_node_bandwidth: float = 300.0
    """GB/s that a rank sends within its node; for owner_scope = 'auto'."""

    inter_node_bandwidth: float = 40.0
    """GB/s that a rank sends to other nodes; for owner_scope = 'auto'."""

    device_tflops: float = 40.0
    """TFLOP/s of a rank in fp32 matrix products; for owner_scope = 'auto'."""

    def __post_init__(self) -> None:
        for name, annotation in typing.get_type_hints(type(self)).items():
            _check_type(name, getattr(self, name), annotation)
        _check_at_least("max_preconditioner_dim", self.max_preconditioner_dim, 1)
        _check_at_least("precondition_frequency", self.precondition_frequency, 1)
        _check_at_least("start_preconditioning_step", self.start_preconditioning_step, 1)
        if self.buckets is not None:
            _check_at_least("buckets", self.buckets, 1)
        if self.refresh_warmup_steps is not None:
            _check_at_least("refresh_warmup_steps", self.refresh_warmup_steps, 0)
        for name in ("grafting_beta2", "beta3"):
            if getattr(self, name) is not None and not 0.0 <= getattr(self, name) < 1.0:
                _refuse(name, getattr(self, name), f"0 <= {name} < 1")
        if not (math.isfinite(self.preconditioner_eps) and self.preconditioner_eps > 0.0):
            _refuse("preconditioner_eps", self.preconditioner_eps, "a positive number")
        _check_at_least("ranks_per_node", self.ranks_per_node, 1)
        if self.grafting_eps is not None and not self.grafting_eps >= 0.0:
            _refuse("grafting_eps", self.grafting_eps, "a number >= 0")
        for name in ("momentum", "dampening"):
            if not 0.0 <= getattr(self, name) < 1.0:
                _refuse(name, getattr(self, name), f"0 <= {name} < 1")
        if self.nesterov and not (self.momentum > 0.0 and self.dampening == 0.0):
            _refuse("nesterov", True, "false without a momentum > 0 or with dampening")
        for exponent in self.root_exponents:
            if not (math.isfinite(exponent) and exponent >= 0.0):
                _refuse("root_exponents", exponent, "numbers >= 0")
        if self.preconditioner == "soap" and self.root_method not in (None, "eigh", "qr"):
            _refuse("root_method", self.root_method, "'eigh' or 'qr' for soap")
        if self.preconditioner == "kl_shampoo" and self.root_method == "eigh_pseudo_inverse":
            # What both sides lack would be whitened to zero, and so never enter either.
            _refuse(
                "root_method",
                self.root_method,
                "'eigh', 'coupled_newton', 'newton_db' or 'qr' for kl_shampoo",
            )
        if self.preconditioner != "shampoo" and any(self.root_exponents):
            _refuse("root_exponents", self.root_exponents, f"[] for {self.preconditioner}")
        if self.factor_dtype == "bfloat16" and self.root_method in ("coupled_newton", "newton_db"):
            # Rounding makes eigenvalues negative, down to 2^-7 of the largest: these diverge then.
            _refuse("root_method", self.root_method, "'eigh' or 'qr' if factor_dtype is 'bfloat16'")
        positive = (
            "excluded_lr_factor",
            "max_factor_ratio",
            "intra_node_bandwidth",
            "inter_node_bandwidth",
            "device_tflops",
        )
        for name in (*positive, *(() if self.memory_cap is None else ("memory_cap",))):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) > 0.0):
                _refuse(name, getattr(self, name), "a positive number")
        for pattern in self.exclude:
            if not pattern:
                _refuse("exclude", "", "no empty pattern, which is in every name ('.' says so)")
            try:
                re.compile(pattern)
            except re.error as error:
                _refuse("exclude", pattern, f"regular expressions ({error})")

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

    @property
    def elementwise_method(self) -> str:
        """The method of excluded parameters."""
        return "adam" if self.grafting == "none" else self.grafting

    @property
    def basis_method(self) -> str:
        """`root_method`, or its default where it is not set."""
        return self.root_method or ("qr" if self.preconditioner == "soap" else "eigh")

    def root_exponent(self, factors: int) -> float:
        """The p of factor^(-p) for a block with this number of factors, at least one."""
        if self.preconditioner == "kl_shampoo":
            return 0.5
        given = self.root_exponents[factors - 1] if factors <= len(self.root_exponents) else 0.0
        return given or 0.5 / factors


def settings_from_keywords(keywords: dict[str, Any]) -> ShampooConfig:
    """The configuration for keyword arguments; a TypeError names an unknown one.

    Options of torch.optim's optimizers are checked and left out.
    """
    check_torch_options(keywords)
    keywords = {name: value for name, value in keywords.items() if name not in TORCH_OPTIONS}
    known = [f.name for f in dataclasses.fields(ShampooConfig)]
    for name in keywords:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f" Did you mean '{close[0]}'?" if close else ""
            raise TypeError(f"unknown setting '{name}'.{hint} Allowed: {', '.join(known)}.")
    return ShampooConfig(**keywords)


def check_torch_options(options: Mapping[str, Any]) -> None:
    """Accept options of torch.optim's optimizers where they change nothing.

    Args:
        options: keyword arguments, or a parameter group; other entries may be anything.

    Raises:
        ValueError: names the first option with another value, and what to do.
    """
    for name, (harmless, instead) in _TORCH_OPTIONS.items():
        if name in options:
            value = options[name]
            if not (isinstance(value, Real | None) and value in harmless):
                choices = " or ".join(map(repr, harmless)) or "nothing"
                _refuse(name, value, f"{choices} ({instead})" if instead else choices)


def validate_hyperparameters(
    config: ShampooConfig, *, lr: Any, betas: Any, eps: Any, weight_decay: Any
) -> None:
    """Raise a ValueError that names the first entry of a parameter group that is not allowed."""
    _check_lr(lr)
    for name, value in (("eps", eps), ("weight_decay", weight_decay)):
        if not _is_number(value) or value < 0.0:
            _refuse(name, value, "a finite number >= 0")
    if not (isinstance(betas, tuple | list) and len(betas) == 2 and all(map(_is_number, betas))):
        _refuse("betas", betas, "two numbers (beta1, beta2)")
    beta1, beta2 = betas
    if not 0.0 <= beta1 < 1.0:
        _refuse("beta1", beta1, "0 <= beta1 < 1")
    if config.beta3 and not beta1:
        _refuse("beta3", config.beta3, "nothing but 0 if beta1 is 0, where there is no momentum")
    if not 0.0 <= beta2 <= 1.0:
        _refuse("beta2", beta2, "0 <= beta2 <= 1 (1 sums the factors instead of averaging them)")
    if beta2 < 1.0:
        return
    if config.preconditioner == "kl_shampoo":
        _refuse("beta2", beta2, "a number below 1 for kl_shampoo, whose factors are averages")
    method = config.elementwise_method
    if config.grafting_beta2 is None and method in ("adam", "rmsprop"):
        of = "" if config.grafting == method else " of parameters that are not preconditioned"
        _refuse(
            "beta2",
            beta2,
            f"a number below 1 here, since '{method}' averages the second moment{of} with it; to "
            "sum the factors all the same, set 'grafting_beta2', which it then takes",
        )


def _check_lr(lr: Any) -> None:
    if not isinstance(lr, Tensor):
        if not _is_number(lr) or lr < 0.0:
            _refuse("lr", lr, "a finite number >= 0")
        return
    if lr.device.type != "cpu":
        # The step would wait for it.
        raise ValueError(
            f"setting 'lr' is a tensor on {lr.device}; give a number or a tensor on the CPU."
        )
    if lr.numel() != 1:
        _refuse("lr", lr, "a finite number >= 0 (Tensor lr must be 1-element)")
    if not (lr.is_floating_point() and 0.0 <= float(lr) < math.inf):
        _refuse("lr", lr, "a finite number >= 0, as a tensor of floating point")


def _is_number(value: Any) -> bool:
    # Real: numpy's numbers as well.
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def _check_at_least(name: str, value: int, least: int) -> None:
    if value < least:
        _refuse(name, value, f"an integer >= {least}")


def _check_type(name: str, value: Any, annotation: Any) -> None:
    """Settings also come from TOML files, where nothing else has checked their types."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (types.UnionType, typing.Union):
        if value is not None:
            _check_type(name, value, arguments[0])
    elif origin is Literal:
        if value not in arguments:
            _refuse(name, value, " or ".join(f"'{choice}'" for choice in arguments))
    elif origin is list:
        if not isinstance(value, list):
            _refuse(name, value, "a list of " + {str: "strings", float: "numbers"}[arguments[0]])
        for item in value:
            _check_type(name, item, arguments[0])
    elif annotation is float:
        if not isinstance(value, int | float) or isinstance(value, bool):
            _refuse(name, value, "a number")
    elif annotation is int:
        if not isinstance(value, int) or isinstance(value, bool):
            _refuse(name, value, "an integer")
    elif not isinstance(value, annotation):
        _refuse(name, value, {str: "a string"}.get(annotation, f"a {annotation.__name__}"))


def _refuse(name: str, value: Any, allowed: str) -> NoReturn:
    raise ValueError(f"setting '{name}' is {value!r}; allowed: {allowed}.")

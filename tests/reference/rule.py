"""Settings, and what the rules have in common: factors that are averages of G Gᵀ, new bases.

Sources:
    Gupta, Koren, Singer 2018, "Shampoo: Preconditioned Stochastic Tensor Optimization",
        arXiv 1802.09568: Algorithm 2 (sums).
    Shi et al. 2023, arXiv 2309.06497: Algorithm 2 and Section 3 (averages and bias correction).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from tests.reference.algebra import eigenbasis, gram, kept_in, warm_qr_step


@dataclass(kw_only=True)
class Settings:
    """Those of the optimizer, by their names there; "float32" and "bfloat16" are types of what is
    kept of blocks from step to step, all is computed in fp64."""

    lr: float
    betas: tuple[float, float]
    """betas[1] == 1 means that the factors are plain sums (Gupta et al. 2018) instead of
    exponential averages (Shi et al. 2023)."""
    eps: float
    weight_decay: float
    max_preconditioner_dim: int
    """The largest side of a block."""
    precondition_frequency: int
    """Steps from one refresh of a block's roots to the next."""
    preconditioner_eps: float
    """Added to the eigenvalues of the bias-corrected factors."""
    initial_lr: float | None = None
    """For weight_decay_type "independent". None: lr."""
    start_preconditioning_step: int = 2
    """The first step that uses the roots, and computes them."""
    refresh_warmup_steps: int | None = None
    """Over which the time between refreshes grows from 1. None: 10 times the frequency."""
    refresh_schedule: str = "together"
    """"together": when t % frequency == 0; "staggered": when (t + phase) % frequency == 0."""
    preconditioner: str = "shampoo"
    grafting: str = "adam"
    """"adam", "rmsprop" (no bias correction), "adagrad" (sums), "sgd" or "none"."""
    grafting_beta2: float | None = None
    """None: betas[1]."""
    grafting_eps: float | None = None
    """None: eps."""
    beta3: float | None = None
    """Weight of the last momentum in what is used of it, of preconditioned parameters. None:
    betas[0]^2, Nesterov's."""
    use_bias_correction: bool = True
    momentum: float = 0.0
    """Of the direction, as in torch.optim.SGD; so are the next two."""
    nesterov: bool = False
    dampening: float = 0.0
    weight_decay_type: str = "decoupled"
    root_method: str | None = None
    """"qr" improves the last eigenbasis by orthogonal iteration, "eigh_pseudo_inverse" leaves out
    null spaces; all others have the same limit, which is computed here, but "polynomial", which
    has its own. None: "qr" for soap, "eigh" for the others."""
    root_exponents: list[float] | None = None
    """Entry k-1 is the power -root_exponents[k-1] of tensors with k factors; 0: the rule's own."""
    large_dim: str = "block"
    """What dimensions above the cap get: "block" (they are cut), "one_sided" (no factor),
    "diagonal" (a diagonal one)."""
    max_factor_ratio: float = 4.0
    """A side has a factor of at most so many times the block's elements, or if it is shortest."""
    base_width: int | None = None
    """The lr of a weight [m, n] that is preconditioned is multiplied by the root of base_width / n
    (experts [E, m, n] the same, [m, n_1, n_2, ...] with the product). None: by 1."""
    precondition_1d: bool = False
    """Blocks of one row or column are vectors, with all of their factors."""
    merge_dims: str = "matrix"
    """"matrix": shapes of order 4 and more count as [out, rest]; "small": neighbouring dimensions
    are merged up to the cap."""
    factor_dtype: str = "float32"
    root_dtype: str = "float32"
    momentum_dtype: str = "float32"

    def __post_init__(self) -> None:
        for name, default in (
            ("initial_lr", self.lr),
            ("refresh_warmup_steps", 10 * self.precondition_frequency),
            ("grafting_beta2", self.betas[1]),
            ("grafting_eps", self.eps),
            ("beta3", self.betas[0] ** 2),
            ("root_method", "qr" if self.preconditioner == "soap" else "eigh"),
            ("root_exponents", []),
        ):
            if getattr(self, name) is None:
                setattr(self, name, default)
        assert self.grafting not in ("adam", "rmsprop") or self.grafting_beta2 < 1
        assert self.preconditioner != "kl_shampoo" or self.betas[1] < 1

    def correction(self, beta: float, t: int) -> float:
        """1 - beta^t; 1 for sums, or if it is not wanted."""
        return 1 - beta**t if self.use_bias_correction and beta < 1 else 1.0

    def average(self, old: Tensor, new: Tensor) -> Tensor:
        """Exponential moving average, or the sum for beta2 = 1."""
        beta2 = self.betas[1]
        return old + new if beta2 == 1 else beta2 * old + (1 - beta2) * new


class GramFactors:
    """L_i, the average of G_(i) G_(i)ᵀ, of each dimension; its diagonal, or None without one.

    On each step first `accumulate` (not for an unusable gradient), then `refresh` if one is due,
    then `observe` (not for an unusable gradient), then perhaps `precondition`. `correction` is the
    bias correction of averages with beta2, 1 - beta2^t.
    """

    works_without_roots = False
    """Whether `precondition` makes sense before the first refresh."""

    def __init__(self, shape: torch.Size, kinds: tuple[str, ...], settings: Settings) -> None:
        self.settings = settings
        self.has_roots = False
        self.bases = [torch.eye(size, dtype=torch.float64) for size in shape]
        self.factors: list[Tensor | None] = [
            {"full": torch.zeros_like(basis), "diagonal": basis[0] * 0.0, "none": None}[kind]
            for basis, kind in zip(self.bases, kinds, strict=True)
        ]

    def accumulate(self, grad: Tensor, correction: float) -> None:
        """Update the factors (Gupta et al. 2018, Algorithm 2; Shi et al. 2023, Section 3)."""
        for d, factor in enumerate(self.factors):
            if factor is not None:
                self.add(d, gram(grad, d))

    def add(self, d: int, moment: Tensor) -> None:
        """Put a second moment into the factor of a dimension."""
        factor = self.factors[d]
        if factor.ndim == 1:
            self.factors[d] = self.settings.average(factor, moment.diag())
        else:
            average = self.settings.average(factor, moment)
            self.factors[d] = kept_in(self.settings.factor_dtype, average)

    def observe(self, grad: Tensor) -> None:
        """Update what depends on the newest bases."""


def new_basis(matrix: Tensor, old: Tensor, warm: bool, settings: Settings) -> Tensor:
    if warm and settings.root_method == "qr":
        return warm_qr_step(matrix, old)
    return eigenbasis(matrix)

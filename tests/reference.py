"""The slow, obvious form of the algorithm, in fp64 and in one process.

It is what the optimizer is compared with, so it is written from the formulas alone and loops over
parameters, blocks and dimensions in the plainest way.

Sources:
    Gupta, Koren, Singer 2018, "Shampoo: Preconditioned Stochastic Tensor Optimization",
        arXiv 1802.09568: Algorithm 1 (matrices), Algorithm 2 (tensors of any order).
    Anil, Gupta, Koren, Regan, Singer 2020, "Scalable Second Order Optimization for Deep Learning",
        arXiv 2002.09018: exponential averages, delayed roots, blocking, grafting.
    Shi et al. 2023, "A Distributed Data-Parallel PyTorch Implementation of the Distributed Shampoo
        Optimizer", arXiv 2309.06497: Algorithm 2 and Section 3 (the complete method; bias
        correction, grafting by the norm of each block, decoupled weight decay, and the start).
    Loshchilov, Hutter 2019, "Decoupled Weight Decay Regularization", arXiv 1711.05101: Algorithm 2
        (AdamW, for excluded parameters and before the start).
"""

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["ReferenceShampoo", "block_slices", "inverse_root", "precondition", "tile_sizes"]


def tile_sizes(size: int, cap: int) -> list[int]:
    """Cut a dimension in ceil(size / cap) tiles; the first size % count are one longer."""
    count = math.ceil(size / cap)
    return [size // count + (1 if i < size % count else 0) for i in range(count)]


def block_slices(shape: tuple[int, ...], cap: int) -> dict[tuple[int, ...], tuple[slice, ...]]:
    """Map the coordinates of each block of the grid to the rectangle that it covers."""
    slices_per_dimension = []
    for size in shape:
        slices = []
        start = 0
        for length in tile_sizes(size, cap):
            slices.append(slice(start, start + length))
            start += length
        slices_per_dimension.append(slices)
    grid = itertools.product(*(range(len(slices)) for slices in slices_per_dimension))
    return {
        coordinates: tuple(slices_per_dimension[d][i] for d, i in enumerate(coordinates))
        for coordinates in grid
    }


def inverse_root(factor: Tensor, order: int, preconditioner_eps: float) -> Tensor:
    """Return (factor + eps I)^(-1/(2 order)).

    Before, eigenvalues are raised to the largest one times the resolution of fp32, in which the
    optimizer keeps its factors: it cannot know what is below.

    The exponent is that of Gupta et al. 2018, Algorithm 2: a tensor of order k has k factors, each
    to the power -1/(2k); for matrices (Algorithm 1) -1/4.
    """
    eigenvalues: Tensor
    eigenvectors: Tensor
    eigenvalues, eigenvectors = torch.linalg.eigh(factor)
    floor = eigenvalues.max().clamp(min=0) * 2**-23
    eigenvalues = eigenvalues.clamp(min=floor) + preconditioner_eps
    return eigenvectors @ torch.diag(eigenvalues ** (-1 / (2 * order))) @ eigenvectors.T


def precondition(tensor: Tensor, roots: list[Tensor]) -> Tensor:
    """Multiply each dimension of the tensor with its root (Gupta et al. 2018, Algorithm 2).

    For a matrix: roots[0] @ tensor @ roots[1].
    """
    for d, root in enumerate(roots):
        # tensordot puts the new dimension last; the roots are symmetric.
        tensor = torch.tensordot(tensor, root, dims=([d], [0])).movedim(-1, d)
    return tensor


def _gram(tensor: Tensor, d: int) -> Tensor:
    """Contract the tensor with itself over all dimensions but d; for a matrix G Gᵀ, then Gᵀ G."""
    unfolded = tensor.movedim(d, 0).reshape(tensor.shape[d], -1)
    return unfolded @ unfolded.T


@dataclass
class _Block:
    """A rectangle of a parameter, and what is remembered of its gradients."""

    coordinates: tuple[int, ...]
    index: tuple[int | slice, ...]
    """Where the block lies in the parameter, seen in the shape that is cut."""
    momentum: Tensor
    """M"""
    graft: Tensor
    """A"""
    factors: list[Tensor]
    """L and R, or one for each dimension"""
    roots: list[Tensor] | None = None
    """None until first computed"""


@dataclass
class _Excluded:
    """A parameter that is not preconditioned."""

    momentum: Tensor
    graft: Tensor


class ReferenceShampoo:
    """Shampoo with grafting and decoupled weight decay.

    Args:
        shapes: shape of each parameter, by name.
        lr, betas, eps, weight_decay: as in torch.optim.AdamW. betas[1] == 1 means that the factors
            are plain sums (Gupta et al. 2018) instead of exponential averages (Shi et al. 2023).
        max_preconditioner_dim: the largest side of a block.
        precondition_frequency: steps from one computation of a block's roots to the next.
        start_preconditioning_step: the first step that uses the roots, and computes them; steps
            before take the grafted method's direction. None: precondition_frequency.
        refresh_schedule: "together": roots are computed when t % frequency == 0; "staggered": when
            (t + phase) % frequency == 0.
        grafting: "adam", "rmsprop" (no bias correction), "adagrad" (sums) or "sgd".
        grafting_beta2: for the averages of the grafted method. None: betas[1].
        preconditioner_eps: added to the eigenvalues of the bias-corrected factors.
        excluded: names of parameters that take the grafted method's own step; AdamW for "adam".
        phase: from a parameter's name and a block's coordinates; needed for "staggered". The
            coordinates count the blocks along each dimension of the shape that is cut, after the
            number of the matrix for a batch of them: (e, i, j).
        batched_3d: cut a parameter of order 3 into its matrices [E] x [m, n]; otherwise it is a
            tensor with three factors.

    Shapes of order 4 count as matrices [out, in * kh * kw].

    Non-finite gradients: a block with such an entry on a step keeps its state, its roots included,
    and its D is 0. For an excluded parameter, which has no blocks, the same holds for each entry
    by itself. t advances all the same, and the weights decay. A block that misses its first roots
    this way takes the grafted method's direction until its next refresh.
    """

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, ...]],
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        max_preconditioner_dim: int,
        precondition_frequency: int,
        start_preconditioning_step: int | None = None,
        refresh_schedule: str = "together",
        grafting: str = "adam",
        grafting_beta2: float | None = None,
        preconditioner_eps: float,
        excluded: set[str] | frozenset[str] = frozenset(),
        phase: Callable[[str, tuple[int, ...]], int] | None = None,
        batched_3d: bool = True,
    ) -> None:
        if refresh_schedule not in ("together", "staggered"):
            raise ValueError(f"unknown refresh_schedule {refresh_schedule!r}")
        if refresh_schedule == "staggered" and phase is None:
            raise ValueError("the staggered schedule needs a phase")
        if grafting not in ("adam", "rmsprop", "adagrad", "sgd"):
            raise ValueError(f"unknown grafting {grafting!r}")
        self.lr = lr
        self.beta1, self.beta2 = betas
        self.eps = eps
        self.weight_decay = weight_decay
        self.cap = max_preconditioner_dim
        self.frequency = precondition_frequency
        self.start = (
            precondition_frequency
            if start_preconditioning_step is None
            else start_preconditioning_step
        )
        self.refresh_schedule = refresh_schedule
        self.grafting = grafting
        self.grafting_beta2 = self.beta2 if grafting_beta2 is None else grafting_beta2
        self.preconditioner_eps = preconditioner_eps
        self.phase = phase
        self.batched_3d = batched_3d
        if grafting in ("adam", "rmsprop") and not self.grafting_beta2 < 1:
            raise ValueError(f"grafting {grafting!r} needs grafting_beta2 < 1")

        self.t = dict.fromkeys(shapes, 0)
        self.excluded: dict[str, _Excluded] = {}
        self.blocks: dict[str, list[_Block]] = {}
        for name, shape in shapes.items():
            if name in excluded:
                zeros = torch.zeros(shape, dtype=torch.float64)
                self.excluded[name] = _Excluded(momentum=zeros.clone(), graft=zeros.clone())
            else:
                self.blocks[name] = self._make_blocks(tuple(shape))

    def _make_blocks(self, shape: tuple[int, ...]) -> list[_Block]:
        indices: dict[tuple[int, ...], tuple[int | slice, ...]] = {}
        cut_shape = self._cut_shape(shape)
        if len(cut_shape) == 3 and self.batched_3d:
            for e in range(cut_shape[0]):
                for coordinates, slices in block_slices(cut_shape[1:], self.cap).items():
                    block = (e, *coordinates)
                    indices[block] = (e, *slices)
        else:
            indices.update(block_slices(cut_shape, self.cap))

        whole = torch.zeros(cut_shape, dtype=torch.float64)
        blocks = []
        for coordinates, index in indices.items():
            zeros = whole[index]
            factors = [torch.zeros(size, size, dtype=torch.float64) for size in zeros.shape]
            blocks.append(
                _Block(
                    coordinates=coordinates,
                    index=index,
                    momentum=zeros.clone(),
                    graft=zeros.clone(),
                    factors=factors,
                )
            )
        return blocks

    def _cut_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        if len(shape) == 0:
            raise ValueError("a parameter without dimensions must be excluded")
        if len(shape) == 4:
            return (shape[0], shape[1] * shape[2] * shape[3])
        return shape

    @torch.no_grad()
    def step(self, params: dict[str, Tensor], grads: Mapping[str, Tensor | None]) -> None:
        """Update the parameters (fp64) in place; those with no gradient are left as they are."""
        for name, param in params.items():
            if param.dtype != torch.float64:
                raise TypeError(f"{name} is {param.dtype}; the reference computes in fp64")
            grad = grads.get(name)
            if grad is None:
                continue
            self.t[name] += 1
            if name in self.excluded:
                direction = self._excluded_direction(name, grad.double())
            else:
                cut_shape = self._cut_shape(tuple(param.shape))
                whole_grad = grad.double().reshape(cut_shape)
                direction = torch.zeros(cut_shape, dtype=torch.float64)
                for block in self.blocks[name]:
                    direction[block.index] = self._block_direction(
                        name, block, whole_grad[block.index]
                    )
            # W <- W - lr (D + weight_decay W): Loshchilov & Hutter 2019, Algorithm 2, line 12.
            param -= self.lr * (direction.reshape(param.shape) + self.weight_decay * param)

    def _excluded_direction(self, name: str, grad: Tensor) -> Tensor:
        state = self.excluded[name]
        grad = torch.where(grad.isfinite(), grad, 0.0)
        state.momentum, state.graft = self._averages(state.momentum, state.graft, grad)
        return self._graft_direction(state.momentum, state.graft, self.t[name])

    def _block_direction(self, name: str, block: _Block, grad: Tensor) -> Tensor:
        """D for one block (Shi et al. 2023, Algorithm 2)."""
        t = self.t[name]
        usable = bool(grad.isfinite().all())
        if usable:
            self._accumulate(block, grad)
        if self._refresh_is_due(name, block.coordinates):
            correction = 1.0 if self.beta2 == 1 else 1 - self.beta2**t
            block.roots = [
                inverse_root(factor / correction, grad.ndim, self.preconditioner_eps)
                for factor in block.factors
            ]
        if not usable:
            return torch.zeros_like(grad)

        graft_direction = self._graft_direction(block.momentum, block.graft, t)
        if t < self.start or block.roots is None:
            return graft_direction
        # Grafting: the direction is Shampoo's, its size the grafted method's (Anil et al. 2020,
        # Section 2; Shi et al. 2023, Section 3.1: norms per block).
        momentum_hat = block.momentum / (1 - self.beta1**t)
        direction = precondition(momentum_hat, block.roots)
        norm = torch.linalg.vector_norm(direction)
        if norm == 0:
            return torch.zeros_like(grad)
        scale: Tensor = torch.linalg.vector_norm(graft_direction) / norm
        return direction * scale

    def _accumulate(self, block: _Block, grad: Tensor) -> None:
        # Gupta et al. 2018, Algorithm 2 (sums); Shi et al. 2023, Section 3 (averages).
        for d in range(grad.ndim):
            if self.beta2 == 1:
                block.factors[d] = block.factors[d] + _gram(grad, d)
            else:
                block.factors[d] = self.beta2 * block.factors[d] + (1 - self.beta2) * _gram(grad, d)
        block.momentum, block.graft = self._averages(block.momentum, block.graft, grad)

    def _refresh_is_due(self, name: str, coordinates: tuple[int, ...]) -> bool:
        t = self.t[name]
        if t < self.start:
            return False
        if t == self.start:
            return True
        if self.refresh_schedule == "together":
            return t % self.frequency == 0
        assert self.phase is not None
        return (t + self.phase(name, coordinates)) % self.frequency == 0

    def _averages(self, momentum: Tensor, graft: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
        """M and A after this gradient."""
        momentum = self.beta1 * momentum + (1 - self.beta1) * grad
        if self.grafting in ("adam", "rmsprop"):
            graft = self.grafting_beta2 * graft + (1 - self.grafting_beta2) * grad**2
        elif self.grafting == "adagrad":
            graft = graft + grad**2
        return momentum, graft

    def _graft_direction(self, momentum: Tensor, graft: Tensor, t: int) -> Tensor:
        """D_graft = M̂ / (sqrt(Â) + eps); for SGD M̂ (Shi et al. 2023, Section 3.1)."""
        momentum_hat = momentum / (1 - self.beta1**t)
        if self.grafting == "sgd":
            return momentum_hat
        if self.grafting == "adam":
            graft = graft / (1 - self.grafting_beta2**t)
        return momentum_hat / (graft.sqrt() + self.eps)

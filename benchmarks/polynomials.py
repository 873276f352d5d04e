"""Makes the polynomials of `root_method = "polynomial"`: python -m benchmarks.polynomials

It prints the constants of shampoo_fsdp/rules/polynomial.py.

The inverse square root of lambda is p(x) / x with x = sqrt(lambda) and an odd p that is near 1. One
p of degree 3, 5 or 9 after the other, each the best for what the one before left (Chen & Chow 2014;
Amsel et al. 2025, arXiv 2505.16932, theorem 3.1: the composition is then the best there is), reach
an error that a single polynomial would need a degree of hundreds for.
"""

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

LEAST = 1e-5
"""The smallest eigenvalue that they are made for, relative to the largest: TF32 rounds what is less
away."""
RESIDUAL = 0.25
"""How far A X^p may be from I, for a p-th root X."""

_TERMS = (2, 3, 5)  # of p: cubic, quintic, and of degree 9, whose q takes two products
_LONGEST = 4
_MARGIN = 0.01  # rounding takes eigenvalues out of the interval, where a polynomial is steep

Stage = tuple[tuple[float, ...], float, float]
"""q with q(t) = p(sqrt(t)) / sqrt(t) for t in [middle - half, middle + half]: the coefficients of
its powers of (t - middle) / half, middle, half. (In t they alternate and are up to thirty times as
large, and so would rounding be.)"""


@functools.cache
def chains() -> dict[str, tuple[tuple[Stage, ...], float]]:
    """The polynomials of the square root, and of the two square roots that make a fourth root; and
    the error of p that each chain leaves."""
    fourth = 0.5 * ((1.0 + RESIDUAL) ** 0.25 - 1.0)
    first, left = inverse_square_root(LEAST, fourth)
    # The second one sees the first one's square roots, over the largest that they can be.
    least = LEAST**0.5 * (1.0 - left) / (1.0 + left)
    return {
        "_SQUARE_ROOT": inverse_square_root(LEAST, (1.0 + RESIDUAL) ** 0.5 - 1.0),
        "_FIRST_OF_TWO": (first, left),
        "_SECOND_OF_TWO": inverse_square_root(least, fourth),
    }


def inverse_square_root(least: float, error: float) -> tuple[tuple[Stage, ...], float]:
    """The polynomials of fewest products for eigenvalues in [least, 1] with at most this error."""
    choices: list[tuple[int, float, tuple[Stage, ...]]] = []
    unfinished: list[tuple[int, ...]] = [()]
    for _ in range(_LONGEST):
        longer = [(*terms, n) for terms in unfinished for n in _TERMS]
        made = {terms: _chain(terms, math.sqrt(least)) for terms in longer}
        choices += [(count_products(t), left, s) for t, (s, left) in made.items() if left <= error]
        unfinished = [terms for terms, (_, left) in made.items() if left > error]
    _, left, stages = min(choices)
    return stages, left


def count_products(terms: Sequence[int]) -> int:
    """Matrix products of the coupled iteration with polynomials of so many terms."""
    own = {2: 0, 3: 1, 5: 2}  # to evaluate q
    # Y after the first; M, Y and Z around each further one; no Y after the last.
    return sum(own[n] for n in terms) + 3 * (len(terms) - 1)


def _chain(terms: Sequence[int], low: float) -> tuple[tuple[Stage, ...], float]:
    stages, high, error = [], 1.0, 0.0
    for n in terms:
        # Where little is left to do, little has been lost.
        high *= 1.0 + (min(_MARGIN, high - 1.0) or _MARGIN)
        coefficients, error = _minimax(low, high, n)
        middle, half = 0.5 * (high**2 + low**2), 0.5 * (high**2 - low**2)
        # The powers of t = middle + half nu, multiplied out.
        shifted = [
            sum(
                c * math.comb(k, j) * middle ** (k - j)
                for k, c in enumerate(coefficients)
                if k >= j
            )
            * half**j
            for j in range(n)
        ]
        stages.append((tuple(shifted), middle, half))
        low, high = 1.0 - error, 1.0 + error
    return tuple(stages), error


@functools.cache
def _minimax(low: float, high: float, terms: int) -> tuple[tuple[float, ...], float]:
    """c of p(x) = sum c_k x^(2k+1), the nearest to 1 on [low, high], and its largest error.

    By exchange (Remez 1934): the error of p has the same size, with alternating signs, at `terms` +
    1 points, which are the ends and where p has its extremes.
    """
    steps = torch.arange(terms + 1, dtype=torch.float64)
    points = low + (high - low) * 0.5 * (1.0 - torch.cos(math.pi * steps / terms))
    odd = 2 * torch.arange(terms) + 1
    coefficients = torch.zeros(terms, dtype=torch.float64)
    for _ in range(40):
        rows = torch.cat([points[:, None] ** odd, (-1.0) ** steps[:, None]], 1)
        coefficients = torch.linalg.solve(rows, torch.ones_like(points))[:-1]
        extremes = _positive_roots(odd * coefficients, low, high)
        if len(extremes) != terms - 1:
            break
        points = torch.tensor([low, *extremes, high], dtype=torch.float64)
    error = (points[:, None] ** odd @ coefficients - 1.0).abs().max().item()
    return tuple(coefficients.tolist()), error


def _positive_roots(coefficients: Tensor, low: float, high: float) -> list[float]:
    """x in [low, high] where the sum of c_k x^(2k) is zero: the eigenvalues of its companion."""
    n = len(coefficients) - 1
    companion = torch.diag(torch.ones(n - 1, dtype=torch.float64), -1)
    companion[:, -1] = -coefficients[:-1] / coefficients[-1]
    squares = torch.linalg.eigvals(companion)
    real = squares.real[squares.imag.abs() < 1e-9 * squares.abs()].clamp_min(0.0).sqrt()
    return sorted(x for x in real.tolist() if low < x < high)


def main() -> None:
    """Print the constants."""
    for name, (stages, left) in chains().items():
        print(f"{name}: _Chain = (\n    (")
        for coefficients, middle, half in stages:
            numbers = ", ".join(f"{c:.12g}" for c in coefficients)
            print(f"        Stage(({numbers}),\n              {middle:.12g}, {half:.12g}),")
        print(f"    ),\n    {left:.12g},\n)")


if __name__ == "__main__":
    main()

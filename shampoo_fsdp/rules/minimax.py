"""Polynomials for the inverse square root: as few matrix products as a wanted error allows.

The inverse square root of lambda is p(x) / x with x = sqrt(lambda) and an odd p that is near 1.
One p of degree 9 after the other, each the best for what the one before left (Chen & Chow 2014;
Amsel et al. 2025, arXiv 2505.16932, theorem 3.1: the composition is then the best there is), reach
an error that a single polynomial would need a degree of hundreds for.
"""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

__all__ = ["Stage", "count_products", "inverse_square_root"]

_TERMS = (2, 3, 5)  # of p: cubic, quintic, and of degree 9, whose q takes two products
_LONGEST = 12

# Rounding takes eigenvalues out of the interval that a polynomial was made for, where it is steep.
_MARGIN = 0.01

# Where the interval is this short the derivatives at its middle say as much, more exactly.
_SHORT = 0.05


class Stage(NamedTuple):
    """One polynomial q with q(t) = p(sqrt(t)) / sqrt(t), for t in [middle - half, middle + half].

    Coefficients are those of nu = (t - middle) / half: in t they alternate and are up to thirty
    times as large, and so would rounding be.
    """

    coefficients: tuple[float, ...]
    middle: float
    half: float


@functools.cache
def inverse_square_root(least: float, error: float) -> tuple[tuple[Stage, ...], float]:
    """The polynomials of fewest products for eigenvalues between `least` and 1, one after the
    other, and the largest error of p that they leave.

    Eigenvalues below `least` become at most about least^(-1/2), as if they were at the least.

    Args:
        least: of [1e-15, 1].
        error: the largest that is wanted.
    """
    # The best chains so far of each number of products: polynomials, the interval that they leave.
    best: tuple[int, tuple[int, ...]] | None = None
    level: list[tuple[tuple[int, ...], float, float]] = [((), math.sqrt(least), 1.0)]
    for _ in range(_LONGEST):
        reached: dict[int, tuple[tuple[int, ...], float, float]] = {}
        for terms, low, high in level:
            for more in _TERMS:
                chain = (*terms, more)
                _, left = _minimax(low, _widened(high), more)
                cost = count_products(chain)
                if left <= error:
                    if best is None or cost < best[0]:
                        best = cost, chain
                elif best is None or cost < best[0]:
                    other = reached.get(cost)
                    if other is None or (1.0 - left) / (1.0 + left) > other[1] / other[2]:
                        reached[cost] = chain, 1.0 - left, 1.0 + left
        level = list(reached.values())
    assert best is not None  # twelve of degree 9 take any fp64 number to 1
    return _stages(best[1], math.sqrt(least))


def count_products(terms: Sequence[int]) -> int:
    """Of the coupled iteration with polynomials of so many terms."""
    own = {2: 0, 3: 1, 5: 2}  # to evaluate q
    # Y after the first; M, Y and Z around each further one; no Y after the last.
    around = 3 * (len(terms) - 1)
    return sum(own[n] for n in terms) + around


def _stages(chain: Sequence[int], low: float) -> tuple[tuple[Stage, ...], float]:
    stages, high, error = [], 1.0, 0.0
    for terms in chain:
        high = _widened(high)
        coefficients, error = _minimax(low, high, terms)
        middle, half = 0.5 * (high**2 + low**2), 0.5 * (high**2 - low**2)
        stages.append(Stage(_shifted(coefficients, middle, half), middle, half))
        low, high = 1.0 - error, 1.0 + error
    return tuple(stages), error


def _widened(high: float) -> float:
    # Where little is left to do, little has been lost.
    return high * (1.0 + (min(_MARGIN, high - 1.0) or _MARGIN))


def _shifted(coefficients: Sequence[float], middle: float, half: float) -> tuple[float, ...]:
    """Of q(middle + half nu), by Horner's rule."""
    result = [0.0]
    for c in reversed(coefficients):
        shifted = [middle * a for a in result] + [0.0]
        for k, a in enumerate(result):
            shifted[k + 1] += half * a
        result = shifted
        result[0] += c
    return tuple(result[: len(coefficients)])


def _minimax(low: float, high: float, terms: int) -> tuple[tuple[float, ...], float]:
    """c of p(x) = sum c_k x^(2k+1), the nearest to 1 on [low, high], and its largest error.

    By exchange (Remez 1934): the error of p has the same size, with alternating signs, at `terms` +
    1 points, which are the ends and where p has its extremes.
    """
    if high - low < _SHORT * high:
        return _taylor(low, high, terms)
    angles = [math.pi * k / terms for k in range(terms + 1)]
    points = [low + (high - low) * 0.5 * (1.0 - math.cos(angle)) for angle in angles]
    even = [low + (high - low) * k / 200 for k in range(1, 200)]
    grid = sorted([low * (high / low) ** (k / 200) for k in range(201)] + even)
    coefficients: list[float] = []
    for _ in range(40):
        rows = [
            [x ** (2 * k + 1) for k in range(terms)] + [(-1.0) ** i, 1.0]
            for i, x in enumerate(points)
        ]
        coefficients = _solved(rows)[:terms]
        slopes = [(2 * k + 1) * c for k, c in enumerate(coefficients)]
        new = [low, *_roots(slopes, grid), high]
        if len(new) != len(points):
            break
        moved = max(abs(a - b) / b for a, b in zip(new, points, strict=True))
        points = new
        if moved < 1e-9:
            break
    errors = [abs(x * _even(coefficients, x) - 1.0) for x in points]
    return tuple(coefficients), max(errors)


def _taylor(low: float, high: float, terms: int) -> tuple[tuple[float, ...], float]:
    """The series of Newton and Schulz, x sum binom(2j, j) / 4^j (1 - x^2)^j, around the middle."""
    middle = 0.5 * (low + high)
    total = [0.0] * terms
    for j in range(terms):
        weight = math.comb(2 * j, j) / 4.0**j
        for k in range(j + 1):
            total[k] += weight * math.comb(j, k) * (-1.0) ** k
    coefficients = [c / middle ** (2 * k + 1) for k, c in enumerate(total)]
    return tuple(coefficients), max(abs(x * _even(coefficients, x) - 1.0) for x in (low, high))


def _even(coefficients: Sequence[float], x: float) -> float:
    result = 0.0
    for c in reversed(coefficients):
        result = result * x * x + c
    return result


def _roots(coefficients: Sequence[float], grid: Sequence[float]) -> list[float]:
    """Where the polynomial in x^2 changes its sign on the grid."""
    values = [_even(coefficients, x) for x in grid]
    found = []
    for k in range(len(grid) - 1):
        if (values[k] > 0.0) != (values[k + 1] > 0.0):
            low, high = grid[k], grid[k + 1]
            for _ in range(50):
                middle = 0.5 * (low + high)
                if (_even(coefficients, middle) > 0.0) == (values[k] > 0.0):
                    low = middle
                else:
                    high = middle
            found.append(0.5 * (low + high))
    return found


def _solved(rows: list[list[float]]) -> list[float]:
    """The solution of linear equations, the right side being the last column."""
    n = len(rows)
    for i in range(n):
        pivot = max(range(i, n), key=lambda r: abs(rows[r][i]))
        rows[i], rows[pivot] = rows[pivot], rows[i]
        for r in range(i + 1, n):
            factor = rows[r][i] / rows[i][i]
            rows[r] = [a - factor * b for a, b in zip(rows[r], rows[i], strict=True)]
    solution = [0.0] * n
    for i in reversed(range(n)):
        known = sum(rows[i][k] * solution[k] for k in range(i + 1, n))
        solution[i] = (rows[i][n] - known) / rows[i][i]
    return solution
